"""Average precision of detected boxes with bootstrap intervals, and the inflated rule of a released evaluation.

AP is COCO's (Lin et al. 2014, https://arxiv.org/abs/1405.0312; cocoapi's `cocoeval.py`). For one class and one IoU
threshold, detections of all images are taken in order of their score. In each image a detection is true if a box of
its class that is still free overlaps it with at least that IoU (the best such box is taken), otherwise false.
Precision is made non-increasing from the right and read off at the 101 recalls 0, 0.01, ..., 1 (0 where a recall is
never reached); AP is the mean of the 101 values. `map_40_75` averages AP over IoU 0.40:0.05:0.75 (the thresholds of
MGCA, Wang et al. 2022, table 3), `map_50_95` over 0.50:0.05:0.95 (COCO's). IoU is continuous: no "+1 pixel".

Every image is scored: in one without boxes every detection is false. A class without any box has no AP (NaN).
Detections of equal score are one operating point, so that the order of the images changes nothing; COCO's code takes
them in the order of the images, and without ties the two are equal.

Intervals are percentile bootstrap over images or patients. The best precision to the right is a maximum, which repeated
images raise: the bootstrap values are a little higher than the value itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torchvision

from gloria_core.tasks.metrics import Statistic, bootstrap_rows

IOUS = tuple(np.round(np.arange(0.40, 0.96, 0.05), 2))
RECALLS = np.linspace(0.0, 1.0, 101)
# Detections that count, in one image and for one class: those of the highest scores (COCO's maxDets).
MAX_DETECTIONS = 100
# Detections with a lower score are dropped by the released evaluation.
PUBLISHED_SCORE = 0.5
# Name -> what is averaged over which IoU thresholds. Recall is that of all detections, whatever their score.
METRICS = {
    "map_40_75": ("ap", IOUS[:8]),
    "map_50_95": ("ap", IOUS[2:]),
    "ap_50": ("ap", (0.5,)),
    "recall_40_75": ("recall", IOUS[:8]),
}
_CELLS = 20_000_000  # numbers in one block of bootstrap weights


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: (n, 4) x1, y1, x2, y2 in pixels, (n,) class numbers, and for detections (n,) scores.

    Raises ValueError where the lengths differ, or for a box that is not finite or has x1 > x2 or y1 > y2.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.boxes.shape != (n, 4) or (self.scores is not None and self.scores.shape != (n,)):
            raise ValueError(f"{n} labels need boxes ({n}, 4) and scores ({n},), got boxes {self.boxes.shape}")
        if not np.isfinite(self.boxes).all() or (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError("a box must be finite with x1 <= x2 and y1 <= y2")

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: np.ndarray) -> "Boxes":
        """The boxes that a mask or row numbers select, in that order."""
        return Boxes(self.boxes[keep], self.labels[keep], None if self.scores is None else self.scores[keep])


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`torchvision.ops.box_iou` of arrays in float64; 0 for two empty boxes. Shape: (n, 4), (m, 4) -> (n, m)"""
    boxes = (torch.from_numpy(np.asarray(part, dtype=float).reshape(-1, 4)) for part in (a, b))
    return torchvision.ops.box_iou(*boxes).nan_to_num(0.0).numpy()


def match(truth: np.ndarray, detected: np.ndarray, ious: Sequence[float] = IOUS) -> np.ndarray:
    """Which detections are true at each IoU threshold: (g, 4) boxes, (d, 4) detections by falling score -> (T, d) bool.

    Greedy, as in COCO's code: each detection takes the free box that it overlaps best, the later one of equals.
    """
    overlap, thresholds = box_iou(detected, truth), np.minimum(np.asarray(ious), 1 - 1e-10)
    true = np.zeros((len(thresholds), len(detected)), bool)
    free = np.ones((len(thresholds), len(truth)), bool)
    rows = np.arange(len(thresholds))
    for d in np.flatnonzero(overlap.max(axis=1, initial=0) >= thresholds.min()):
        candidates = np.where(free & (overlap[d] >= thresholds[:, None]), overlap[d], -1.0)
        best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
        true[:, d] = candidates[rows, best] >= 0
        free[rows[true[:, d]], best[true[:, d]]] = False
    return true


def precision_recall(
    label: int, truths: Sequence[Boxes], detections: Sequence[Boxes], *, merge_ties: bool = True
) -> Statistic:
    """The statistic of one class, matched once: weights of images (b, n) -> AP and recall (b, 2, T).

    `merge_ties`: detections of equal score are one operating point.
    """
    images, scores, true = [], [], []
    n_boxes = np.array([(t.labels == label).sum() for t in truths], float)
    for number, (truth, boxes) in enumerate(zip(truths, detections, strict=True)):
        own = boxes.where(boxes.labels == label)
        own = own.where(np.argsort(-own.scores, kind="stable")[:MAX_DETECTIONS])
        images.append(np.full(len(own), number))
        scores.append(own.scores)
        true.append(match(truth.boxes[truth.labels == label], own.boxes))
    falling = -np.concatenate(scores)
    order = np.argsort(falling, kind="stable")
    falling, images, true = falling[order], np.concatenate(images)[order], np.concatenate(true, axis=1)[:, order]
    # the last detection of the same score: where the operating point of a detection is
    last = np.searchsorted(falling, falling, side="right") - 1 if merge_ties else np.arange(len(order))

    def of_block(weights: np.ndarray) -> np.ndarray:
        positives = weights @ n_boxes
        each = weights[:, images].astype(float)
        called = each.cumsum(axis=1)
        values = np.zeros((len(weights), 2, len(true)))
        for t, true_here in enumerate(true):
            # precision can only rise at a true detection, so that it is read off only there
            places = np.flatnonzero(true_here)
            if not len(places):
                continue
            end = last[places]
            hits = each[:, places].cumsum(axis=1)[:, np.searchsorted(end, end, side="right") - 1]
            with np.errstate(invalid="ignore", divide="ignore"):
                precision, recall = np.nan_to_num(hits / called[:, end]), np.nan_to_num(hits / positives[:, None])
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            levels = np.searchsorted(RECALLS, recall, side="right")
            values[:, 0, t] = (np.diff(levels, axis=1, prepend=0) * precision).sum(axis=1) / len(RECALLS)
            values[:, 1, t] = recall[:, -1]
        values[positives == 0] = np.nan
        return values

    def statistic(weights: np.ndarray) -> np.ndarray:
        size = max(1, _CELLS // max(len(images), 1))
        return np.concatenate([of_block(weights[first : first + size]) for first in range(0, len(weights), size)])

    return statistic


def evaluate(
    truths: Sequence[Boxes],
    detections: Sequence[Boxes],
    labels: Sequence[str],
    *,
    macro: Sequence[str] = (),
    groups: Sequence[object] | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    published: bool = False,
    untrained: Sequence[str] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per class and metric, and a `macro` row: the mean over the classes named in `macro` (default: all).

    truths, detections: one `Boxes` an image, in the same order; class k is `labels[k]`. Images are resampled for the
    95 % interval (whole patients where `groups` gives their ids), and the matches, made once, are counted again; a
    class that a resample lacks is left out of its mean. A class without a box, or one named in `untrained` (its
    detector was trained without a box of it), is NaN, its `note` says why, and the macro leaves it out.

    `published` repeats the released evaluation of MGCA: detections below 0.5 are dropped; then images without any
    detection are left out even when they have boxes, and images without boxes even when they have detections. Misses
    and false alarms disappear with them, so that the number is too high. Metrics get the ending `_published`.

    Columns: target, metric, value, ci_low, ci_high, n (images scored), note, n_boxes, n_found.
    Raises ValueError for lists that do not fit, KeyError for an unknown metric or macro label.
    """
    groups = None if groups is None else np.asarray(groups).astype(str)
    if published:
        detections = [boxes.where(boxes.scores >= PUBLISHED_SCORE) for boxes in detections]
        kept = [i for i, (t, d) in enumerate(zip(truths, detections, strict=True)) if len(t) and len(d)]
        truths, detections = [truths[i] for i in kept], [detections[i] for i in kept]
        groups = None if groups is None else groups[kept]
    n, names = len(truths), [f"{name}_published" if published else name for name in metrics]
    n_boxes, n_found = (
        {label: int(sum((boxes.labels == k).sum() for boxes in images)) for k, label in enumerate(labels)}
        for images in (truths, detections)
    )
    classes, notes = {}, []
    for k, label in enumerate(labels):
        if n_boxes[label] and label not in untrained:
            classes[k] = precision_recall(k, truths, detections, merge_ties=not published)
        missing = "the training subset" if n_boxes[label] else f"{n} images"
        notes.append("" if k in classes else f"no box of this class in {missing}" if n else "no image to score")

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = np.full((len(weights), len(labels), len(names)), np.nan)
        for k, of_class in classes.items():
            parts = dict(zip(("ap", "recall"), np.moveaxis(of_class(weights), 1, 0), strict=True))
            for m, (part, ious) in enumerate(METRICS[name] for name in metrics):
                values[:, k, m] = parts[part][:, np.isin(IOUS, ious)].mean(axis=1)
        return values

    macro = list(macro) or list(labels)
    rows = bootstrap_rows(
        statistic,
        np.ones((n, len(labels))),
        labels,
        names,
        macro=macro,
        notes=notes,
        classes=[np.array([np.isin(range(len(labels)), b.labels) for b in truths], bool).reshape(n, len(labels))],
        groups=groups,
        n_bootstrap=n_bootstrap,
        seed=seed,
        skip_undefined=True,
    )
    counts = {"n_boxes": n_boxes, "n_found": n_found}
    totals = {name: values | {"macro": sum(values[label] for label in macro)} for name, values in counts.items()}
    return rows.assign(**{name: rows["target"].map(values) for name, values in totals.items()})


def image_ap(truths: Sequence[Boxes], detections: Sequence[Boxes], labels: Sequence[str]) -> np.ndarray:
    """AP over IoU 0.40:0.75 of each image by itself, mean over the classes of its boxes; NaN without boxes. (n,)"""
    values = np.full(len(truths), np.nan)
    for image, (truth, boxes) in enumerate(zip(truths, detections, strict=True)):
        if len(truth):
            alone = evaluate([truth], [boxes], labels, metrics=["map_40_75"], n_bootstrap=0)
            values[image] = alone["value"].iloc[-1]
    return values
