"""Figures of zero-shot classification: how far wording moves a number, and the answer for one radiograph."""

from __future__ import annotations

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from gloria_core.viz.plots import colour_of, new_figure, wrapped


def wording_spread(wording: pd.DataFrame, *, together: pd.Series | None = None, title: str = "Wording") -> Figure:
    """AUROC of every single prompt, one line a finding, the widest spread first; `together`: of all its prompts.

    `wording`: columns label, prompt, auroc (NaN is left out). `together`: AUROC by label. The best and the worst
    prompt of the finding with the widest spread are written out.
    """
    known = wording.dropna(subset="auroc")
    if known.empty:
        raise ValueError("no prompt has an AUROC: every finding has one class only")
    spread = known.groupby("label")["auroc"].agg(["min", "max"])
    order = (spread["max"] - spread["min"]).sort_values(ascending=False, kind="stable").index
    figure, ((axis,),) = new_figure(1, 1, width=8.5, height=0.34 * len(order) + 2.2)
    for place, label in enumerate(order):
        values = known.loc[known["label"] == label, "auroc"]
        axis.plot([values.min(), values.max()], [place, place], color="0.7", linewidth=2, zorder=1)
        axis.scatter(values, np.full(len(values), place), color=colour_of(""), s=28, alpha=0.75, zorder=2)
        if together is not None and np.isfinite(together.get(label, np.nan)):
            axis.scatter(together[label], place, marker="D", color="black", s=34, zorder=3)
    first = known[known["label"] == order[0]].sort_values("auroc")
    ends = [f"{row.auroc:.2f}: {row.prompt}" for row in (first.iloc[0], first.iloc[-1])]
    axis.axvline(0.5, color="black", linewidth=1)
    axis.set_yticks(range(len(order)), [f"{label} ({(known['label'] == label).sum()} prompts)" for label in order])
    axis.invert_yaxis()
    diamond = "; black: all prompts together" if together is not None else ""
    axis.set_xlabel(f"AUROC of single prompts{diamond}; 0.5 is chance\n{order[0]}, worst and best\n" + "\n".join(ends))
    axis.set_title(f"{title} (n = {len(known)} prompts)")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def answer_figure(
    image: np.ndarray,
    table: pd.DataFrame,
    *,
    values: np.ndarray | None = None,
    finding: str = "",
    signed: bool = True,
    title: str = "One radiograph",
) -> Figure:
    """The image, the map of one finding beside it where there is one, and a bar for each finding.

    image: (H, W) uint8; values: (H, W), NaN outside what the model saw. table: `Answer.table`. Bars are percentiles
    among validation studies without the finding, or scores where there was no cohort; findings that stand out are dark.
    Raises ValueError for a map of another size.
    """
    if values is not None and np.shape(values) != image.shape:
        raise ValueError(f"the map has {np.shape(values)} pixels, the image {image.shape}")
    pictures = 1 if values is None else 2
    figure, (axes,) = new_figure(1, pictures + 1, width=3.2 * pictures + 5.2, height=max(3.4, 0.27 * len(table) + 1.2))
    axes[0].get_gridspec().set_width_ratios([1] * pictures + [1.3])
    for axis in axes[:pictures]:
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    axes[0].set_title("image", fontsize=10)
    if values is None:
        axes[0].set_title("image (the objective has no map)", fontsize=10)
    else:
        high = float(np.nanmax(np.abs(values))) or 1.0
        limits = (-high, high) if signed else (float(np.nanmin(values)), float(np.nanmax(values)))
        drawn = axes[1].imshow(
            np.ma.masked_invalid(values),
            cmap="PuOr_r" if signed else "viridis",
            vmin=limits[0],
            vmax=limits[1],
            alpha=0.5,
        )
        figure.colorbar(drawn, ax=axes[1], shrink=0.6, label="cosine" if signed else "weight")
        axes[1].set_title(wrapped(finding, 30), fontsize=10)
    _bars(axes[-1], table)
    figure.suptitle(f"{title} (n = 1 image, {len(table)} findings)", fontsize=11)
    return figure


def _bars(axis, table: pd.DataFrame) -> None:
    ranked = "percentile" in table
    value = table["percentile" if ranked else "score"].to_numpy(dtype=float)
    dark = table["stands_out"].to_numpy(dtype=bool) if ranked else np.zeros(len(table), dtype=bool)
    strong, pale = sns.color_palette("colorblind")[0], "0.75"
    axis.barh(np.arange(len(table)), np.nan_to_num(value), color=[strong if d else pale for d in dark])
    for place, row in enumerate(table.to_dict("records")):
        text = _percent(row) if ranked else f"{row['score']:.2f}"
        axis.text(max(np.nan_to_num(value[place]), 0) + 0.02, place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(table)), table.index, fontsize=9)
    axis.invert_yaxis()
    if ranked:
        axis.set_xlim(0, 1.45)
        axis.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axis.set_xlabel("validation studies without the finding that score lower;\nwritten: probability (prevalence)")
    else:
        axis.set_xlabel("score (no cohort: not comparable)")
    axis.spines[["top", "right"]].set_visible(False)


def _percent(row: dict) -> str:
    if not np.isfinite(row["probability"]):
        return "too few to calibrate"
    return f"{100 * row['probability']:.0f} % ({100 * row['prevalence']:.0f} %)"
