"""From similarities with prompts to one score a finding: the papers' ways, by name. Arithmetic only; no model.

- `max`: the best prompt (GLoRIA, Huang et al. 2021; the released `zero_shot_classification`, whose comment says mean).
- `mean`: the mean over all prompts (CXR-CLIP, You et al. 2023, the released `zeroshot_gloria`).
- `pair`: softmax over "no X" and "X" at temperature 1, a number in (0, 1) that is above a half where X is nearer
  (CXR-CLIP, `zeroshot_binary` and `zeroshot_binary_BioVIL`). With several prompts a side, of their means.
- `contrast`: best positive prompt less best negative prompt ("X" against "no X", CheXzero, Tiu et al. 2022, without
  its softmax, which does not change the order of the studies when the two are its only inputs).
- `against_normal`: best positive prompt less the mean over the prompts of "No Finding". Images differ in how much they
  resemble any sentence at all; a normal report as the common reference takes that out, without the word "no", which
  text encoders read poorly. The label "No Finding" itself is scored as by `max`.

GLoRIA then standardises each class over the cohort (`normalise="cohort"`), so that classes can be compared by argmax.
A study's score then depends on the other studies. AUROC of one class is the same with and without it.
PRIOR's scoring is no function of similarities: see `zero_shot.scores`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

Scoring = Literal["max", "mean", "pair", "contrast", "against_normal"]
Normalise = Literal["none", "cohort"]
Prompts = Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]
"""For each label its prompts: a list, or {"pos": [...], "neg": [...]}. Other keys ("unc") are not read."""
NORMAL = "No Finding"


def no_x_prompts(labels: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """ "X" against "No X", the label's name as it is (CXR-CLIP on SIIM and VinDr)."""
    return {label: {"pos": [label], "neg": [f"No {label}"]} for label in labels if label != NORMAL}


def biovil_prompts(labels: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """ "Findings suggesting x." against "No evidence of x", names in small letters.

    BioViL's pair for pneumonia (Boecking et al. 2022) as CXR-CLIP's released code has it, full stop in the first only;
    the same words are put around other findings.
    """
    return {
        label: {"pos": [f"Findings suggesting {label.lower()}."], "neg": [f"No evidence of {label.lower()}"]}
        for label in labels
        if label != NORMAL
    }


def observed_prompts(labels: Sequence[str]) -> dict[str, list[str]]:
    """ "X is observed", one prompt a class (PRIOR, Cheng et al. 2023, released zero-shot code)."""
    return {label: [f"{label} is observed"] for label in labels}


def prompt_list(prompts: Prompts) -> list[str]:
    """Every distinct prompt of all labels, positives and negatives, in order of first use."""
    every = [side for label in prompts for side in sides(prompts, label)]
    return list(dict.fromkeys(text for side in every for text in side))


def combine(
    similarity: np.ndarray,
    texts: Sequence[str],
    prompts: Prompts,
    *,
    scoring: Scoring = "max",
    normalise: Normalise = "none",
) -> np.ndarray:
    """(n, N) similarities with N texts -> (n, K) scores, K = labels of `prompts` in their order.

    `normalise="cohort"` subtracts the mean over all n studies and divides by their population standard deviation; a
    column that does not vary becomes zeros: it says nothing about any study, and it is no NaN. Raises ValueError for an
    unknown name, a label without the prompts that its scoring needs, or a cohort of fewer than two studies.
    """
    if scoring not in get_args(Scoring):
        raise ValueError(f"unknown scoring {scoring!r}; available: {', '.join(get_args(Scoring))}")
    if normalise not in ("none", "cohort"):
        raise ValueError(f"unknown normalise {normalise!r}; available: none, cohort")
    column, scores = {text: i for i, text in enumerate(texts)}, []
    if scoring == "against_normal":
        if NORMAL not in prompts:
            raise ValueError(f'scoring="against_normal" needs prompts for {NORMAL!r}')
        normal = similarity[:, [column[text] for text in sides(prompts, NORMAL)[0]]].mean(axis=1)
    for label in prompts:
        positive, negative = (similarity[:, [column[text] for text in side]] for side in sides(prompts, label))
        if scoring in ("contrast", "pair") and not negative.shape[1]:
            raise ValueError(f'label {label!r} has no negative prompts, which scoring="{scoring}" needs')
        if scoring == "mean":
            scores.append(positive.mean(axis=1))
        elif scoring == "pair":
            scores.append(1 / (1 + np.exp(negative.mean(axis=1) - positive.mean(axis=1))))
        elif scoring == "contrast":
            scores.append(positive.max(axis=1) - negative.max(axis=1))
        elif scoring == "against_normal" and label != NORMAL:
            scores.append(positive.max(axis=1) - normal)
        else:
            scores.append(positive.max(axis=1))
    stacked = np.stack(scores, axis=1).astype(np.float64)
    return stacked if normalise == "none" else _standardised(stacked)


def sides(prompts: Prompts, label: str) -> tuple[Sequence[str], Sequence[str]]:
    """Positive and negative prompts of a label. Raises ValueError where it has no positive ones."""
    given = prompts[label]
    if isinstance(given, str):
        raise ValueError(f"prompts of {label!r} must be a list of texts, not one text")
    positive, negative = (given["pos"], given.get("neg", ())) if isinstance(given, Mapping) else (given, ())
    if not positive:
        raise ValueError(f"label {label!r} has no prompts")
    return positive, negative


def _standardised(scores: np.ndarray) -> np.ndarray:
    if len(scores) < 2:
        raise ValueError('normalise="cohort" needs at least two studies')
    deviation = scores.std(axis=0)
    flat = deviation <= 1e-9 * np.maximum(1.0, np.abs(scores).max(axis=0))
    return np.where(flat, 0.0, (scores - scores.mean(axis=0)) / np.where(flat, 1.0, deviation))
