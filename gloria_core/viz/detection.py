"""Figures of detection: the overlap of two boxes, and boxes on radiographs."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gloria_core.viz.plots import Mark, colour_of, image_grid, new_figure


class BoxesLike(Protocol):
    """(n, 4) x1, y1, x2, y2 in pixels of the image, (n,) classes, and (n,) scores or None."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None


def iou_pair(a: Sequence[float], b: Sequence[float], *, value: float) -> Figure:
    """Two boxes (x1, y1, x2, y2), their intersection shaded, and their IoU in the title."""
    figure, (axis,) = new_figure(width=4, height=3.2)
    for (x1, y1, x2, y2), objective, name in ((a, "gloria", "a"), (b, "convirt", "b")):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour_of(objective), linewidth=1.6))
        axis.text(x1 + 1, y1 + 1, name, color=colour_of(objective), fontsize=10, va="top")
    left, top = np.maximum(a, b)[:2]
    wide, high = np.minimum(a, b)[2:] - (left, top)
    if wide > 0 and high > 0:
        axis.add_patch(Rectangle((left, top), wide, high, color="0.8", zorder=0))
    low, end = np.minimum(a, b)[:2] - 4, np.maximum(a, b)[2:] + 4
    axis.set(xlim=(low[0], end[0]), ylim=(end[1], low[1]), aspect="equal", title=f"IoU of a and b: {value:.2f}")
    return figure


def box_cases(
    cases: Mapping[str, Sequence[tuple[np.ndarray, BoxesLike, BoxesLike, str]]],
    labels: Sequence[str],
    *,
    score_threshold: float = 0.3,
    title: str = "Boxes",
    columns: int = 3,
) -> Figure:
    """Images with true boxes (solid) and detections of at least `score_threshold` (dashed, with their scores).

    `cases`: group ("best") -> image (H, W), truth, detections and title of each. How many detections lie below the
    threshold is written in the title of each image. Raises ValueError for no image.
    """
    images, texts, marks = [], [], []
    for group, members in cases.items():
        for image, truth, found, text in members:
            shown = found.scores >= score_threshold
            boxes = [(box, label, "") for box, label in zip(truth.boxes, truth.labels, strict=True)]
            for box, label, score in zip(found.boxes[shown], found.labels[shown], found.scores[shown], strict=True):
                boxes.append((box, label, f"{score:.2f}"))
            marks.append(
                [
                    Mark(labels[int(label)], box=(x1, y1, x2 - x1, y2 - y1), dashed=bool(score), text=score)
                    for (x1, y1, x2, y2), label, score in boxes
                ]
            )
            images.append(image)
            texts.append(f"{group}: {text}\n{(~shown).sum()} below {score_threshold:g}")
    title = f"{title}; solid: truth, dashed: detected with its score"
    return image_grid(images, texts, marks, columns=columns, side=3.1, title=title)
