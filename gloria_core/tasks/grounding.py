"""How well the words of a report find the region they name, and how well anything else would.

A map is evidence only beside its controls: upside down, for another study's words, with left and right exchanged, a
Gaussian at the centre, and a constant. `score_phrases` computes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor, nn

from gloria_core.tasks.embedding import Progress, image_batches
from gloria_core.tasks.map_scores import area_share, centre_prior, cnr, inverted, iou, mass_inside, pointing_hit
from gloria_core.tasks.maps import (
    KINDS,
    Kind,
    kinds_of,
    maps,
    original_maps,
    phrase_grids,
    phrase_map,
    phrase_words,
    upsample,
    words_of_span,
)
from gloria_core.tasks.metrics import interval, resamples
from gloria_core.tasks.phrases import Phrase, another_text, region, seen, swap_sides
from gloria_core.training.precision import Precision

__all__ = [
    "KINDS",
    "Kind",
    "area_share",
    "centre_prior",
    "cnr",
    "inverted",
    "iou",
    "kinds_of",
    "maps",
    "mass_inside",
    "original_maps",
    "phrase_map",
    "phrase_words",
    "pointing_hit",
    "score_map",
    "score_phrases",
    "summarise",
    "upsample",
    "words_of_span",
]

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
