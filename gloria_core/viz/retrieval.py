"""Figures of retrieval: recall over the length of the list, and precision by class, each beside chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from gloria_core.viz.plots import new_figure, reaches


def recall_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], ks: Sequence[int], *, n: int, title: str = "Recall"
) -> Figure:
    """Recall@K over K (log axis), for each name its (recall, chance); chance is dashed in the same colour."""
    if not curves or not len(ks):
        raise ValueError("recall_curves takes at least one curve and one K")
    figure, ((axis,),) = new_figure(1, 1, width=6.5, height=4)
    for (name, (recall, chance)), colour in zip(curves.items(), sns.color_palette("colorblind"), strict=False):
        axis.plot(ks, recall, color=colour, marker="o", markersize=3.5, label=name.replace("_", " "))
        axis.plot(ks, chance, color=colour, linestyle="--", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(ks)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_ylim(0, 1)
    axis.set_xlabel("K, length of the list (dashed: a random order)")
    axis.set_ylabel("right one among the first K")
    axis.set_title(f"{title} (n = {n} studies)")
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def precision_bars(rows: pd.DataFrame, *, title: str = "Precision") -> Figure:
    """Precision@K by class: one bar a K in each class, with intervals; a black tick is chance. A class of NaN is named.

    `rows`: of `retrieval.precision_rows`, one direction.
    """
    if rows.empty or rows.duplicated(["target", "metric"]).any():
        raise ValueError("precision_bars takes one row per class and metric, and at least one")
    targets, metrics = list(dict.fromkeys(rows["target"])), list(dict.fromkeys(rows["metric"]))
    figure, ((axis,),) = new_figure(1, 1, width=8, height=0.24 * len(targets) * len(metrics) + 1.6)
    thickness = 0.8 / len(metrics)
    for number, (metric, colour) in enumerate(zip(metrics, sns.color_palette("colorblind"), strict=False)):
        part = rows[rows["metric"] == metric].set_index("target").loc[targets]
        place = np.arange(len(targets)) - 0.4 + (number + 0.5) * thickness
        value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
        axis.barh(place, np.nan_to_num(value), thickness, color=colour, alpha=0.8, label=metric.replace("_", " "))
        axis.errorbar(value, place, xerr=reaches(value, low, high), fmt="none", color="0.3", capsize=2, linewidth=1)
        axis.scatter(part["chance"], place, marker="|", color="black", s=90, zorder=3)
        for y, v in zip(place, value, strict=True):
            if not np.isfinite(v):
                axis.text(0.01, y, "no query", va="center", fontsize=8)
    counts = rows.groupby("target")["n"].max()
    axis.set_yticks(range(len(targets)), [f"{target} (n = {int(counts[target])})" for target in targets])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("share of the first K with the query's finding; black tick: chance")
    axis.set_title(f"{title} (n = {int(counts.max())} queries)")
    figure.legend(loc="outside lower center", ncols=len(metrics), frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
