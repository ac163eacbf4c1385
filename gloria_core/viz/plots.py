"""The study's figures: each function takes arrays or a table and returns a matplotlib Figure.

Every figure says in its title what it shows and of how many. Colours are safe for colour-blind readers (seaborn's
`colorblind` palette, viridis, cividis), and an objective has the same colour everywhere. A figure is taken out of
pyplot before it is returned: a notebook shows it once, as the value of its cell, and none is left open.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

_FIXED_COLOURS = {"": 0, "gloria": 0, "convirt": 1, "mgca": 2, "prior": 4, "cxr_clip": 9, "imagenet": 8, "random": 7}
GRAY = "0.75"


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of `width` x `height` inches with a (rows, columns) array of axes, no longer known to pyplot."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    plt.close(figure)
    return figure, axes


def colour_of(objective: str) -> tuple[float, float, float]:
    """The colour of an objective; unknown names share one that no known objective has."""
    return sns.color_palette("colorblind")[_FIXED_COLOURS.get(objective, 6)]


def reaches(value: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(2, n) lengths of error bars below and above, at least zero.

    A percentile interval need not hold its own point: the bootstrap of a biased statistic lies beside it. The bar then
    ends at the point on that side.
    """
    return np.maximum([value - low, high - value], 0.0)


def contact_sheet(
    images: Sequence[np.ndarray], titles: Sequence[str] = (), *, title: str = "Studies", columns: int = 5
) -> Figure:
    """Gray images (H, W) side by side, each with its own title (wrapped), 0..255 or, for floats, their own range."""
    if not len(images):
        raise ValueError("a contact sheet needs at least one image")
    if titles and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    lines = max((len(wrapped(text, 26).splitlines()) for text in titles), default=0)
    figure, axes = new_figure(rows, columns, width=2.2 * columns, height=(2.2 + 0.15 * lines) * rows + 0.4)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        limits = {"vmin": 0, "vmax": 255} if np.asarray(image).dtype == np.uint8 else {}
        axis.imshow(image, cmap="gray", **limits)
        if titles:
            axis.set_title(wrapped(titles[number], 26), fontsize=8)
    figure.suptitle(f"{title} (n = {len(images)})")
    return figure


def label_prevalence(frame: pd.DataFrame, labels: Sequence[str], *, title: str = "Labels") -> Figure:
    """Share of studies with each label positive, uncertain, negative and blank; the number of positives is written."""
    values = frame[list(labels)].apply(pd.to_numeric).to_numpy(dtype=float)
    parts = [
        ("positive", values == 1),
        ("uncertain", values == -1),
        ("negative", values == 0),
        ("blank", np.isnan(values)),
    ]
    palette = sns.color_palette("colorblind")
    figure, ((axis,),) = new_figure(1, 1, width=8, height=0.28 * len(labels) + 1.3)
    left, rows = np.zeros(len(labels)), np.arange(len(labels))
    for (name, mask), colour in zip(parts, (palette[0], palette[1], GRAY, "white"), strict=True):
        share = mask.mean(axis=0) if len(frame) else np.zeros(len(labels))
        axis.barh(rows, share, left=left, color=colour, label=name, edgecolor="0.4", linewidth=0.4)
        left += share
    for row, count in enumerate((values == 1).sum(axis=0)):
        axis.text(1.01, row, f"{count} positive", va="center", fontsize=8)
    axis.set_yticks(rows, labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xlabel("share of studies")
    axis.set_title(f"{title} (n = {len(frame)} studies)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return _despined(figure)


def report_lengths(frame: pd.DataFrame, *, title: str = "Report length") -> Figure:
    """Histogram of the words in findings and impression; empty sections are counted in the axis title, not drawn."""
    figure, (axes,) = new_figure(1, 2, width=9, height=3)
    for axis, section in zip(axes, ("findings", "impression"), strict=True):
        words = frame[section].fillna("").astype(str).str.split().str.len().to_numpy()
        used = words[words > 0]
        title_of_axis = f"{section}: {len(used)} with text, {(words == 0).sum()} empty"
        if len(used):
            step = max(1, -(-int(np.ptp(used)) // 40))  # whole words a bin, so that no bin gets two numbers by rounding
            axis.hist(used, bins=np.arange(used.min() - 0.5, used.max() + step + 0.5, step), color=colour_of(""))
            axis.axvline(np.median(used), color="black", linestyle="--", linewidth=1)
            title_of_axis += f"\ndashed: median {np.median(used):g} words"
        axis.set_title(title_of_axis, fontsize=10)
        axis.set_xlabel("words")
        axis.set_ylabel("studies")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(f"{title} (n = {len(frame)} studies)")
    return _despined(figure)


def loss_history(history: pd.DataFrame, *, title: str = "Pretraining") -> Figure:
    """One axis per loss term, training and validation over epochs; the epoch of the lowest validation total is marked.

    `history` has the columns epoch, train_<term> and valid_<term>, one row an epoch.
    """
    terms = [name.removeprefix("train_") for name in history.columns if name.startswith("train_")]
    if not terms or history.empty:
        raise ValueError("a history needs at least one row and one column train_<term>")
    columns = min(3, len(terms))
    rows = -(-len(terms) // columns)
    figure, axes = new_figure(rows, columns, width=3.6 * columns, height=2.5 * rows + 0.7)
    palette, best = sns.color_palette("colorblind"), None
    if "valid_total" in history and history["valid_total"].notna().any():
        best = history.loc[history["valid_total"].idxmin(), "epoch"]
    for axis, term in zip(axes.flat, terms, strict=False):
        for side, colour, marker in (("train", palette[0], "o"), ("valid", palette[1], "s")):
            if f"{side}_{term}" in history:
                axis.plot(
                    history["epoch"], history[f"{side}_{term}"], color=colour, marker=marker, markersize=3.5, label=side
                )
        if best is not None:
            axis.axvline(best, color="0.6", linestyle=":", label="best validation total")
        axis.set_title(term.replace("_", " "), fontsize=10)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes.flat[len(terms) :]:
        axis.set_axis_off()
    figure.suptitle(f"{title}: loss terms (n = {len(history)} epochs)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _despined(figure)


def auroc_bars(rows: pd.DataFrame, *, title: str = "AUROC", metric: str = "auroc") -> Figure:
    """Bars from chance (0.5) to the value, with intervals, one group a target and one bar an objective.

    `rows`: metric rows (target, metric, value, ci_low, ci_high, n) and, for several bars, a column `objective`. Targets
    keep their order. A value that is not defined is written as such.
    """
    rows = rows[rows["metric"] == metric] if "metric" in rows else rows
    rows = rows if "objective" in rows else rows.assign(objective="")
    targets, objectives = list(dict.fromkeys(rows["target"])), list(dict.fromkeys(rows["objective"]))
    if rows.empty or rows.duplicated(["target", "objective"]).any():
        raise ValueError(f"auroc_bars takes one row per target and objective of metric {metric!r}, and at least one")
    figure, ((axis,),) = new_figure(1, 1, width=8, height=(0.22 * len(objectives) + 0.16) * len(targets) + 1.3)
    thickness = 0.8 / len(objectives)
    for number, objective in enumerate(objectives):
        part = rows[rows["objective"] == objective].set_index("target").reindex(targets)
        place = np.arange(len(targets)) - 0.4 + (number + 0.5) * thickness
        value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
        axis.barh(place, value - 0.5, thickness, left=0.5, color=colour_of(objective), label=objective)
        axis.errorbar(value, place, xerr=reaches(value, low, high), fmt="none", color="black", capsize=2, linewidth=1)
        for y, v, end in zip(place, value, high, strict=True):
            known = np.isfinite(v)
            text = f"{v:.2f}" if known else "not defined"
            axis.text(max(end, v, 0.5) + 0.01 if known else 0.51, y, text, va="center", fontsize=8)
    counts = rows.groupby("target")["n"].max()
    axis.set_yticks(range(len(targets)), [f"{target} (n = {int(counts[target])})" for target in targets])
    axis.invert_yaxis()
    axis.axvline(0.5, color="black", linewidth=1)
    axis.set_xlim(min(0.4, np.nanmin(rows["ci_low"].to_numpy(dtype=float), initial=0.4) - 0.02), 1.08)
    axis.set_xticks(np.arange(0.4, 1.01, 0.1))
    axis.set_xlabel(f"{metric.upper()}, 95 % interval; 0.5 is chance")
    axis.set_title(f"{title} (n = {int(counts.max())} studies)")
    if objectives != [""]:
        figure.legend(loc="outside lower center", ncols=len(objectives), frameon=False)
    return _despined(figure)


def label_efficiency(rows: pd.DataFrame, *, title: str = "Linear probe", target: str = "macro") -> Figure:
    """Value of one target against the label fraction (log axis): mean over seeds, the seeds, and their range as a band.

    `rows`: metric rows of one metric with label_fraction, seed and, for several lines, objective.
    """
    rows = rows[rows["target"] == target]
    rows = rows if "objective" in rows else rows.assign(objective="")
    if rows.empty or rows["metric"].nunique() != 1:
        raise ValueError(f"label_efficiency takes rows of one metric for target {target!r}, and at least one")
    figure, ((axis,),) = new_figure(1, 1, width=6.5, height=4)
    for objective, part in rows.groupby("objective", sort=False):
        by_fraction = part.groupby("label_fraction")["value"]
        mean, colour = by_fraction.mean(), colour_of(objective)
        axis.plot(mean.index, mean, color=colour, marker="o", label=objective or None)
        axis.fill_between(mean.index, by_fraction.min(), by_fraction.max(), color=colour, alpha=0.2, linewidth=0)
        axis.scatter(part["label_fraction"], part["value"], color=colour, s=10, alpha=0.6)
    fractions = sorted(rows["label_fraction"].unique())
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(fractions))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.axhline(0.5, color="0.4", linestyle="--", linewidth=1)
    axis.set_xlabel("share of training labels")
    axis.set_ylabel(f"{rows['metric'].iloc[0].upper()} ({target}); dashed: chance 0.5")
    axis.set_title(f"{title} (n = {int(rows['n'].max())} test studies, {rows['seed'].nunique()} seeds)")
    if set(rows["objective"]) != {""}:
        axis.legend(frameon=False)
    return _despined(figure)


def prompt_similarity(
    values: pd.DataFrame, *, title: str = "Prompts", unit: str = "mean similarity", centre: float | None = None
) -> Figure:
    """Heat map with one row a prompt (index) and one column a finding; every cell is written.

    `centre` makes the colours diverge from that value (0.5 for the AUROC of single prompts, 0 for differences).
    """
    figure, ((axis,),) = new_figure(1, 1, width=0.95 * values.shape[1] + 5.5, height=0.4 * len(values) + 1.8)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if centre is not None:
        reach = max(abs(low - centre), abs(high - centre), 1e-9)
        low, high = centre - reach, centre + reach
    picture = axis.imshow(values, cmap="viridis" if centre is None else "PuOr_r", vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values.to_numpy(dtype=float)):
        shade = np.dot(picture.cmap(picture.norm(value))[:3], (0.299, 0.587, 0.114))
        axis.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="black" if shade > 0.5 else "white"
        )
    axis.set_xticks(range(values.shape[1]), [wrapped(name, 14) for name in values.columns], fontsize=8)
    axis.set_yticks(range(len(values)), [wrapped(name, 44) for name in values.index], fontsize=8)
    figure.colorbar(picture, ax=axis, label=unit)
    axis.set_title(f"{title} (n = {len(values)} prompts)")
    return figure


def wrapped(text: object, width: int) -> str:
    """Text in lines of at most `width` characters; its own line breaks stay."""
    return "\n".join(textwrap.fill(line, width, break_long_words=False) for line in str(text).splitlines())


def _despined(figure: Figure) -> Figure:
    axes: list[Axes] = figure.axes
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
