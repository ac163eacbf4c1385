"""Segmentations over radiographs, and how well they do with few labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from gloria_core.viz.plots import colour_of, new_figure, reaches, wrapped

TRUTH, PREDICTION = "#00e5ff", "#ffb000"
"""Outlines: cyan and amber differ in every form of colour blindness, and so do solid and dashed."""


def overlays(
    cases: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, str]]], *, title: str = "Segmentation"
) -> Figure:
    """One row a group ("best", "median", "worst"), one picture a case: truth solid, prediction dashed.

    A case is (image (H, W) uint8, truth (H, W) bool, prediction (H, W) bool, its title). An empty mask has no outline.
    Raises ValueError for no case at all, or where a mask has other pixels than its image.
    """
    columns, shown = max((len(row) for row in cases.values()), default=0), {k: v for k, v in cases.items() if len(v)}
    if not columns:
        raise ValueError("overlays need at least one case")
    figure, axes = new_figure(len(shown), columns, width=2.5 * columns + 0.6, height=2.75 * len(shown) + 0.9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    for row, (group, members) in zip(axes, shown.items(), strict=True):
        row[0].set_ylabel(group, fontsize=10)
        for axis, (image, truth, prediction, name) in zip(row, members, strict=False):
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
            for mask, colour, style in ((truth, TRUTH, "solid"), (prediction, PREDICTION, "dashed")):
                outline(axis, mask, colour=colour, style=style, shape=image.shape)
            axis.set_title(wrapped(name, 30), fontsize=8)
    handles = [
        Line2D([], [], color=TRUTH, label="truth"),
        Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction"),
    ]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=2, facecolor="0.25", labelcolor="white")
    legend.get_frame().set_edgecolor("0.25")
    figure.suptitle(f"{title} (n = {sum(map(len, shown.values()))} of the test images)", fontsize=10)
    return figure


def outline(axis: Axes, mask: np.ndarray, *, colour: str, style: str = "solid", shape: tuple[int, int]) -> None:
    """The border of a mask; where it touches the border of the image, it is drawn there."""
    mask = np.asarray(mask, bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"a mask of {mask.shape} pixels on an image of {tuple(shape)}")
    if mask.any():
        place = np.arange(-1, max(mask.shape) + 1)
        axis.contour(
            np.clip(place[: mask.shape[1] + 2], -0.5, mask.shape[1] - 0.5),
            np.clip(place[: mask.shape[0] + 2], -0.5, mask.shape[0] - 0.5),
            np.pad(mask, 1).astype(float),
            levels=[0.5],
            colors=[colour],
            linestyles=[style],
            linewidths=1.5,
        )


def fit_curves(histories: Mapping[str, pd.DataFrame], *, title: str = "Training") -> Figure:
    """Training loss and validation Dice over steps, one line a fit; the step that was kept is marked.

    Each history has the columns step, train_loss and valid_dice.
    """
    if not histories:
        raise ValueError("fit_curves needs at least one history")
    figure, (axes,) = new_figure(1, 2, width=9, height=3.2)
    palette = sns.color_palette("colorblind", len(histories))
    for (name, history), colour in zip(histories.items(), palette, strict=True):
        for axis, column in zip(axes, ("train_loss", "valid_dice"), strict=True):
            axis.plot(history["step"], history[column], color=colour, marker="o", markersize=3.5, label=name)
        best = history.loc[history["valid_dice"].idxmax()]
        axes[1].scatter(best["step"], best["valid_dice"], s=90, facecolors="none", edgecolors=[colour], zorder=3)
    for axis, text in zip(axes, ("training loss", "pooled Dice on validation; ring: kept"), strict=True):
        axis.set_title(text, fontsize=10)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title} (n = {len(histories)} fits)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def dice_by_fraction(
    rows: pd.DataFrame,
    *,
    metrics: Mapping[str, Mapping[str, str]],
    target: str = "macro",
    objective: str = "",
    title: str = "Segmentation",
) -> Figure:
    """One axis a metric against the label fraction: every subset with its interval, their mean as a line, baselines.

    `rows`: metric rows with label_fraction and seed. `metrics`: metric name -> its baselines, metric name -> how the
    baseline is called. Raises ValueError where a metric has no row.
    """
    figure, (axes,) = new_figure(1, len(metrics), width=4.4 * len(metrics) + 0.6, height=3.8)
    rows = rows[rows["target"] == target]
    styles = ("--", ":", "-.")
    for axis, (metric, baselines) in zip(axes, metrics.items(), strict=True):
        part = rows[rows["metric"] == metric]
        if part.empty:
            raise ValueError(f"no row of metric {metric!r} for target {target!r}")
        # subsets side by side, so that their intervals can be told apart
        shift = 1.06 ** (part["seed"] - part["seed"].mean())
        value, low, high = (part[name].to_numpy(dtype=float) for name in ("value", "ci_low", "ci_high"))
        reach = np.nan_to_num(reaches(value, low, high))
        x = part["label_fraction"] * shift
        axis.errorbar(x, value, yerr=reach, fmt="o", color=colour_of(objective), capsize=2, markersize=4, alpha=0.7)
        mean = part.groupby("label_fraction")["value"].mean()
        axis.plot(mean.index, mean, color=colour_of(objective), label=objective or "network")
        for (name, called), style in zip(baselines.items(), styles, strict=False):
            base = rows[rows["metric"] == name].groupby("label_fraction")["value"].mean()
            axis.plot(base.index, base, color="0.35", linestyle=style, label=called)
        _fraction_axis(axis, sorted(part["label_fraction"].unique()))
        axis.set_ylim(0, 1)
        axis.set_title(metric.replace("_", " "), fontsize=10)
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    n = rows[rows["metric"].isin(metrics)]["n"]
    figure.suptitle(f"{title}, {target} (n = {int(n.max())} test images, {rows['seed'].nunique()} subsets)")
    return figure


def _fraction_axis(axis: Axes, fractions: Sequence[float]) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(list(fractions)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axis.set_xlabel("share of training labels")
    axis.spines[["top", "right"]].set_visible(False)
