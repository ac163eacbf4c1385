"""Figures about decisions: ROC curves, confusion counts, and whether probabilities are calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from gloria_core.viz.plots import colour_of, new_figure


def roc_curves(targets: pd.DataFrame, scores: pd.DataFrame, labels: Sequence[str], *, title: str = "ROC") -> Figure:
    """One curve a label, targets 1, 0 or NaN (left out); a label with one class only is named in the legend alone."""
    figure, ((axis,),) = new_figure(1, 1, width=5.6, height=4.2)
    for label, colour in zip(labels, sns.color_palette("colorblind", len(labels)), strict=True):
        known = targets[label].notna().to_numpy() & scores[label].notna().to_numpy()
        y, score = targets[label].to_numpy()[known], scores[label].to_numpy()[known]
        if len(np.unique(y)) < 2:
            axis.plot([], [], color=colour, label=f"{label}: one class only")
            continue
        false, true, _ = roc_curve(y, score)
        axis.plot(false, true, color=colour, label=f"{label} ({int(y.sum())} of {len(y)})")
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", title=f"{title} (n = {len(targets)})")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="positives of known")
    sns.despine(figure)
    return figure


def confusion(
    targets: pd.DataFrame,
    probabilities: pd.DataFrame,
    thresholds: Mapping[str, float],
    labels: Sequence[str],
    *,
    title: str = "Decisions",
) -> Figure:
    """Counts of truth against decision, one panel a label; the panel of a label without threshold says so."""
    columns = min(5, len(labels))
    rows = -(-len(labels) // columns)
    figure, axes = new_figure(rows, columns, width=1.9 * columns, height=2.1 * rows + 0.4)
    for axis in axes.flat[len(labels) :]:
        axis.set_axis_off()
    for axis, label in zip(axes.flat, labels, strict=False):
        axis.set_title(label, fontsize=8)
        threshold = thresholds.get(label, float("nan"))
        if np.isnan(threshold) or probabilities[label].isna().any():
            axis.text(0.5, 0.5, "no threshold", ha="center", va="center", fontsize=8)
            axis.set_axis_off()
            continue
        known = targets[label].notna().to_numpy()
        called = probabilities[label].to_numpy()[known] >= threshold
        counts = confusion_matrix(targets[label].to_numpy()[known] == 1, called, labels=[False, True])
        names = ["absent", "present"]
        sns.heatmap(counts, annot=True, fmt="d", cmap="Blues", cbar=False, square=True, ax=axis, annot_kws={"size": 8})
        axis.set_xticklabels([f"called {name}" for name in names], fontsize=6, rotation=0)
        axis.set_yticklabels(names, fontsize=6, rotation=90, va="center")
    figure.suptitle(f"{title} (n = {len(targets)}; thresholds from validation)", fontsize=10)
    return figure


def reliability_plot(tables: Mapping[str, pd.DataFrame], *, title: str = "Calibration") -> Figure:
    """Observed frequency against predicted probability, a line a name; marker areas grow with the bins' counts.

    `tables`: name -> `decisions.reliability`. A point below the diagonal is over-confident.
    """
    if not tables:
        raise ValueError("a reliability plot needs at least one table")
    figure, ((axis,),) = new_figure(1, 1, width=5.6, height=4.2)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
    colours = sns.color_palette("colorblind", len(tables)) if len(tables) > 1 else [colour_of("")]
    for (name, table), colour in zip(tables.items(), colours, strict=True):
        axis.plot(table["confidence"], table["frequency"], color=colour, linewidth=1)
        size = 8 + 120 * table["n"] / max(table["n"].max(), 1)
        label = f"{name} (n = {table['n'].sum()})"
        axis.scatter(table["confidence"], table["frequency"], s=size, color=colour, label=label, alpha=0.8)
    axis.set(xlabel="mean predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(-0.02, 1.02))
    axis.set_title(title)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=0.6)
    sns.despine(figure)
    return figure
