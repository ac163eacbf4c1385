"""Average precision of detected boxes, with bootstrap intervals, and the inflated rule of a released evaluation.

AP is COCO's (Lin et al. 2014, https://arxiv.org/abs/1405.0312; cocoapi's `cocoeval.py`). For one class and one IoU
threshold, detections of all images are taken in order of their score. In each image a detection is true if a box of
its class that is still free overlaps it with at least that IoU (the best such box is taken), otherwise false.
Precision is made non-increasing from the right and read off at the 101 recalls 0, 0.01, ..., 1 (0 where a recall is
never reached); AP is the mean of the 101 values. `map_40_75` averages AP over IoU 0.40:0.05:0.75 (the thresholds of
MGCA, Wang et al. 2022, table 3), `map_50_95` over 0.50:0.05:0.95 (COCO's). IoU is continuous: no "+1 pixel".

Every image is scored: one without boxes has nothing to find, and whatever is found in it is false. A class without any
box has no AP (NaN). Detections of equal score are one operating point, so that the order of the images changes
nothing; COCO's code takes them in the order of the images, and without ties the two are equal.

Intervals are percentile bootstrap over images or patients. The best precision to the right is a maximum, and repeated
images lift it: the bootstrap values lie a little higher than the value itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.tasks.metrics import interval, resamples

Rule = Literal["every_image", "published"]

IOUS = tuple(np.round(np.arange(0.40, 0.96, 0.05), 2))
RECALLS = np.linspace(0.0, 1.0, 101)
MOST_DETECTIONS = 100
"""Detections that count, in one image and for one class: the best ones (COCO's maxDets)."""
PUBLISHED_SCORE = 0.5
"""Confidence below which the released evaluation does not look."""

METRICS = {
    "map_40_75": ("ap", IOUS[:8]),
    "map_50_95": ("ap", IOUS[2:]),
    "ap_50": ("ap", (0.5,)),
    "recall_40_75": ("recall", IOUS[:8]),
}
"""Name -> what is averaged over which IoU thresholds. Recall is that of all detections, whatever their score."""

_CELLS = 20_000_000  # numbers in one block of bootstrap weights


@dataclass(frozen=True)
class Boxes:
    """Boxes of one image: (n, 4) x1, y1, x2, y2 in pixels, (n,) class numbers, and for detections (n,) scores."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.labels)
        if self.boxes.shape != (n, 4) or (self.scores is not None and self.scores.shape != (n,)):
            raise ValueError(f"{n} labels need boxes ({n}, 4) and scores ({n},), got boxes {self.boxes.shape}")
        if not np.isfinite(self.boxes).all() or (self.boxes[:, 2:] < self.boxes[:, :2]).any():
            raise ValueError("a box must be finite with x1 <= x2 and y1 <= y2")
        if self.scores is not None and not np.isfinite(self.scores).all():
            raise ValueError("a detection's score must be finite")

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: np.ndarray) -> Boxes:
        """The boxes that a mask or a list of rows names, in that order."""
        return Boxes(self.boxes[keep], self.labels[keep], None if self.scores is None else self.scores[keep])


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair. Shape: (n, 4), (m, 4) x1, y1, x2, y2 -> (n, m); 0 for two empty boxes."""
    a, b = np.asarray(a, float).reshape(-1, 4), np.asarray(b, float).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    inter = sides.clip(min=0).prod(axis=2)
    union = (a[:, 2:] - a[:, :2]).prod(axis=1)[:, None] + (b[:, 2:] - b[:, :2]).prod(axis=1)[None, :] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def match(truth: np.ndarray, found: np.ndarray, ious: Sequence[float] = IOUS) -> np.ndarray:
    """Which detections are true at each IoU threshold: (g, 4) boxes, (d, 4) detections by falling score -> (T, d) bool.

    Greedy, as in COCO's code: each detection takes the free box that it overlaps best, the later one of equals.
    """
    overlap, least = box_iou(found, truth), np.minimum(np.asarray(ious), 1 - 1e-10)
    true = np.zeros((len(least), len(found)), bool)
    free = np.ones((len(least), len(truth)), bool)
    rows = np.arange(len(least))
    for d in np.flatnonzero(overlap.max(axis=1, initial=0) >= least.min()):
        open_to = np.where(free & (overlap[d] >= least[:, None]), overlap[d], -1.0)
        best = open_to.shape[1] - 1 - open_to[:, ::-1].argmax(axis=1)
        true[:, d] = open_to[rows, best] >= 0
        free[rows[true[:, d]], best[true[:, d]]] = False
    return true


class _Class:
    """One class matched once; calling it with (b, n) weights of images gives AP and recall, (b, T) each."""

    def __init__(self, label: int, truths: Sequence[Boxes], found: Sequence[Boxes], *, grouped: bool) -> None:
        images, scores, true = [], [], []
        self.boxes = np.array([(t.labels == label).sum() for t in truths], float)
        for number, (truth, boxes) in enumerate(zip(truths, found, strict=True)):
            own = boxes.where(boxes.labels == label)
            own = own.where(np.argsort(-own.scores, kind="stable")[:MOST_DETECTIONS])
            images.append(np.full(len(own), number))
            scores.append(own.scores)
            true.append(match(truth.boxes[truth.labels == label], own.boxes))
        scores, images = np.concatenate(scores), np.concatenate(images)
        order = np.argsort(-scores, kind="stable")
        self.images, self.true = images[order], np.concatenate(true, axis=1)[:, order]
        places = np.arange(len(order))
        # the last detection of the same score: where the operating point of a detection lies
        ascending = -scores[order]
        self.end = np.searchsorted(ascending, ascending, side="right") - 1 if grouped else places

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = max(1, _CELLS // max(len(self.images), 1))
        parts = [self._block(weights[first : first + rows]) for first in range(0, len(weights), rows)]
        return np.concatenate([ap for ap, _ in parts]), np.concatenate([recall for _, recall in parts])

    def _block(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positives = weights @ self.boxes
        each = weights[:, self.images].astype(float)
        called = each.cumsum(axis=1)
        ap, recall = np.zeros((2, len(weights), len(self.true)))
        for t, true in enumerate(self.true):
            # precision can only rise at a true detection, so all that is read off lies at those
            places = np.flatnonzero(true)
            if not len(places):
                continue
            end = self.end[places]
            hits = each[:, places].cumsum(axis=1)[:, np.searchsorted(end, end, side="right") - 1]
            with np.errstate(invalid="ignore", divide="ignore"):
                precision, reached = np.nan_to_num(hits / called[:, end]), hits / positives[:, None]
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            levels = np.searchsorted(RECALLS, np.nan_to_num(reached), side="right")
            ap[:, t] = (np.diff(levels, axis=1, prepend=0) * precision).sum(axis=1) / len(RECALLS)
            recall[:, t] = np.nan_to_num(reached[:, -1])
        ap[positives == 0], recall[positives == 0] = np.nan, np.nan
        return ap, recall


def _averages(ap: np.ndarray, recall: np.ndarray, metrics: Sequence[str]) -> np.ndarray:
    """(b, T) AP and recall -> (b, number of metrics)."""
    sources = {"ap": ap, "recall": recall}
    return np.stack([sources[kind][:, np.isin(IOUS, ious)].mean(axis=1) for kind, ious in map(METRICS.get, metrics)], 1)


def evaluate(
    truths: Sequence[Boxes],
    found: Sequence[Boxes],
    labels: Sequence[str],
    *,
    macro: Sequence[str] = (),
    groups: Sequence[object] | None = None,
    metrics: Sequence[str] = tuple(METRICS),
    rule: Rule = "every_image",
    untrained: Sequence[str] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per class and metric, and a `macro` row: the mean over the classes named in `macro` (default: all).

    truths, found: one `Boxes` an image, in the same order; class k is `labels[k]`. Images are drawn with replacement
    for the 95 % interval (whole patients where `groups` gives their ids) and the matches, made once, are counted anew;
    a class that a resample lacks is left out of its mean. A class without a box, or one named in `untrained` (its
    detector never saw a box of it), is NaN, its `note` says why, and the macro leaves it out and says so.

    rule="published" repeats the released evaluation of MGCA: detections below 0.5 are dropped; then images without any
    detection are left out even when they hold boxes, and images without boxes even when something is found in them.
    Misses and false alarms vanish with them, so that the number is too high. Metrics get the ending `_published`.

    Columns: target, metric, value, ci_low, ci_high, n (images scored), n_boxes, n_found, note.
    Raises ValueError for lists that do not fit or an unknown rule or metric, KeyError for an unknown macro label.
    """
    _check(truths, found, labels, macro, metrics, rule)
    groups = None if groups is None else np.asarray(groups).astype(str)
    names = list(metrics)
    if rule == "published":
        names = [f"{name}_published" for name in metrics]
        found = [boxes.where(boxes.scores >= PUBLISHED_SCORE) for boxes in found]
        kept = [i for i, (t, f) in enumerate(zip(truths, found, strict=True)) if len(t) and len(f)]
        truths, found = [truths[i] for i in kept], [found[i] for i in kept]
        groups = None if groups is None else groups[kept]
    n, point, drawn = len(truths), *np.full((2, 1, len(labels), len(names)), np.nan)
    classes = [_Class(k, truths, found, grouped=rule == "every_image") for k in range(len(labels))] if n else []
    if n:
        blocks = [np.ones((1, n)), *resamples(n, groups=groups, n_bootstrap=n_bootstrap, seed=seed)]
        values = [np.stack([_averages(*c(weights), metrics) for c in classes], axis=1) for weights in blocks]
        point, drawn = values[0], np.concatenate(values[1:] or [drawn])
    why = {label: _why(k, label, classes, n, untrained) for k, label in enumerate(labels)}
    rows = []
    for k, label in enumerate(labels):
        counts = (int(classes[k].boxes.sum()), len(classes[k].images)) if n else (0, 0)
        for m, name in enumerate(names):
            value, ends = (np.nan, (np.nan, np.nan)) if why[label] else (point[0, k, m], interval(drawn[:, k, m]))
            rows.append((label, name, value, *ends, n, *counts, why[label]))
    asked = [k for k, label in enumerate(labels) if not macro or label in macro]
    return _frame(rows + _macro(rows, names, asked, [labels[k] for k in asked], why, drawn, n))


def _macro(rows, names, asked, asked_labels, why, drawn, n) -> list[tuple]:
    """The macro row of each metric from the class rows and the resamples (b, K, metrics)."""
    table, made = _frame(rows), []
    chosen = [k for k, label in zip(asked, asked_labels, strict=True) if not why[label]]
    for m, name in enumerate(names):
        part = table[(table["metric"] == name) & table["target"].isin(asked_labels)]
        value = part["value"].mean() if chosen else np.nan
        several = drawn[:, chosen, m]
        several = several[~np.isnan(several).all(axis=1)] if chosen else several[:0]
        ends = interval(np.nanmean(several, axis=1) if len(several) else np.array([]))
        note = f"mean over {len(chosen)} of {len(asked)} classes"
        made.append(("macro", name, value, *ends, n, int(part["n_boxes"].sum()), int(part["n_found"].sum()), note))
    return made


def _frame(rows: list[tuple]) -> pd.DataFrame:
    columns = ["target", "metric", "value", "ci_low", "ci_high", "n", "n_boxes", "n_found", "note"]
    return pd.DataFrame(rows, columns=columns)


def _why(k: int, label: str, classes: list[_Class], n: int, untrained: Sequence[str]) -> str:
    if not n:
        return "no image to score"
    if not classes[k].boxes.any():
        return f"no box of this class in {n} images"
    return "no box of this class in the training subset" if label in untrained else ""


def _check(truths, found, labels, macro, metrics, rule) -> None:
    if len(truths) != len(found):
        raise ValueError(f"boxes of {len(truths)} images, detections of {len(found)}")
    for number, boxes in enumerate(found):
        if boxes.scores is None:
            raise ValueError(f"the detections of image {number} have no scores")
    largest = max((int(b.labels.max()) for b in [*truths, *found] if len(b)), default=-1)
    if largest >= len(labels):
        raise ValueError(f"class {largest} has no name among {len(labels)} labels")
    if rule not in ("every_image", "published"):
        raise ValueError(f"rule must be 'every_image' or 'published', not {rule!r}")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; available: {', '.join(METRICS)}")
    for label in macro:
        if label not in labels:
            raise KeyError(f"macro label {label!r} is not among the classes {', '.join(labels)}")


def image_ap(truths: Sequence[Boxes], found: Sequence[Boxes]) -> np.ndarray:
    """AP over IoU 0.40:0.75 of each image by itself, mean over the classes of its boxes; NaN without boxes.

    Shape: (n,)
    """
    values = np.full(len(truths), np.nan)
    for i, (truth, boxes) in enumerate(zip(truths, found, strict=True)):
        own = [_Class(int(k), [truth], [boxes], grouped=True)(np.ones((1, 1))) for k in np.unique(truth.labels)]
        if own:
            values[i] = np.mean([_averages(*pair, ["map_40_75"]) for pair in own])
    return values
