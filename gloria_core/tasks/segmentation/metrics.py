"""Dice and IoU of masks: per image, over images, over pixels, and as the papers' code reports them.

A prediction is reduced to how many of its pixels pass each of a few thresholds, and how many of those lie in the truth.
Every metric here follows from these counts: no map is stored, and the threshold can be chosen afterwards. A pixel is
predicted where its probability is greater than the threshold.

An image whose truth and prediction are both empty scores 1, one where only the truth is empty 0 (the rule of GLoRIA's
and MGCA's released `get_dice`). On data where most images are empty, the mean over all images then mostly measures
emptiness: an empty prediction everywhere scores the share of empty images. So that share, and the mean over images with
foreground, are always reported with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gloria_core.tasks.metrics import bootstrap_rows, ratio_of_sums

# Probabilities from which a threshold is chosen: 0.05, 0.10 ... 0.95. Published code always has 0.5.
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
PUBLISHED_THRESHOLD = THRESHOLDS.index(0.5)

# Name of the baseline that predicts nothing.
EMPTY = "dice_all_empty"


@dataclass(frozen=True)
class MaskCounts:
    """Pixel counts of n predictions of K classes.

    Attributes:
        predicted: (n, K, T) pixels above each of T thresholds.
        overlap: (n, K, T) those of them that lie in the truth.
        truth: (n, K) pixels of the truth.
        known: (n, K) bool; where False, no score counts this pair.
    """

    predicted: np.ndarray
    overlap: np.ndarray
    truth: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.truth)

    def at(self, chosen: Sequence[int]) -> "MaskCounts":
        """Counts at one threshold a class (K indices into `THRESHOLDS`). Shape: (n, K, 1)."""
        index = np.broadcast_to(np.asarray(chosen)[None, :, None], (*self.truth.shape, 1))
        predicted, overlap = (np.take_along_axis(part, index, 2) for part in (self.predicted, self.overlap))
        return MaskCounts(predicted, overlap, self.truth, self.known)

    def per_image(self, metric: Literal["dice", "iou"] = "dice") -> np.ndarray:
        """Dice or IoU of every image and class at every threshold, NaN where not known. Shape: (n, K, T).

        Dice is 2 |P and T| / (|P| + |T|), IoU is |P and T| / |P or T|; both are 1 where prediction and truth are empty.
        """
        both = self.predicted + self.truth[..., None]
        above, below = (2 * self.overlap, both) if metric == "dice" else (self.overlap, both - self.overlap)
        scores = np.divide(above, below, out=np.ones(above.shape), where=below > 0)
        return np.where(self.known[..., None], scores, np.nan)

    def pooled(self) -> np.ndarray:
        """Dice of all pixels of all images as if they were one image; NaN with neither. Shape: (K, T)."""
        above, below = 2 * self.overlap, self.predicted + self.truth[..., None]
        known = self.known[..., None]
        return ratio_of_sums(above * known, below * known)(np.ones((1, len(self))))[0]

    @classmethod
    def joined(cls, parts: Sequence["MaskCounts"]) -> "MaskCounts":
        """Counts of all images of all parts, in order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def count(
    probabilities: Tensor | np.ndarray, truth: Tensor | np.ndarray, known: np.ndarray | None = None
) -> MaskCounts:
    """Pixel counts of a batch. Shape: probabilities (b, K, H, W) float, truth (b, K, H, W) bool, known (b, K).

    Raises: ValueError where a probability is not finite.
    """
    probabilities, truth = torch.as_tensor(probabilities), torch.as_tensor(truth)
    assert probabilities.shape == truth.shape
    b, classes = truth.shape[:2]
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("the segmentation network returned NaN or infinite values")
    levels = torch.tensor(THRESHOLDS, dtype=torch.float32, device=probabilities.device)
    # how many thresholds a pixel passes; counting pixels by that number gives all thresholds at once
    passed = torch.bucketize(probabilities.float().contiguous(), levels).flatten(2).flatten(0, 1)
    bins = len(THRESHOLDS) + 1
    place = passed + bins * torch.arange(b * classes, device=passed.device)[:, None]
    inside = truth.flatten(2).flatten(0, 1)
    counts = []
    for chosen in (place.flatten(), place[inside]):
        histogram = torch.bincount(chosen, minlength=b * classes * bins).view(b, classes, bins)
        counts.append(histogram.flip(-1).cumsum(-1).flip(-1)[..., 1:].cpu().numpy())
    total = inside.sum(dim=1).view(b, classes).cpu().numpy()
    return MaskCounts(*counts, total, np.ones((b, classes), bool) if known is None else np.asarray(known, bool))


def best_thresholds(counts: MaskCounts) -> np.ndarray:
    """For each class the threshold of the highest pooled Dice (of several, the one nearest 0.5). Shape: (K,) int.

    Pooled, because a mean over positive images demands no care on the others, and a mean over all images is best for a
    prediction of nothing. A class without a mask has no best threshold and gets 0.5.
    """
    chosen = np.full(counts.truth.shape[1], PUBLISHED_THRESHOLD)
    for k, values in enumerate(counts.pooled()):
        if counts.truth[counts.known[:, k], k].any():
            ties = np.flatnonzero(values >= np.nanmax(values) - 1e-12)
            chosen[k] = ties[np.abs(ties - PUBLISHED_THRESHOLD).argmin()]
    return chosen


def published_dice(counts: MaskCounts, *, batch_size: int) -> np.ndarray:
    """Dice as `get_dice` of GLoRIA's and MGCA's code reports it: threshold 0.5, means of batches, their mean. (K,)

    A last batch that is smaller weighs as much as a whole one. Images are batched in their order; pairs that are not
    known are left out first.
    """
    values = []
    for column in counts.per_image()[..., PUBLISHED_THRESHOLD].T:
        column = column[~np.isnan(column)]
        batches = [column[first : first + batch_size].mean() for first in range(0, len(column), batch_size)]
        values.append(np.mean(batches) if batches else np.nan)
    return np.array(values)


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
    """One row per label and metric with 95 % interval, and `macro`; see `metrics.bootstrap_rows`.

    "dice_positives", "iou_positives": mean over images with foreground. "dice_all", "iou_all": over all images, by the
    rule above. "dice_all_empty": what an empty prediction scores in dice_all. "dice_pooled": all pixels as one image.
    "dice_published": `published_dice`, without interval. `thresholds`: K indices into `THRESHOLDS`, chosen on other
    data. `notes` (K,): why a label was not fitted, or ""; a label with a note has NaN, except in dice_all_empty.

    `n` is the number of images that count. A label without foreground has NaN for the first two and for pooled.
    Columns: target, metric, value, ci_low, ci_high, n, note, threshold.
    """
    labels, notes = list(labels), np.array(list(notes) or [""] * len(labels), dtype=object)
    chosen, known, foreground = counts.at(thresholds), counts.known, counts.known & (counts.truth > 0)
    dice_of, iou_of = (chosen.per_image(metric)[..., 0] for metric in ("dice", "iou"))

    def mean(values: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.where(images, values, 0.0), images, images

    # without foreground in any image a pooled Dice could only say that something was predicted
    pooled = known & foreground.any(axis=0)
    both = (chosen.predicted[..., 0] + counts.truth) * pooled
    sums = {  # metric -> what is summed over images above and below the line, and which images count
        "dice_positives": mean(dice_of, foreground),
        "iou_positives": mean(iou_of, foreground),
        "dice_all": mean(dice_of, known),
        "iou_all": mean(iou_of, known),
        EMPTY: mean(counts.truth == 0, known),
        "dice_pooled": (2 * chosen.overlap[..., 0] * pooled, both, known),
    }
    above, below, counted = (np.stack(part, axis=2) for part in zip(*sums.values(), strict=True))
    scored = (notes == "")[:, None] | (np.array(list(sums)) == EMPTY)  # a baseline needs no fit
    below = below * scored
    missing = np.where(counted.any(axis=0), "no foreground", "no image has a mask")
    why = np.where(scored, np.where(below.any(axis=0), "", missing), notes[:, None])
    options = {"macro": macro, "groups": groups, "seed": seed}
    rows = bootstrap_rows(
        ratio_of_sums(above, below), counted, labels, list(sums), notes=why, n_bootstrap=n_bootstrap, **options
    )
    values = np.where(notes == "", published_dice(counts, batch_size=batch_size), np.nan)
    why = np.where(notes == "", np.where(known.any(axis=0), "", "no image has a mask"), notes)
    published = bootstrap_rows(
        lambda weights: values[None, :, None], known, labels, ["dice_published"], notes=why, n_bootstrap=0, **options
    )
    level = dict(zip(labels, (THRESHOLDS[index] for index in thresholds), strict=True))
    rows = pd.concat([rows.assign(threshold=rows["target"].map(level)), published.assign(threshold=0.5)])
    return rows.reset_index(drop=True)
