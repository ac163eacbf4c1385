"""Figures of retrieval: recall over the length of the list, and precision by class, each beside chance.

The nearest neighbours of a search, shown: images as thumbnails, reports as text, the right ones marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from gloria_core.viz.plots import new_figure, reaches, wrapped


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


_WIDTH, _LETTERS, _LINES = 2.3, 30, 9


@dataclass(frozen=True)
class Shown:
    """One query or one answer: an image (H, W) uint8, a text, or both.

    For an answer, its `score` and whether it is `right`, which is None for a query, and where nobody knows.
    """

    text: str = ""
    image: np.ndarray | None = None
    score: float | None = None
    right: bool | None = None


def neighbours(
    queries: Sequence[Shown], answers: Sequence[Sequence[Shown]], *, title: str = "The nearest, best first"
) -> Figure:
    """One row a query: what was asked, then what was found. Right answers have a tick and a thick frame.

    Long texts are cut at `_LINES` lines, and end in an ellipsis. Raises ValueError for no queries or unequal rows.
    """
    if not queries or len(queries) != len(answers) or len({len(row) for row in answers}) != 1:
        raise ValueError("neighbours takes at least one query, and as many answers for each")
    columns, pictured = 1 + len(answers[0]), any(s.image is not None for row in answers for s in row)
    cells = [[query, *row] for query, row in zip(queries, answers, strict=True)]
    tall = [any(shown.image is not None for shown in row) for row in cells]
    most = [max(len(_lines(shown).splitlines()) for shown in row) for row in cells]
    # a cell with a picture has its text below, one without is all text
    ratios = [(2.1 if with_image else 0.4) + 0.16 * lines for with_image, lines in zip(tall, most, strict=True)]
    figure, axes = new_figure(len(cells), columns, width=_WIDTH * columns, height=sum(ratios) + 0.6)
    axes[0, 0].get_gridspec().set_height_ratios(ratios)
    for row, line in zip(axes, cells, strict=True):
        for place, (axis, shown) in enumerate(zip(row, line, strict=True)):
            _draw(axis, shown, place)
    known = [shown.right for row in answers for shown in row if shown.right is not None]
    count = f", {sum(known)} of {len(known)} right" if known else ""
    unit = "images" if pictured else "texts"
    figure.suptitle(f"{title} (n = {len(queries)} queries, {columns - 1} {unit} each{count})", fontsize=11)
    return figure


def _draw(axis: Axes, shown: Shown, place: int) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    right, palette = bool(shown.right), sns.color_palette("colorblind")
    # marked by sign, width and colour, so that none of them is needed
    colour = palette[2] if right else "0.75"
    for side in axis.spines.values():
        side.set(color="black" if place == 0 else colour, linewidth=3 if right else 0.8)
    mark = "" if shown.right is None else ("✓ right" if right else "✗")
    score = "" if shown.score is None else f"{shown.score:.2f}"
    head = "query" if place == 0 else "  ".join(part for part in (f"{place}.", score, mark) if part)
    axis.set_title(head, fontsize=9, fontweight="bold" if right or place == 0 else "normal")
    if shown.image is None:
        axis.text(0.03, 0.97, _lines(shown), fontsize=7.5, va="top", ha="left", transform=axis.transAxes)
        return
    axis.imshow(shown.image, cmap="gray", vmin=0, vmax=255)
    axis.set_xlabel(_lines(shown), fontsize=7.5)


def _lines(shown: Shown) -> str:
    lines = wrapped(shown.text, _LETTERS).splitlines()
    return "\n".join(lines if len(lines) <= _LINES else [*lines[: _LINES - 1], lines[_LINES - 1][:-1] + "…"])
