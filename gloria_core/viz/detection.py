"""Figures of detection: boxes on radiographs, and average precision by class and by label fraction.

Truth is a solid light line, a detection a dashed line with its score; a class has one colour in the whole figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from gloria_core.viz.plots import colour_of, new_figure, reaches, wrapped


class BoxesLike(Protocol):
    """(n, 4) x1, y1, x2, y2 in pixels of the image, (n,) classes, and (n,) scores or None."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None


def iou_pair(a: Sequence[float], b: Sequence[float], *, value: float) -> Figure:
    """Two boxes (x1, y1, x2, y2), their common part shaded, and their IoU in the title."""
    figure, ((axis,),) = new_figure(1, 1, width=4, height=3.2)
    for box, colour, name in ((a, colour_of("gloria"), "a"), (b, colour_of("convirt"), "b")):
        _draw(axis, box, colour, style="-", text=name)
    common = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    if common[2] > common[0] and common[3] > common[1]:
        axis.add_patch(Rectangle(common[:2], common[2] - common[0], common[3] - common[1], color="0.8", zorder=0))
    low, high = np.minimum(a, b)[:2] - 4, np.maximum(a, b)[2:] + 4
    axis.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal", title=f"IoU of a and b: {value:.2f}")
    return figure


def box_cases(
    images: Sequence[np.ndarray],
    truths: Sequence[BoxesLike],
    found: Sequence[BoxesLike],
    labels: Sequence[str],
    titles: Sequence[str],
    *,
    least_score: float = 0.3,
    title: str = "Boxes",
    columns: int = 3,
) -> Figure:
    """Images (H, W) with true boxes (solid) and detections of at least `least_score` (dashed, with score).

    What is below `least_score` was scored but is not drawn; how many there are is written under each image.
    """
    if not len({len(images), len(truths), len(found), len(titles)}) == 1 or not len(images):
        raise ValueError("box_cases takes as many images as truths, detections and titles, and at least one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = new_figure(rows, columns, width=3.1 * columns, height=3.6 * rows + 0.8)
    there = sorted(
        {int(k) for t, f in zip(truths, found, strict=True) for k in [*t.labels, *_shown(f, least_score)[1]]}
    )
    palette = sns.color_palette("bright", max(len(there), 1))
    colours = dict(zip(there, palette, strict=False))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image, truth, boxes, text in zip(axes.flat, images, truths, found, titles, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        for box, label in zip(truth.boxes, truth.labels, strict=True):
            _draw(axis, box, colours[int(label)], style="-")
        drawn = list(zip(*_shown(boxes, least_score), strict=True))
        for box, label, score in drawn:
            _draw(axis, box, colours[int(label)], style="--", text=f"{score:.2f}")
        axis.set_title(wrapped(text, 34), fontsize=8)
        faint = len(boxes.labels) - len(drawn)
        axis.text(
            0.5, -0.02, f"{faint} below {least_score:g}", transform=axis.transAxes, ha="center", va="top", fontsize=7
        )
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=colours[k], linewidth=2, label=labels[k]) for k in there]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{title} (n = {len(images)}; solid: truth, dashed: detected with its score)", fontsize=10)
    return figure


def ap_by_fraction(
    rows: pd.DataFrame,
    baselines: Mapping[str, float] | None = None,
    *,
    metric: str = "map_40_75",
    target: str = "macro",
) -> Figure:
    """AP of one target against the label fraction (log axis): every seed with its interval, their mean as a line.

    `rows`: metric rows with label_fraction, seed and, for several lines, objective. `baselines`: name -> a dashed line.
    """
    rows = rows[(rows["metric"] == metric) & (rows["target"] == target)]
    rows = rows if "objective" in rows else rows.assign(objective="")
    if rows.empty:
        raise ValueError(f"ap_by_fraction takes rows of metric {metric!r} for target {target!r}, and at least one")
    figure, ((axis,),) = new_figure(1, 1, width=6.5, height=4)
    for number, (objective, part) in enumerate(rows.groupby("objective", sort=False)):
        mean, colour = part.groupby("label_fraction")["value"].mean(), colour_of(objective)
        axis.plot(mean.index, mean, color=colour, label=objective or None)
        turn = (
            part.groupby("label_fraction").cumcount()
            - (part.groupby("label_fraction")["seed"].transform("size") - 1) / 2
        )
        place = part["label_fraction"] * 1.06 ** (turn + 0.3 * number)
        away = reaches(*(part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high")))
        axis.errorbar(place, part["value"], yerr=away, fmt="o", color=colour, capsize=2, markersize=4, linewidth=1)
    for (name, value), dash in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        axis.axhline(value, color="0.4", linestyle=dash, linewidth=1, label=f"{name} ({value:.3f})")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(sorted(rows["label_fraction"].unique())))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set(xlabel="share of training labels", ylabel=f"{metric} ({target}), 95 % intervals", ylim=(-0.01, None))
    axis.set_title(f"Detection (n = {int(rows['n'].max())} test images, {rows['seed'].nunique()} seeds)")
    axis.legend(frameon=False, fontsize=8)
    return _despined(figure)


def ap_bars(rows: pd.DataFrame, *, metric: str = "map_40_75", title: str = "Average precision") -> Figure:
    """One group of bars a class, one bar an objective, with intervals; the number of true boxes stands at the class.

    `rows`: metric rows with n_boxes and, for several bars, objective. A value that is not defined is written as such.
    """
    rows = rows[rows["metric"] == metric]
    rows = rows if "objective" in rows else rows.assign(objective="")
    targets, objectives = list(dict.fromkeys(rows["target"])), list(dict.fromkeys(rows["objective"]))
    if rows.empty or rows.duplicated(["target", "objective"]).any():
        raise ValueError(f"ap_bars takes one row per target and objective of metric {metric!r}, and at least one")
    figure, ((axis,),) = new_figure(1, 1, width=8, height=(0.22 * len(objectives) + 0.14) * len(targets) + 1.3)
    thickness = 0.8 / len(objectives)
    for number, objective in enumerate(objectives):
        part = rows[rows["objective"] == objective].set_index("target").reindex(targets)
        place = np.arange(len(targets)) - 0.4 + (number + 0.5) * thickness
        value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
        axis.barh(place, np.nan_to_num(value), thickness, color=_colour(objective), label=objective)
        axis.errorbar(value, place, xerr=reaches(value, low, high), fmt="none", color="black", capsize=2, linewidth=1)
        for y, v, end in zip(place, value, high, strict=True):
            text = f"{v:.2f}" if np.isfinite(v) else "not defined"
            axis.text((end if np.isfinite(end) else 0) + 0.01, y, text, va="center", fontsize=8)
    counts = rows.groupby("target")["n_boxes"].max()
    axis.set_yticks(range(len(targets)), [f"{target} ({int(counts[target])} boxes)" for target in targets])
    axis.set_ylim(len(targets) - 0.4, -0.6)
    axis.set(xlim=(0, 1.08), xlabel=f"{metric}, 95 % interval")
    axis.set_title(f"{title} (n = {int(rows['n'].max())} images)")
    if objectives != [""]:
        figure.legend(loc="outside lower center", ncols=len(objectives), frameon=False)
    return _despined(figure)


def _colour(objective: str) -> tuple:
    return {"empty": (0.85,) * 3, "centre_prior": (0.6,) * 3}.get(objective, colour_of(objective))


def _shown(boxes: BoxesLike, least_score: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keep = boxes.scores >= least_score
    return boxes.boxes[keep], boxes.labels[keep], boxes.scores[keep]


def _draw(axis: Axes, box: Sequence[float], colour, *, style: str, text: str = "") -> None:
    x1, y1, x2, y2 = (float(value) for value in box)
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6))
    if text:
        plate = {"facecolor": "black", "alpha": 0.6, "pad": 0.8, "edgecolor": "none"}
        axis.text(x1 + 1, y1 + 1, text, color="white", fontsize=7, va="top", bbox=plate)


def _despined(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
