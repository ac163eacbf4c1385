"""Figures of zero-shot classification: how far wording moves a number, and the answer for one radiograph."""

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gloria_core.tasks.single_image import Answer
from gloria_core.viz.attention import draw_map
from gloria_core.viz.plots import colour_of, new_figure, show_image, wrapped


def wording_spread(wording: pd.DataFrame, *, together: pd.Series | None = None, title: str = "Wording") -> Figure:
    """AUROC of every single prompt, one line a finding, the widest spread first; `together`: of all its prompts.

    `wording`: columns label, prompt, auroc (NaN is left out). `together`: AUROC by label. The best and the worst
    prompt of the finding with the widest spread are written out.
    """
    known = wording.dropna(subset="auroc")
    if known.empty:
        raise ValueError("no prompt has an AUROC: every finding has one class only")
    spread = known.groupby("label")["auroc"].agg(["min", "max", "count"])
    spread = spread.loc[(spread["max"] - spread["min"]).sort_values(ascending=False, kind="stable").index]
    places = pd.Series(range(len(spread)), index=spread.index)
    figure, (axis,) = new_figure(width=8.5, height=0.34 * len(spread) + 2.2)
    axis.hlines(places, spread["min"], spread["max"], color="0.7", linewidth=2, zorder=1)
    axis.scatter(known["auroc"], known["label"].map(places), color=colour_of(""), s=28, alpha=0.75, zorder=2)
    if together is not None:
        axis.scatter(together.reindex(spread.index), places, marker="D", color="black", s=34, zorder=3)
    axis.axvline(0.5, color="black", linewidth=1)
    axis.set_yticks(places, [f"{label} ({count} prompts)" for label, count in spread["count"].items()])
    axis.invert_yaxis()
    widest = known[known["label"] == spread.index[0]].sort_values("auroc")
    ends = "".join(f"\n{row.auroc:.2f}: {row.prompt}" for row in (widest.iloc[0], widest.iloc[-1]))
    diamond = "; black: all prompts together" if together is not None else ""
    axis.set_xlabel(f"AUROC of single prompts{diamond}; 0.5 is chance\n{spread.index[0]}, worst and best{ends}")
    axis.set_title(f"{title} (n = {len(known)} prompts)")
    return figure


def answer_figure(answer: Answer, *, title: str = "One radiograph") -> Figure:
    """The image, the map of its first finding beside it where there is one, and a bar for each finding.

    Bars are percentiles among validation studies without the finding, or scores where there was no cohort; findings
    that stand out are dark.
    """
    finding, values = next(iter(answer.maps.items()), ("", None))
    pictures, table = 1 if values is None else 2, answer.table
    figure, axes = new_figure(pictures + 1, width=4.0, height=max(2.8, 0.27 * len(table) + 0.6))
    axes[0].get_gridspec().set_width_ratios([1] * pictures + [1.3])
    for axis in axes[:pictures]:
        show_image(axis, answer.image)
    axes[0].set_title("image" if pictures == 2 else "image (the objective has no map)", fontsize=10)
    if values is not None:
        drawn, meaning = draw_map(axes[1], values, signed=answer.map_kind == "cosine")
        figure.colorbar(drawn, ax=axes[1], shrink=0.6).set_label(meaning, fontsize=8)
        axes[1].set_title(wrapped(finding, 30), fontsize=10)
    _answer_bars(axes[-1], table)
    figure.suptitle(f"{title} (n = 1 image, {len(table)} findings)", fontsize=11)
    return figure


def _answer_bars(axis: Axes, table: pd.DataFrame) -> None:
    ranked = "percentile" in table
    value = table["percentile" if ranked else "score"].fillna(0.0)
    dark = table["stands_out"] if ranked else [False] * len(table)
    axis.barh(range(len(table)), value, color=[sns.color_palette("colorblind")[0] if d else "0.75" for d in dark])
    for place, (_, row) in enumerate(table.iterrows()):
        text = f"{row['score']:.2f}"
        if ranked:
            text = f"{100 * row['probability']:.0f} % ({100 * row['prevalence']:.0f} %)"
            text = text if np.isfinite(row["probability"]) else "- (too few to calibrate)"
        axis.text(max(value.iloc[place], 0) + 0.02, place, text, va="center", fontsize=8)
    axis.set_yticks(range(len(table)), table.index, fontsize=9)
    axis.invert_yaxis()
    if ranked:
        axis.set(xlim=(0, 1.45), xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
        axis.set_xlabel("validation studies without the finding that score lower;\nwritten: probability (prevalence)")
    else:
        axis.set_xlabel("score (no cohort: not comparable)")
