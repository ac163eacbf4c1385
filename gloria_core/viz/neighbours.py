"""The nearest neighbours of a search, shown: images as thumbnails, reports as text, the right ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gloria_core.viz.plots import new_figure, wrapped

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
