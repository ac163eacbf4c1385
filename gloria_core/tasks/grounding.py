"""How well the words of a report find the region they name, and how well anything else would.

A map is evidence only beside its controls: upside down, for another study's words, with left and right exchanged, a
Gaussian at the centre, and a constant. `score_phrases` computes them all.

How well a map agrees with a known region: four scores of one map and one mask, each with its limits.

All take a map (H, W) of floats and a mask (H, W) of booleans on the same pixels. Pixels where the map is NaN lie
outside what the model saw; they are left out of map and mask alike. An empty mask, or one that covers every pixel
seen, has no inside or no outside: the score is NaN. No sign is assumed anywhere: a map that is dark on the finding
scores below chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from gloria_core.tasks.features import Progress, image_batches
from gloria_core.tasks.maps import (
    Kind,
    phrase_grids,
    upsample,
)
from gloria_core.tasks.metrics import interval, resamples
from gloria_core.tasks.phrases import Phrase, another_text, region, seen, swap_sides
from gloria_core.training.precision import Precision

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


SCORES = ("cnr", "pointing_game", "mass_inside", "miou", "mdice")


def score_map(values: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """The scores of one pixel map: cnr, pointing_game, mass_inside, miou, mdice. See `map_scores` for each.

    "mdice" is the mean Dice, 2 IoU / (1 + IoU), over the thresholds of "miou".
    """
    overlap = iou(values, mask)
    return {
        "cnr": cnr(values, mask),
        "pointing_game": pointing_hit(values, mask),
        "mass_inside": mass_inside(values, mask),
        "miou": float(overlap.mean()),
        "mdice": float((2 * overlap / (1 + overlap)).mean()),
    }


def score_phrases(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    root: Path | str,
    phrases: Sequence[Phrase],
    *,
    kinds: Sequence[Kind] | None = None,
    batch_size: int = 32,
    precision: Precision = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per phrase, kind (default: all that the model has) and control, in the pixels of the model's crop.

    Controls: "" the map itself; "inverted"; "shuffled_text" (a phrase of another label from another study, drawn with
    `seed`); "swapped_side" (only for phrases that name a side); and, with kind "prior", "centre" and "uniform".
    Columns: study_id, patient_id, label, section, phrase, kind, control, cnr, pointing_game, mass_inside, miou, mdice,
    area (chance of the pointing game), note. Scores are NaN, and the note says why, where the region lies outside the
    crop or the words beyond the token limit. "swapped_side" covers fewer phrases than the rest: compare it with the
    rows "" of the same phrases.
    """
    columns = ["study_id", "patient_id", "label", "section", "phrase", "kind", "control", *SCORES, "area", "note"]
    others, crop = another_text(phrases, seed=seed), model.config.crop
    used = sorted({phrase.row for phrase in phrases})
    chosen, table = frame.iloc[used], []
    for block, images in image_batches(
        model, chosen, cache, batch_size=batch_size, precision=precision, progress=progress
    ):
        here = {row: i for i, row in enumerate(used[block])}
        asked = []
        for phrase, other in zip(phrases, others, strict=True):
            if phrase.row in here:
                variants = (("", phrase), ("shuffled_text", other), ("swapped_side", swap_sides(phrase)))
                asked += [(phrase, control, variant) for control, variant in variants if variant is not None]
        grids = phrase_grids(model, images, [(here[p.row], v) for p, _, v in asked], kinds, precision=precision)
        truth: dict[Phrase, tuple[np.ndarray, np.ndarray]] = {}
        for (phrase, control, _), by_kind in zip(asked, grids, strict=True):
            if phrase not in truth:
                geometry = cache.geometry(phrase.image)
                truth[phrase] = region(phrase, geometry, root, crop), seen(geometry, crop)
            mask, visible = truth[phrase]
            study = frame.iloc[phrase.row]
            head = (study["study_id"], study["patient_id"], phrase.label, phrase.section, phrase.words)
            for kind, name, values, note in _with_controls(by_kind, control, crop):
                values = np.where(visible, values, np.nan)
                area = area_share(values, mask)
                why = note or ("" if mask.any() else "region outside the crop")
                table.append((*head, kind, name, *score_map(values, mask).values(), area, why))
    return pd.DataFrame(table, columns=columns)


def summarise(
    scores: pd.DataFrame,
    *,
    macro: Sequence[str] = (),
    metrics: Sequence[str] = SCORES,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean score per kind, control and label with 95 % interval, and `macro`: the mean over labels (default: all).

    Patients are resampled whole and jointly over labels. `n` counts phrases with a finite score. `metric` is a name of
    its own for each map and control (`cnr_cosine`, `cnr_cosine_inverted`, `pointing_game_prior_centre`), so that rows
    can be recorded without the columns kind and control; `chance` is the mean area share.
    """
    rows = []
    for (kind, control), part in scores.groupby(["kind", "control"], sort=False):
        for metric in metrics:
            known = part[np.isfinite(part[metric])]
            name = "_".join(word for word in (metric, kind, control) if word)
            rows += [
                (kind, control, target, name, *numbers)
                for target, *numbers in _means(known, metric, macro, n_bootstrap, seed)
            ]
    columns = ["kind", "control", "target", "metric", "value", "ci_low", "ci_high", "n", "chance"]
    return pd.DataFrame(rows, columns=columns)


def _means(known: pd.DataFrame, metric: str, macro: Sequence[str], n_bootstrap: int, seed: int) -> list[tuple]:
    if known.empty:
        return []
    labels, label_of = np.unique(known["label"].astype(str), return_inverse=True)
    patients, patient_of = np.unique(known["patient_id"].astype(str), return_inverse=True)
    total, count = np.zeros((2, len(patients), len(labels)))
    np.add.at(total, (patient_of, label_of), known[metric].to_numpy(dtype=float))
    np.add.at(count, (patient_of, label_of), 1.0)
    drawn = [np.full((0, len(labels)), np.nan)]
    for weights in resamples(len(patients), n_bootstrap=n_bootstrap, seed=seed):
        with np.errstate(invalid="ignore"):
            drawn.append((weights @ total) / (weights @ count))
    drawn, value = np.concatenate(drawn), total.sum(axis=0) / count.sum(axis=0)
    area = known.groupby(label_of)["area"].mean().to_numpy()
    rows = [
        (label, value[k], *interval(drawn[:, k]), int(count[:, k].sum()), area[k]) for k, label in enumerate(labels)
    ]
    chosen = [k for k, label in enumerate(labels) if not macro or label in macro]
    if chosen:
        n = int(count[:, chosen].sum())
        rows.append(("macro", value[chosen].mean(), *interval(drawn[:, chosen].mean(axis=1)), n, area[chosen].mean()))
    return rows


def _with_controls(by_kind: dict[Kind, Tensor | None], control: str, crop: int) -> list[tuple]:
    rows, blank = [], np.full((crop, crop), np.nan)
    for kind, values in by_kind.items():
        note = "" if values is not None else "words beyond the token limit"
        values = blank if values is None else upsample(values, crop, crop).numpy()
        rows.append((kind, control, values, note))
        if not control:
            rows.append((kind, "inverted", inverted(values), note))
    if not control:
        rows.append(("prior", "centre", centre_prior(crop, crop), ""))
        rows.append(("prior", "uniform", np.ones((crop, crop)), ""))
    return rows
