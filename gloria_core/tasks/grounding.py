"""Grounding: how well the words of a report find the region that they name, and how well controls do.

A map is evidence only beside its controls: upside down, for another study's words, with left and right exchanged, a
Gaussian at the centre, and a constant. `score_phrases` computes them all. No sign is assumed: a map that is dark on the
finding scores below chance.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from gloria_core.tasks.maps import Kind, phrase_maps, phrases_by_batch, upsample
from gloria_core.tasks.metrics import bootstrap_rows, ratio_of_sums
from gloria_core.tasks.phrases import Phrase, another_text, region, seen, swap_sides

SCORES = ("cnr", "pointing_game", "mass_inside", "miou", "mdice")
IOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
# A map whose values differ by less than this share of the largest one is constant: float32 has no more digits.
CONSTANT = 1e-6


def score_map(
    values: np.ndarray, mask: np.ndarray, *, thresholds: Sequence[float] = IOU_THRESHOLDS
) -> dict[str, float]:
    """Scores of a map (H, W) against a mask (H, W) of booleans on the same pixels; pixels that are NaN do not count.

    - cnr: contrast-to-noise ratio (mean inside - mean outside) / sqrt(variance inside + variance outside), signed, with
      population variances. BioViL (Boecking et al. 2022, section 4.2) takes the absolute difference, so that an
      inverted map scores as well as an upright one. A constant map has 0, two constants plus or minus infinity.
    - pointing_game: 1 if the highest pixel lies in the mask, else 0 (Zhang et al. 2018, without their tolerance). Of
      several highest pixels the share in the mask, so that a constant map scores the area.
    - mass_inside: share of the map's positive part that lies in the mask; NaN where no pixel is positive. For maps that
      are weights (attention). A constant positive map scores the area.
    - miou: mean intersection over union of {map >= threshold} and the mask over the thresholds. The map is first
      stretched to 0..1, so that maps of any scale can be compared; BioViL's mIoU has cosine values without the
      stretch. A constant map is 1 everywhere and scores the area.
    - mdice: mean Dice, 2 IoU / (1 + IoU), over the same thresholds.
    - area: share of the pixels that the mask covers, the chance level of the pointing game.

    An empty mask, or one that covers all pixels, has no inside or no outside: every score but the area is NaN.
    Raises ValueError for other shapes, or a mask that is not boolean.
    """
    values, mask = np.asarray(values, dtype=np.float64), np.asarray(mask)
    if values.shape != mask.shape:
        raise ValueError(f"map {values.shape} and mask {mask.shape} must have the same pixels")
    if mask.dtype != bool:
        raise ValueError(f"a mask is boolean, not {mask.dtype}")
    known = ~np.isnan(values)
    values, mask = values[known], mask[known]
    area = float(mask.mean()) if len(mask) else float("nan")
    if not 0 < area < 1:
        return dict.fromkeys(SCORES, float("nan")) | {"area": area}
    # rounding noise of a constant float32 map has a highest pixel and a contrast, like any signal
    if np.ptp(values) <= CONSTANT * np.abs(values).max():
        values = np.full_like(values, values[0])
    inside, outside = values[mask], values[~mask]
    difference, noise = inside.mean() - outside.mean(), np.sqrt(inside.var() + outside.var())
    if noise <= 1e-12 * np.abs([inside.mean(), outside.mean()]).max():
        cnr = 0.0 if difference == 0 else np.copysign(np.inf, difference)
    else:
        cnr = difference / noise
    mass, other_mass = (np.clip(part, 0, None).sum() for part in (inside, outside))
    stretched = (values - values.min()) / np.ptp(values) if np.ptp(values) > 0 else np.ones_like(values)
    called = stretched >= np.array(thresholds)[:, None]
    iou = (called & mask).sum(axis=1) / (called | mask).sum(axis=1)
    return {
        "cnr": float(cnr),
        "pointing_game": float(mask[values == values.max()].mean()),
        "mass_inside": float(mass / (mass + other_mass)) if mass + other_mass > 0 else float("nan"),
        "miou": float(iou.mean()),
        "mdice": float((2 * iou / (1 + iou)).mean()),
        "area": area,
    }


def inverted(values: np.ndarray) -> np.ndarray:
    """The map upside down within its own range (highest + lowest - map): the CNR changes sign, the range does not."""
    if np.isnan(values).all():
        return values.copy()
    return np.nanmax(values) + np.nanmin(values) - values


def centre_prior(height: int, width: int, *, sigma: float = 0.25) -> np.ndarray:
    """A Gaussian at the centre of (height, width) pixels; `sigma` as a share of each side."""
    # whole numbers before the division make the two halves equal to the last bit, and the peak a true tie
    rows, columns = ((2 * np.arange(side) + 1 - side) / (2 * side) for side in (height, width))
    return np.exp(-(rows[:, None] ** 2 + columns[None, :] ** 2) / (2 * sigma**2))


def score_phrases(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    root: Path | str,
    phrases: Sequence[Phrase],
    *,
    kinds: Sequence[Kind] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per phrase, kind (default: all that the model has) and control, in the pixels of the model's crop.

    Controls: "" the map itself; "inverted"; "shuffled_text" (a phrase of another label from another study, drawn with
    `seed`); "swapped_side" (only for phrases that name a side); and, with kind "prior", "centre" and "uniform".
    Columns: number (of the phrase in `phrases`), study_id, patient_id, label, section, phrase, kind, control, the
    scores and area of `score_map`, note.
    Scores are NaN, and the note says why, where the region lies outside the crop or the words beyond the token limit.
    "swapped_side" covers fewer phrases than the rest: compare it with the rows "" of the same phrases.
    """
    crop, table = model.config.crop, []
    texts = {"": phrases, "shuffled_text": another_text(phrases, seed=seed)}
    texts["swapped_side"] = [swap_sides(phrase) for phrase in phrases]
    blank, centre, uniform = np.full((crop, crop), np.nan), centre_prior(crop, crop), np.ones((crop, crop))
    for images, on_images in phrases_by_batch(model, frame, cache, phrases, batch_size=batch_size):
        variants = [(*pair, name) for pair in on_images for name in texts if texts[name][pair[1]] is not None]
        pairs = [(image, texts[control][number]) for image, number, control in variants]
        for (_, number, control), by_kind in zip(variants, phrase_maps(model, images, pairs, kinds), strict=True):
            phrase = phrases[number]
            if not control:
                geometry = cache.geometry(phrase.image)
                mask, visible = region(phrase, geometry, root, crop), seen(geometry, crop)
            study = frame.iloc[phrase.row]
            head = (number, study["study_id"], study["patient_id"], phrase.label, phrase.section, phrase.words)
            rows = []
            for kind, grid in by_kind.items():
                pixels = blank if grid is None else upsample(grid, crop, crop).numpy()
                note = "words beyond the token limit" if grid is None else ""
                rows.append((kind, control, pixels, note))
                if not control:
                    rows.append((kind, "inverted", inverted(pixels), note))
            if not control:
                rows += [("prior", "centre", centre, ""), ("prior", "uniform", uniform, "")]
            for kind, name, pixels, note in rows:
                scores = score_map(np.where(visible, pixels, np.nan), mask)
                note = note or ("" if mask.any() else "region outside the crop")
                table.append((*head, kind, name, *scores.values(), note))
    columns = ["number", "study_id", "patient_id", "label", "section", "phrase", "kind", "control"]
    return pd.DataFrame(table, columns=[*columns, *SCORES, "area", "note"])


def summarise(
    scores: pd.DataFrame, *, macro: Sequence[str] = (), suffix: str = "", n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Mean score per kind, control and label with 95 % interval, and `macro`: the mean over labels (default: all).

    Patients are resampled whole and jointly over labels. `n` counts phrases with a finite score, and the note says how
    many have none. `metric` is a name of
    its own for each map and control (`cnr_cosine`, `cnr_cosine_inverted`, `pointing_game_prior_centre`), so that rows
    can be recorded without the columns score, kind and control, with `suffix` at its end; `chance` is the mean area.
    """
    columns = ["score", "kind", "control", "target", "metric", "value", "ci_low", "ci_high", "n", "patients", "chance"]
    columns, tables = [*columns, "note"], [pd.DataFrame(columns=[*columns, "note"])]
    for (kind, control), part in scores.groupby(["kind", "control"], sort=False):
        for score in SCORES:
            known = part[np.isfinite(part[score])]
            if known.empty:
                continue
            of_phrase, labels = known["label"].astype(str), sorted(part["label"].astype(str).unique())
            of_label = pd.get_dummies(of_phrase).reindex(columns=labels, fill_value=False)
            counted = of_label.to_numpy(dtype=bool)[:, :, None]
            values = known[score].to_numpy(dtype=float)[:, None, None]
            mean = ratio_of_sums(np.where(counted, values, 0.0), counted)
            name = "_".join(word for word in (score, kind, control, suffix) if word)
            area = known.groupby(of_phrase)["area"].mean().reindex(labels).to_numpy()
            options = {"groups": known["patient_id"].astype(str), "n_bootstrap": n_bootstrap, "seed": seed}
            options |= {"macro": [label for label in labels if not macro or label in macro]}
            missing = part["label"].astype(str).value_counts()[labels] - counted.sum(axis=(0, 2))
            options["notes"] = [f"{n} of its phrases have no finite score" if n else "" for n in missing]
            rows = bootstrap_rows(mean, counted, labels, [name], columns={"chance": area}, **options)
            tables.append(rows.assign(score=score, kind=kind, control=control)[columns])
    return pd.concat(tables[1:] or tables, ignore_index=True)


def examples(scores: pd.DataFrame) -> pd.DataFrame:
    """The rows of the worst, the median and the best phrase by the CNR of the cosine map; none where none has one."""
    maps = scores[(scores["kind"] == "cosine") & (scores["control"] == "")].dropna(subset="cnr").sort_values("cnr")
    places = [0, len(maps) // 2, -1] if len(maps) else []
    return maps.iloc[places].set_axis(["worst", "median", "best"][: len(places)])
