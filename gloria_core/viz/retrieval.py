"""Figures of retrieval: recall over the length of the list, and the nearest neighbours of some queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gloria_core.tasks.retrieval import Direction, Ranking, text_groups
from gloria_core.viz.plots import metric_bars, new_figure, show_image, wrapped


def recall_curves(rankings: Mapping[str, Ranking], *, title: str = "Recall") -> Figure:
    """Recall@K over K (log axis) of named rankings, each beside that of a random order, dashed in the same colour."""
    if not rankings:
        raise ValueError("recall_curves takes at least one ranking")
    figure, (axis,) = new_figure(width=6.5, height=4)
    ks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200) if k < max(found.candidates for found in rankings.values())]
    for (name, ranking), colour in zip(rankings.items(), sns.color_palette("colorblind"), strict=False):
        recall, chance = ([of(k).mean() for k in ks] for of in (ranking.recall, ranking.chance_recall))
        axis.plot(ks, recall, color=colour, marker="o", markersize=3.5, label=name.replace("_", " "))
        axis.plot(ks, chance, color=colour, linestyle="--", linewidth=1)
    axis.set(xscale="log", ylim=(0, 1), xlabel="K (dashed: a random order)", ylabel="right one among the first K")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_title(f"{title} (n = {max(len(found.queries) for found in rankings.values())} queries)")
    axis.legend(frameon=False, loc="upper left")
    return figure


def precision_bars(precision: pd.DataFrame, direction: Direction | str, *, title: str) -> Figure:
    """The rows of `precision_table` of one direction, each K beside the others, with chance."""
    return metric_bars(precision[precision["direction"] == direction], by="metric", metric="precision", title=title)


def nearest_partners(
    ranking: Ranking,
    studies: Sequence[int],
    texts: Sequence[str],
    images: Sequence[np.ndarray],
    *,
    direction: Direction,
    title: str = "The nearest, best first",
) -> Figure:
    """`neighbours` of some studies in a ranking of `rank_partners`; texts and images are those of all studies.

    Answers are texts for "image_to_text", and for "text_to_image" images, each with its own text. Right is what has
    the text of the query; of identical texts the first is the query.
    """
    group = text_groups(texts)
    queries, answers = [], []
    for study in studies:
        from_image = direction == "image_to_text"
        same = ranking.queries == study if from_image else group[ranking.queries] == group[study]
        row = np.flatnonzero(same)[0]
        queries.append(Shown(f"own report: {texts[study]}", images[study]) if from_image else Shown(texts[study]))
        answers.append(
            [
                Shown(texts[found], None if from_image else images[found], score, group[found] == group[study])
                for found, score in zip(ranking.nearest[row], ranking.scores[row], strict=True)
            ]
        )
    return neighbours(queries, answers, title=title)


@dataclass(frozen=True)
class Shown:
    """One query or one answer: an image (H, W) uint8, a text, or both.

    For an answer, its `score` and whether it is `right`, which is None for a query, and where nobody knows.
    """

    text: str = ""
    image: np.ndarray | None = None
    score: float | None = None
    right: bool | None = None

    def lines(self, width: int = 30, most: int = 9) -> str:
        """The text wrapped, cut with an ellipsis after `most` lines."""
        lines = wrapped(self.text, width).splitlines()
        return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"])


def neighbours(
    queries: Sequence[Shown], answers: Sequence[Sequence[Shown]], *, title: str = "The nearest, best first"
) -> Figure:
    """One row a query: the query, then its answers. Right answers have a tick and a thick frame.

    Raises ValueError for no queries or rows of different lengths.
    """
    if not queries or len(queries) != len(answers) or len({len(row) for row in answers}) != 1:
        raise ValueError("neighbours takes at least one query, and as many answers for each")
    rows = [[query, *row] for query, row in zip(queries, answers, strict=True)]
    # a cell with an image has its text below, one without is all text
    ratios = [
        (2.1 if any(shown.image is not None for shown in row) else 0.4)
        + 0.16 * max(len(shown.lines().splitlines()) for shown in row)
        for row in rows
    ]
    columns = len(rows[0])
    figure, axes = new_figure(len(rows) * columns, columns=columns, width=2.3, height=sum(ratios) / len(rows))
    axes[0].get_gridspec().set_height_ratios(ratios)
    for axis, (place, shown) in zip(axes, (cell for row in rows for cell in enumerate(row)), strict=True):
        _draw(axis, shown, place)
    known = [shown.right for row in answers for shown in row if shown.right is not None]
    count = f", {sum(known)} of {len(known)} right" if known else ""
    unit = "texts" if all(shown.image is None for row in answers for shown in row) else "images"
    figure.suptitle(f"{title} (n = {len(queries)} queries, {len(answers[0])} {unit} each{count})", fontsize=11)
    return figure


def _draw(axis: Axes, shown: Shown, place: int) -> None:
    """A query (place 0) or the answer at a place; right and wrong differ by sign, width and colour."""
    axis.set(xticks=[], yticks=[])
    colour = "black" if place == 0 else sns.color_palette("colorblind")[2] if shown.right else "0.75"
    for side in axis.spines.values():
        side.set(visible=True, color=colour, linewidth=3 if shown.right else 0.8)
    mark = {None: "", True: "✓ right", False: "✗"}[None if shown.right is None else bool(shown.right)]
    score = "" if shown.score is None else f"{shown.score:.2f}"
    head = "query" if place == 0 else "  ".join(part for part in (f"{place}.", score, mark) if part)
    axis.set_title(head, fontsize=9, fontweight="bold" if shown.right or place == 0 else "normal")
    if shown.image is None:
        axis.text(0.03, 0.97, shown.lines(), fontsize=7.5, va="top", ha="left", transform=axis.transAxes)
    else:
        show_image(axis, shown.image)
        axis.set_xlabel(shown.lines(), fontsize=7.5)
