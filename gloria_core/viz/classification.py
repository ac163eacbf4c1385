"""Figures of decisions: ROC curves, confusion matrices, and whether probabilities are calibrated."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix, roc_curve

from gloria_core.viz.plots import new_figure


def roc_curves(targets: pd.DataFrame, scores: pd.DataFrame, labels: Sequence[str], *, title: str = "ROC") -> Figure:
    """One curve a label, targets 1, 0 or NaN (left out); a label with one class only is named in the legend alone."""
    figure, axis = _unit_square("1 - specificity", "sensitivity", f"{title} (n = {len(targets)})")
    for label, colour in zip(labels, sns.color_palette("colorblind", len(labels)), strict=True):
        known = targets[label].notna().to_numpy() & scores[label].notna().to_numpy()
        y, score = targets[label].to_numpy()[known], scores[label].to_numpy()[known]
        if len(np.unique(y)) < 2:
            axis.plot([], [], color=colour, label=f"{label}: one class only")
            continue
        false, true, _ = roc_curve(y, score)
        axis.plot(false, true, color=colour, label=f"{label} ({int(y.sum())} of {len(y)})")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="positives of known")
    return figure


def confusion(
    targets: pd.DataFrame,
    probabilities: pd.DataFrame,
    thresholds: Mapping[str, float],
    labels: Sequence[str],
    *,
    title: str = "Decisions",
) -> Figure:
    """Counts of truth against decision, one axis a label; "-" for a label without a threshold."""
    figure, axes = new_figure(len(labels), columns=5, width=2.1, height=2.3)
    for axis, label in zip(axes, labels, strict=True):
        threshold = thresholds.get(label, float("nan"))
        if np.isnan(threshold) or probabilities[label].isna().any():
            axis.text(0.5, 0.5, "-", ha="center", va="center", transform=axis.transAxes)
            axis.set_axis_off()
        else:
            known, names = targets[label].notna(), ["absent", "present"]
            truth, called = targets.loc[known, label] == 1, probabilities.loc[known, label] >= threshold
            counts = confusion_matrix(truth, called, labels=[False, True])
            options = {"annot": True, "fmt": "d", "cbar": False, "square": True}
            sns.heatmap(counts, cmap="Blues", ax=axis, xticklabels=names, yticklabels=names, **options)
            axis.tick_params(labelsize=7)
            axis.set_xlabel("decision", fontsize=7)
            axis.set_ylabel("truth", fontsize=7)
        axis.set_title(label, fontsize=8)
    figure.suptitle(f"{title} (n = {len(targets)}; thresholds from validation)", fontsize=10)
    return figure


def reliability_plot(tables: Mapping[str, pd.DataFrame], *, title: str = "Calibration") -> Figure:
    """Observed frequency against predicted probability, a line a name; marker areas grow with the bins' counts.

    `tables`: name -> `decisions.reliability`. A point below the diagonal is over-confident.
    """
    if not tables:
        raise ValueError("a reliability plot needs at least one table")
    figure, axis = _unit_square("mean predicted probability", "observed frequency", title)
    for (name, table), colour in zip(tables.items(), sns.color_palette("colorblind", len(tables)), strict=True):
        axis.plot(table["confidence"], table["frequency"], color=colour, linewidth=1)
        size = 8 + 120 * table["n"] / max(table["n"].max(), 1)
        label = f"{name} (n = {table['n'].sum()})"
        axis.scatter(table["confidence"], table["frequency"], s=size, color=colour, label=label, alpha=0.8)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=0.6)
    return figure


def _unit_square(xlabel: str, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure, (axis,) = new_figure(width=5.6, height=4.2)
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, aspect="equal", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    return figure, axis
