"""Figures of retrieval: recall over the length of the list, and the nearest neighbours of some queries."""

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
    """One row a study: the query, then its nearest in a ranking of `rank_partners`; right ones are ticked and framed.

    `texts` and `images`, (H, W) uint8, are those of all studies. Answers are texts for "image_to_text", and for
    "text_to_image" images, each with its own text. Right is what has the text of the query; of identical texts the
    first is the query. Raises ValueError for no studies.
    """
    if not len(studies):
        raise ValueError("nearest_partners takes at least one study")
    group, from_image, rows = text_groups(texts), direction == "image_to_text", []
    for study in studies:
        same = ranking.queries == study if from_image else group[ranking.queries] == group[study]
        nearest, scores = (table[np.flatnonzero(same)[0]] for table in (ranking.nearest, ranking.scores))
        asked = (f"own report: {texts[study]}", images[study]) if from_image else (texts[study], None)
        rows.append([_Cell("query", *asked)])
        for place, (found, score) in enumerate(zip(nearest, scores, strict=True), start=1):
            right = bool(group[found] == group[study])
            head = f"{place}.  {score:.2f}  {'✓ right' if right else '✗'}"
            rows[-1].append(_Cell(head, texts[found], None if from_image else images[found], right))
    # a cell with an image has its text below, one without is all text
    ratios = [
        (2.1 if any(cell.image is not None for cell in row) else 0.4) + 0.16 * max(len(cell.lines) for cell in row)
        for row in rows
    ]
    columns = len(rows[0])
    figure, axes = new_figure(len(rows) * columns, columns=columns, width=2.3, height=sum(ratios) / len(rows))
    axes[0].get_gridspec().set_height_ratios(ratios)
    for axis, cell in zip(axes, (cell for row in rows for cell in row), strict=True):
        cell.draw(axis)
    right = [cell.right for row in rows for cell in row[1:]]
    known = f"{columns - 1} {'texts' if from_image else 'images'} each, {sum(right)} of {len(right)} right"
    figure.suptitle(f"{title} (n = {len(rows)} queries, {known})", fontsize=11)
    return figure


@dataclass(frozen=True)
class _Cell:
    """A query or an answer: a heading, a text, perhaps an image (H, W), and for an answer whether it is right."""

    head: str
    text: str
    image: np.ndarray | None = None
    right: bool | None = None

    @property
    def lines(self) -> list[str]:
        """The text in lines of 30 characters, cut with an ellipsis after nine."""
        lines = wrapped(self.text, 30).splitlines()
        return lines if len(lines) <= 9 else [*lines[:8], lines[8][:-1] + "…"]

    def draw(self, axis: Axes) -> None:
        """Right and wrong differ by sign, width and colour of the frame."""
        axis.set(xticks=[], yticks=[])
        palette = {None: "black", True: sns.color_palette("colorblind")[2], False: "0.75"}
        for side in axis.spines.values():
            side.set(visible=True, color=palette[self.right], linewidth=3 if self.right else 0.8)
        axis.set_title(self.head, fontsize=9, fontweight="normal" if self.right is False else "bold")
        if self.image is None:
            axis.text(0.03, 0.97, "\n".join(self.lines), fontsize=7.5, va="top", transform=axis.transAxes)
        else:
            show_image(axis, self.image)
            axis.set_xlabel("\n".join(self.lines), fontsize=7.5)
