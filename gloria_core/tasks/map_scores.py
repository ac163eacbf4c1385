"""How well a map agrees with a known region: four scores of one map and one mask, each with its limits.

All take a map (H, W) of floats and a mask (H, W) of booleans on the same pixels. Pixels where the map is NaN lie
outside what the model saw; they are left out of map and mask alike. An empty mask, or one that covers every pixel
seen, has no inside or no outside: the score is NaN. No sign is assumed anywhere: a map that is dark on the finding
scores below chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
CONSTANT = 1e-6
"""A map whose values differ by less than this share of the largest one is constant: float32 carries no more."""


def cnr(values: np.ndarray, mask: np.ndarray) -> float:
    """Contrast-to-noise ratio (mean inside - mean outside) / sqrt(variance inside + variance outside), signed.

    BioViL (Boecking et al. 2022, section 4.2) takes the absolute difference, so that an inverted map scores as well as
    an upright one; here the sign stays. Variances are population variances. A map that is constant has no contrast: 0.
    Two different constants, one inside and one outside: plus or minus infinity.
    """
    inside, outside = _split(values, mask)
    if not len(inside) or not len(outside):
        return float("nan")
    difference = inside.mean() - outside.mean()
    noise = np.sqrt(inside.var() + outside.var())
    if noise <= 1e-12 * np.abs([inside.mean(), outside.mean()]).max():
        return 0.0 if difference == 0 else float(np.copysign(np.inf, difference))
    return float(difference / noise)


def pointing_hit(values: np.ndarray, mask: np.ndarray) -> float:
    """Pointing game: 1 if the highest pixel lies in the mask, else 0 (Zhang et al. 2018, without their tolerance).

    Several highest pixels: the share of them in the mask, what picking one at random gives on average. So a constant
    map scores its chance level, the share of the pixels seen that the mask covers (`area_share`).
    """
    inside, outside = _split(values, mask)
    if not len(inside) or not len(outside):
        return float("nan")
    highest = max(inside.max(), outside.max())
    hits, misses = int((inside == highest).sum()), int((outside == highest).sum())
    return hits / (hits + misses)


def mass_inside(values: np.ndarray, mask: np.ndarray) -> float:
    """Share of the map's positive part that lies in the mask; NaN where no pixel is positive.

    Meant for maps that are weights (attention). A constant positive map scores the area share.
    """
    inside, outside = (np.clip(part, 0, None) for part in _split(values, mask))
    total = inside.sum() + outside.sum()
    if not len(inside) or not len(outside) or total <= 0:
        return float("nan")
    return float(inside.sum() / total)


def iou(values: np.ndarray, mask: np.ndarray, thresholds: Sequence[float] = IOU_THRESHOLDS) -> np.ndarray:
    """Intersection over union of {map >= threshold} and the mask, one value a threshold.

    The map is first stretched to 0..1 over the pixels seen, so that maps of any scale can be compared; its mean over
    0.1 .. 0.5 is the mIoU of BioViL's tables, there on cosine values without the stretch. A constant map is 1
    everywhere, so that it calls every pixel and scores the area share.
    """
    inside, outside = _split(values, mask)
    if not len(inside) or not len(outside):
        return np.full(len(thresholds), np.nan)
    low = min(inside.min(), outside.min())
    reach = max(inside.max(), outside.max()) - low
    inside, outside = ((part - low) / reach if reach > 0 else np.ones_like(part) for part in (inside, outside))
    hits = np.array([(inside >= t).sum() for t in thresholds])
    false = np.array([(outside >= t).sum() for t in thresholds])
    return hits / (len(inside) + false)


def area_share(values: np.ndarray, mask: np.ndarray) -> float:
    """Share of the pixels seen that the mask covers: the chance level of the pointing game."""
    inside, outside = _split(values, mask)
    return len(inside) / (len(inside) + len(outside)) if len(inside) + len(outside) else float("nan")


def inverted(values: np.ndarray) -> np.ndarray:
    """The map upside down within its own range (highest + lowest - map): the CNR changes sign, the range does not."""
    if np.isnan(values).all():
        return values.copy()
    return np.nanmax(values) + np.nanmin(values) - values


def centre_prior(height: int, width: int, *, sigma: float = 0.25) -> np.ndarray:
    """A Gaussian at the centre of the (height, width) pixels seen; `sigma` as a share of each side."""
    # whole numbers before the division keep the two halves equal to the last bit, and the peak a true tie
    rows, columns = ((2 * np.arange(side) + 1 - side) / (2 * side) for side in (height, width))
    return np.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * sigma**2))


def _split(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, mask = np.asarray(values, dtype=np.float64), np.asarray(mask)
    if values.shape != mask.shape:
        raise ValueError(f"map {values.shape} and mask {mask.shape} must have the same pixels")
    if mask.dtype != bool:
        raise ValueError(f"a mask is boolean, not {mask.dtype}")
    seen = ~np.isnan(values)
    known = values[seen]
    # float32 maps that are constant come with rounding noise, which has a highest pixel and a contrast like any signal
    if len(known) and np.ptp(known) <= CONSTANT * np.abs(known).max():
        known = np.full_like(known, known[0])
    return known[mask[seen]], known[~mask[seen]]
