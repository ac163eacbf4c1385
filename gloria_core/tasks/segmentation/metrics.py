"""Dice and IoU of masks, with their limits said: per image, over images, over pixels, and as the papers' code counts.

What is kept of a prediction is how many of its pixels pass each of a few thresholds, and how many of those lie in the
truth. Every number here follows from these counts: no map has to be kept, and the threshold can be chosen afterwards.
A pixel is predicted where its probability is greater than the threshold.

An image whose truth and prediction are both empty scores 1, one where only the truth is empty 0 (the rule of GLoRIA's
and MGCA's released `get_dice`, of MONAI's `ignore_empty=False` in the first case). On data where most images are empty
the mean over all images is then mostly a number about emptiness: an empty prediction everywhere scores the share of
empty images. So it never stands alone here; beside it stand that share and the mean over images with foreground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gloria_core.tasks.metrics import interval, resamples

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
"""Probabilities a threshold is chosen from: 0.05, 0.10 ... 0.95. Published code has 0.5 always."""
PUBLISHED_THRESHOLD = THRESHOLDS.index(0.5)

Overlap = Literal["dice", "iou"]
EMPTY = "dice_all_empty"
"""Name of the baseline that draws nothing."""


def dice(predicted: np.ndarray, truth: np.ndarray) -> float:
    """2 |P and T| / (|P| + |T|) of two boolean masks of one shape; 1 where both are empty."""
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    total = predicted.sum() + truth.sum()
    return float(2 * (predicted & truth).sum() / total) if total else 1.0


def iou(predicted: np.ndarray, truth: np.ndarray) -> float:
    """|P and T| / |P or T| of two boolean masks of one shape; 1 where both are empty."""
    predicted, truth = np.asarray(predicted, bool), np.asarray(truth, bool)
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


@dataclass(frozen=True)
class MaskCounts:
    """Pixel counts of n predictions of K classes.

    Shape: predicted, overlap (n, K, T): pixels above each of T thresholds, and those of them in the truth;
    truth (n, K): pixels of the truth; known (n, K) bool: where False, no score counts this pair.
    """

    predicted: np.ndarray
    overlap: np.ndarray
    truth: np.ndarray
    known: np.ndarray

    def __post_init__(self) -> None:
        assert self.predicted.shape == self.overlap.shape and self.predicted.shape[:2] == self.truth.shape

    def __len__(self) -> int:
        return len(self.truth)

    def at(self, chosen: Sequence[int]) -> MaskCounts:
        """Counts at one threshold a class (K numbers of `THRESHOLDS`). Shape: (n, K, 1)."""
        index = np.asarray(chosen)[None, :, None]
        pick = [np.take_along_axis(part, np.broadcast_to(index, (*self.truth.shape, 1)), 2) for part in self._pair]
        return MaskCounts(*pick, self.truth, self.known)

    def per_image(self, kind: Overlap = "dice") -> np.ndarray:
        """Dice or IoU of every image and class at every threshold, NaN where not known. Shape: (n, K, T)."""
        both = self.predicted + self.truth[..., None]
        above, below = (2 * self.overlap, both) if kind == "dice" else (self.overlap, both - self.overlap)
        scores = np.divide(above, below, out=np.ones(above.shape), where=below > 0)
        return np.where(self.known[..., None], scores, np.nan)

    def pooled(self) -> np.ndarray:
        """Dice of all pixels of all images as if they were one image; NaN with neither. Shape: (K, T)."""
        above = (2 * self.overlap * self.known[..., None]).sum(axis=0)
        below = ((self.predicted + self.truth[..., None]) * self.known[..., None]).sum(axis=0)
        return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)

    @property
    def _pair(self) -> tuple[np.ndarray, np.ndarray]:
        return self.predicted, self.overlap

    @classmethod
    def joined(cls, parts: Sequence[MaskCounts]) -> MaskCounts:
        """Counts of all images of all parts, in order."""
        return cls(*(np.concatenate([getattr(p, name) for p in parts]) for name in cls.__dataclass_fields__))


def count(probabilities: Tensor, truth: Tensor, known: np.ndarray | None = None) -> MaskCounts:
    """Pixel counts of a batch. Shape: probabilities (b, K, H, W) float, truth (b, K, H, W) bool, known (b, K).

    Raises: ValueError where a probability is not finite.
    """
    assert probabilities.shape == truth.shape
    b, classes = truth.shape[:2]
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("the segmentation network returned NaN or infinite values")
    levels = torch.tensor(THRESHOLDS, dtype=torch.float32, device=probabilities.device)
    # how many thresholds a pixel passes; counting pixels by that number gives all thresholds at once
    passed = torch.bucketize(probabilities.float().contiguous(), levels).view(b * classes, -1)
    bins = len(THRESHOLDS) + 1
    place = passed + bins * torch.arange(b * classes, device=passed.device)[:, None]
    inside = truth.reshape(b * classes, -1)
    found = []
    for chosen in (place.flatten(), place[inside]):
        histogram = torch.bincount(chosen, minlength=b * classes * bins).view(b, classes, bins)
        found.append(histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:].cpu().numpy())
    total = inside.sum(dim=1).view(b, classes).cpu().numpy()
    return MaskCounts(*found, total, np.ones((b, classes), bool) if known is None else np.asarray(known, bool))


def best_thresholds(counts: MaskCounts) -> np.ndarray:
    """For each class the threshold of the highest pooled Dice (of several, the one nearest 0.5). Shape: (K,) int.

    Pooled, because a mean over positive images asks for no care on the others, and a mean over all images is won by
    drawing nothing. A class without a mask has no best threshold and gets 0.5.
    """
    pooled, chosen = counts.pooled(), []
    for values, area in zip(pooled, (counts.truth * counts.known).sum(axis=0), strict=True):
        if not area:
            chosen.append(PUBLISHED_THRESHOLD)
            continue
        ties = np.flatnonzero(values >= np.nanmax(values) - 1e-12)
        chosen.append(int(ties[np.abs(ties - PUBLISHED_THRESHOLD).argmin()]))
    return np.array(chosen)


def published_dice(counts: MaskCounts, *, batch_size: int) -> np.ndarray:
    """Dice as `get_dice` of GLoRIA's and MGCA's code reports it: threshold 0.5, means of batches, their mean. (K,)

    A last batch that is smaller weighs as much as a whole one. Images are batched in their order; pairs that are not
    known are left out first.
    """
    scores = counts.per_image()[..., PUBLISHED_THRESHOLD]
    found = []
    for column in scores.T:
        column = column[~np.isnan(column)]
        batches = [column[first : first + batch_size].mean() for first in range(0, len(column), batch_size)]
        found.append(np.mean(batches) if batches else np.nan)
    return np.array(found)


def segmentation_rows(
    counts: MaskCounts,
    labels: Sequence[str],
    *,
    thresholds: Sequence[int],
    macro: Sequence[str] = (),
    groups: Sequence[object] | None = None,
    batch_size: int = 8,
    notes: Sequence[str] = (),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per label and metric, and `macro`: the mean over the labels named there.

    "dice_positives", "iou_positives": mean over images with foreground. "dice_all", "iou_all": over all images, by the
    rule above. "dice_all_empty": what an empty prediction scores in dice_all. "dice_pooled": all pixels as one image.
    "dice_published": `published_dice`, which has no interval. `thresholds`: K numbers of `THRESHOLDS`, chosen on other
    data. Patients (`groups`) are resampled whole, the same for all labels. `notes` (K,): why a label was not fitted, or
    ""; a label with a note has NaN throughout, and the macro leaves it out.

    `n` is the number of images that count. A label without foreground has NaN for the first two and for pooled.
    Columns: target, metric, value, ci_low, ci_high, n, threshold, note.
    """
    labels, unfit = list(labels), np.array([bool(note) for note in notes] or [False] * len(labels))
    columns, known, foreground = [labels.index(label) for label in macro], counts.known, _foreground(counts)
    sums = _sums(counts.at(thresholds))
    point = {name: _ratio(np.ones((1, len(counts))), *parts)[0] for name, parts in sums.items()}
    drawn = {name: [np.full((0, len(labels)), np.nan)] for name in sums}
    for weights in resamples(len(counts), groups=groups, n_bootstrap=n_bootstrap, seed=seed):
        for name, parts in sums.items():
            drawn[name].append(_ratio(weights, *parts))
    point["dice_published"] = published_dice(counts, batch_size=batch_size)
    drawn["dice_published"] = [np.full((0, len(labels)), np.nan)]
    why, table = dict(zip(labels, notes, strict=False)), []
    for name, values in point.items():
        values = values if name == EMPTY else np.where(unfit, np.nan, values)  # a baseline needs no fit
        asked = foreground if name.endswith("_positives") else known
        table += _rows(name, labels, columns, values, np.concatenate(drawn[name]), asked)
    rows = pd.DataFrame(table, columns=["target", "metric", "value", "ci_low", "ci_high", "n", "note"])
    level = dict(zip(labels, (THRESHOLDS[number] for number in thresholds), strict=True))
    pairs = list(zip(rows["target"], rows["metric"], strict=True))
    rows["threshold"] = [0.5 if m == "dice_published" else level.get(t, np.nan) for t, m in pairs]
    rows["note"] = [(m != EMPTY and why.get(t)) or note for (t, m), note in zip(pairs, rows["note"], strict=True)]
    return rows


def _foreground(counts: MaskCounts) -> np.ndarray:
    """(n, K) bool: images with something to find."""
    return counts.known & (counts.truth > 0)


def _sums(chosen: MaskCounts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each metric what is summed over images above and below the line, (n, K) each; `chosen` has one threshold."""
    known, foreground = chosen.known, _foreground(chosen)
    score = {kind: chosen.per_image(kind)[..., 0] for kind in ("dice", "iou")}
    means = {
        "dice_positives": (score["dice"], foreground),
        "iou_positives": (score["iou"], foreground),
        "dice_all": (score["dice"], known),
        "iou_all": (score["iou"], known),
        EMPTY: (1.0 * (chosen.truth == 0), known),
    }
    sums = {name: (np.where(asked, value, 0.0), 1.0 * asked) for name, (value, asked) in means.items()}
    # with no foreground in any image a pooled Dice could only say that something was drawn
    some = 1.0 * known * foreground.any(axis=0)
    predicted, overlap = chosen.predicted[..., 0], chosen.overlap[..., 0]
    return sums | {"dice_pooled": (2 * overlap * some, (predicted + chosen.truth) * some)}


def _ratio(weights: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Weighted sum of `above` over that of `below`, NaN for nothing. Shape: (b, n), (n, K), (n, K) -> (b, K)."""
    above, below = weights @ above, weights @ below
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _rows(name, labels, macro, point, drawn, asked) -> list[tuple]:
    """Table rows of one metric: K values `point`, resamples `drawn` (b, K), which images count `asked` (n, K)."""
    rows = []
    for column, label in enumerate(labels):
        low, high = interval(drawn[:, column] if np.isfinite(point[column]) else np.array([]))
        n = int(asked[:, column].sum())
        note = "" if np.isfinite(point[column]) else "no image has a mask" if n == 0 else "no foreground"
        rows.append((label, name, float(point[column]), low, high, n, note))
    defined = [column for column in macro if np.isfinite(point[column])]
    if macro:
        low, high = interval(drawn[:, defined].mean(axis=1) if defined else np.array([]))
        value = float(point[defined].mean()) if defined else float("nan")
        note = f"mean over {len(defined)} of {len(macro)} labels"
        rows.append(("macro", name, value, low, high, int(asked[:, macro].any(axis=1).sum()), note))
    return rows
