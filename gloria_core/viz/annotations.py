"""What is marked on radiographs, in one picture: every label a colour, so that overlaps and gaps show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from gloria_core.viz.plots import new_figure, wrapped
from gloria_core.viz.segmentation import outline


def drawn_findings(
    cases: Sequence[tuple[np.ndarray, Mapping[str, np.ndarray], Mapping[str, Sequence[Sequence[float]]], str]],
    *,
    columns: int = 5,
    alpha: float = 0.3,
    title: str = "Marked findings",
) -> Figure:
    """Images with their masks filled and outlined and their boxes as frames; a label has one colour in all of them.

    A case is (image (H, W) uint8, label -> mask (H, W) bool, label -> boxes (x, y, width, height), its title), all in
    pixels of the image.
    `alpha`: how much of a mask's colour covers the image; where masks overlap, both cover it.
    Raises ValueError for no case, or for a mask with other pixels than its image.
    """
    if not len(cases):
        raise ValueError("drawn_findings needs at least one case")
    labels = sorted({label for _, masks, boxes, _ in cases for label in (*masks, *boxes)})
    colours = dict(zip(labels, _palette(len(labels)), strict=True))
    columns = min(columns, len(cases))
    rows = -(-len(cases) // columns)
    width = 2.4 * columns + 0.2
    # a constrained layout makes room for the legend, but lets one that is too wide run over the edges
    across = min(max(int(width / (0.6 + 0.075 * max(map(len, labels), default=1))), 1), 4)
    lines = -(-len(labels) // across)
    figure, axes = new_figure(rows, columns, width=width, height=2.7 * rows + 0.6 + 0.19 * lines)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (image, masks, boxes, name) in zip(axes.flat, cases, strict=False):
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        for label, mask in masks.items():
            outline(axis, mask, colour=colours[label], shape=image.shape)
            axis.imshow(np.where(np.asarray(mask, bool)[..., None], (*colours[label], alpha), 0.0))
        for label, several in boxes.items():
            for x, y, width, height in several:
                axis.add_patch(
                    Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colours[label], lw=1.6)
                )
        axis.set_title(wrapped(name, 30), fontsize=8)
    handles = [Patch(facecolor=(*colours[label], alpha), edgecolor=colours[label], label=label) for label in labels]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=8)
    figure.suptitle(f"{title} (n = {len(cases)})", fontsize=10)
    return figure


def _palette(n: int) -> list[tuple[float, float, float]]:
    """n colours that differ from each other and from gray: the colour-blind ones, while they last."""
    named = [colour for colour in sns.color_palette("colorblind") if max(colour) - min(colour) > 0.05]
    return named[:n] if n <= len(named) else sns.color_palette("husl", n)
