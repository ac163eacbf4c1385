"""Zero-shot classification: a finding is scored by how much an image resembles sentences that state it.

Four ways to make one score of several prompts, each from a paper:

- `max`: the best prompt (GLoRIA, Huang et al. 2021; the released `zero_shot_classification`, whose comment says mean).
- `mean`: the mean over prompts (CXR-CLIP, You et al. 2023).
- `contrast`: best positive prompt less best negative prompt ("X" against "no X", CheXzero, Tiu et al. 2022, without
  its softmax, which does not change the order of the studies when the two are its only inputs).
- `against_normal`: best positive prompt less the mean over the prompts of "No Finding". Images differ in how much they
  resemble any sentence at all; a normal report as the common reference takes that out, without the word "no", which
  text encoders read poorly. The label "No Finding" itself is scored as by `max`.

GLoRIA then standardises each class over the cohort (`normalise="cohort"`), so that classes can be compared by argmax.
A study's score then depends on the other studies. AUROC of one class is the same with and without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

from gloria_core.tasks.embedding import EncodedTexts, Progress, image_batches, inference, select, text_features
from gloria_core.tasks.metrics import Estimate, Metric, interval, metric_rows, resamples
from gloria_core.tasks.targets import Uncertain, Unmentioned, binary_targets
from gloria_core.training.precision import Precision

Scoring = Literal["max", "mean", "contrast", "against_normal"]
NORMAL = "No Finding"
Normalise = Literal["none", "cohort"]
Prompts = Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]
"""For each label its prompts: a list, or {"pos": [...], "neg": [...]}. Other keys ("unc") are not read."""


def similarities(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: EncodedTexts | Sequence[str],
    *,
    batch_size: int = 64,
    text_chunk: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> np.ndarray:
    """(n, N) float32: the objective's similarity of every study's frontal image with every text.

    Images and texts are encoded once. Regions live for one batch only, so memory does not grow with n; `text_chunk`
    bounds the (batch, texts, regions, words) block of a local similarity. Similarity itself is computed in float32.
    """
    if not isinstance(texts, EncodedTexts):
        texts = text_features(model, texts, device=device, precision=precision)
    out = np.empty((len(frame), len(texts)), dtype=np.float32)
    for rows, images in image_batches(
        model, frame, cache, batch_size=batch_size, device=device, precision=precision, progress=progress
    ):
        with inference(model, None, "float32") as where:
            for first in range(0, len(texts), text_chunk):
                columns = slice(first, min(first + text_chunk, len(texts)))
                found = model.objective.similarity(images, select(texts.features, columns).to(where))
                out[rows, columns] = found.float().cpu().numpy()
    if not np.isfinite(out).all():
        row, column = np.argwhere(~np.isfinite(out))[0]
        raise ValueError(
            f"similarity of study {frame['study_id'].iloc[row]} with {texts.texts[column]!r} is not finite"
        )
    return out


def prompt_list(prompts: Prompts) -> list[str]:
    """Every distinct prompt of all labels, positives and negatives, in order of first use."""
    sides = [side for label in prompts for side in _sides(prompts, label)]
    return list(dict.fromkeys(text for side in sides for text in side))


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
        normal = similarity[:, [column[text] for text in _sides(prompts, NORMAL)[0]]].mean(axis=1)
    for label in prompts:
        positive, negative = ([column[text] for text in side] for side in _sides(prompts, label))
        if scoring == "contrast" and not negative:
            raise ValueError(f'label {label!r} has no negative prompts, which scoring="contrast" needs')
        if scoring == "mean":
            scores.append(similarity[:, positive].mean(axis=1))
        else:
            scores.append(similarity[:, positive].max(axis=1))
        if scoring == "contrast":
            scores[-1] = scores[-1] - similarity[:, negative].max(axis=1)
        if scoring == "against_normal" and label != NORMAL:
            scores[-1] = scores[-1] - normal
    stacked = np.stack(scores, axis=1).astype(np.float64)
    return stacked if normalise == "none" else _standardised(stacked)


def scores(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    *,
    scoring: Scoring = "max",
    normalise: Normalise = "none",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score of every study (index: study_id) for every label of `prompts`; see `combine` for the two choices.

    Scores order the studies of one label. They are no probabilities, and without `normalise="cohort"` their levels
    differ between labels.
    """
    texts = prompt_list(prompts)
    combine(np.zeros((2, len(texts))), texts, prompts, scoring=scoring, normalise=normalise)  # bad names fail first
    found = similarities(
        model, frame, cache, texts, batch_size=batch_size, device=device, precision=precision, progress=progress
    )
    values = combine(found, texts, prompts, scoring=scoring, normalise=normalise)
    return pd.DataFrame(values, index=pd.Index(frame["study_id"].astype(str), name="study_id"), columns=list(prompts))


def evaluate(
    scores: pd.DataFrame,
    frame: pd.DataFrame,
    *,
    macro: Sequence[str] = (),
    unmentioned: Unmentioned = "negative",
    uncertain: Uncertain | Mapping[str, Uncertain] = "ignore",
    metrics: Sequence[Metric] = ("auroc",),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Metric rows (target, metric, value, ci_low, ci_high, n, prevalence, note) of each label, then `macro`.

    `frame` holds the same studies in the same order; patients are resampled whole. A label with one class only has
    value NaN and says why in `note`; the macro is the mean over those of its labels that have a value.
    Raises ValueError where the studies of scores and frame differ.
    """
    if list(scores.index) != list(frame["study_id"].astype(str)):
        raise ValueError("scores and frame do not hold the same studies in the same order")
    targets = binary_targets(frame, list(scores.columns), unmentioned=unmentioned, uncertain=uncertain)
    groups = frame["patient_id"].astype(str).to_numpy()
    return metric_rows(targets, scores, metrics=metrics, macro=macro, groups=groups, n_bootstrap=n_bootstrap, seed=seed)


def exclusive_accuracy(
    scores: pd.DataFrame, frame: pd.DataFrame, *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Accuracy of the highest score on a set where each study has exactly one of the K labels (CheXpert 5x200).

    Rows: recall of each class as its target, then their overall accuracy as `macro` (equal to the mean recall when
    classes are of equal size). A tie goes to the first label. Chance is 1/K.
    Raises ValueError naming the first study that has none or several of the labels.
    """
    truth = binary_targets(frame, list(scores.columns)).to_numpy() == 1
    wrong = np.flatnonzero(truth.sum(axis=1) != 1)
    if len(wrong):
        study = frame["study_id"].iloc[wrong[0]]
        raise ValueError(f"study {study} has {truth[wrong[0]].sum()} of the {truth.shape[1]} labels; it must have one")
    hit = scores.to_numpy().argmax(axis=1) == truth.argmax(axis=1)
    groups = frame["patient_id"].astype(str).to_numpy()
    rows = []
    for name, members in [
        *((label, truth[:, k]) for k, label in enumerate(scores.columns)),
        ("macro", truth.any(axis=1)),
    ]:
        found = _share(hit, members, groups, n_bootstrap, seed)
        rows.append((name, "accuracy", found.value, found.ci_low, found.ci_high, found.n, float(members.mean()), ""))
    return pd.DataFrame(rows, columns=["target", "metric", "value", "ci_low", "ci_high", "n", "prevalence", "note"])


def _share(hit: np.ndarray, members: np.ndarray, groups: np.ndarray, n_bootstrap: int, seed: int) -> Estimate:
    n = int(members.sum())
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    drawn = []
    for weights in resamples(len(hit), groups=groups, n_bootstrap=n_bootstrap, seed=seed):
        total = weights[:, members].sum(axis=1)
        with np.errstate(invalid="ignore"):
            drawn.append(weights[:, members & hit].sum(axis=1) / total)
    return Estimate(float(hit[members].mean()), *interval(np.concatenate(drawn)), n)


def _sides(prompts: Prompts, label: str) -> tuple[Sequence[str], Sequence[str]]:
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
