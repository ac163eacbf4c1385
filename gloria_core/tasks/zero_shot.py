"""Zero-shot classification: a finding is scored by how much an image resembles sentences that state it.

How one score is made of several prompts is in `zero_shot_scoring`; here images and prompts are encoded, and scores
are judged: each finding by itself (binary, multi-label), or as a choice of one among K (multi-class, CheXpert 5x200).

From similarities with prompts to one score a finding: the papers' ways, by name. Arithmetic only; no model.

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
import pandas as pd
import torch
from torch import nn

from gloria_core.tasks.classification.label_policy import Uncertain, Unmentioned, binary_targets
from gloria_core.tasks.features import EncodedTexts, Progress, image_batches, inference, select, text_features
from gloria_core.tasks.metrics import Estimate, Metric, interval, metric_rows, resamples
from gloria_core.training.precision import Precision
from gloria_core.types import ImageFeatures, TextFeatures

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


Kind = Literal["objective", "global", "prior"]


def similarities(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: EncodedTexts | Sequence[str],
    *,
    batch_size: int = 64,
    text_chunk: int = 64,
    kind: Kind = "objective",
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> np.ndarray:
    """(n, N) float32: similarity of every study's frontal image with every text.

    `kind`: "objective" its own similarity, local part included; "global" the cosine of its global embeddings (all that
    CXR-CLIP and ConVIRT have); "prior" `zero_shot_scores` of an objective that offers it, a softmax over the N texts.
    Images and texts are encoded once. Regions live for one batch only, so memory does not grow with n; `text_chunk`
    bounds the (batch, texts, regions, words) block of a local similarity. Similarity itself is computed in float32.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind {kind!r}; available: {', '.join(get_args(Kind))}")
    if kind == "prior" and not hasattr(model.objective, "zero_shot_scores"):
        raise ValueError(
            f'objective {model.config.objective!r} has no zero-shot scores of its own, which "prior" needs'
        )
    if not isinstance(texts, EncodedTexts):
        texts = text_features(model, texts, device=device, precision=precision)
    out = np.empty((len(frame), len(texts)), dtype=np.float32)
    for rows, images in image_batches(
        model, frame, cache, batch_size=batch_size, device=device, precision=precision, progress=progress
    ):
        with inference(model, None, "float32") as where:
            step = len(texts) if kind == "prior" else text_chunk
            for first in range(0, len(texts), step):
                columns = slice(first, min(first + step, len(texts)))
                found = _similarity(model.objective, images, select(texts.features, columns).to(where), kind)
                out[rows, columns] = found.float().cpu().numpy()
    if not np.isfinite(out).all():
        row, column = np.argwhere(~np.isfinite(out))[0]
        raise ValueError(
            f"similarity of study {frame['study_id'].iloc[row]} with {texts.texts[column]!r} is not finite"
        )
    return out


def scores(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    *,
    scoring: Scoring | Literal["prior"] = "max",
    normalise: Normalise = "none",
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Score of every study (index: study_id) for every label of `prompts`; see `zero_shot_scoring` for the choices.

    `scoring="prior"`: softmax over the K labels of the global similarity plus half that of the local one (PRIOR, Cheng
    et al. 2023, released zero-shot code), one prompt a label, for an objective that offers it; labels compete.
    Scores order the studies of one label. They are no probabilities, and without `normalise="cohort"` their levels
    differ between labels.
    """
    rule, kind = (scoring, "objective") if scoring != "prior" else ("max", "prior")
    texts = prompt_list(prompts)
    combine(np.zeros((2, len(texts))), texts, prompts, scoring=rule, normalise=normalise)  # bad names fail first
    if kind == "prior" and [len(side) for label in prompts for side in sides(prompts, label)[:1]] != [1] * len(texts):
        raise ValueError('scoring="prior" takes one prompt a label, a different one for each, and no negatives')
    found = similarities(
        model, frame, cache, texts,
        batch_size=batch_size, kind=kind, device=device, precision=precision, progress=progress,
    )  # fmt: skip
    values = combine(found, texts, prompts, scoring=rule, normalise=normalise)
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
    truth = _exclusive(scores, frame)
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


def multiclass_rows(
    scores: pd.DataFrame, frame: pd.DataFrame, *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The highest score as the answer, where each study has exactly one of the K labels: the papers' three tables.

    Rows (target, metric, value, ci_low, ci_high, n, prevalence, note, chance): sensitivity, precision and F1 of each
    class; as `macro` their means over the classes that have studies, accuracy (CXR-CLIP's micro) and Cohen's kappa
    (PRIOR). `n` counts the studies of the class. A class that is never answered has precision 0. Chance is that of
    answering each class equally often, blind. A tie goes to the first label. Raises as `exclusive_accuracy`.
    """
    truth, labels = _exclusive(scores, frame), list(scores.columns)
    k, groups = len(labels), frame["patient_id"].astype(str).to_numpy()
    cell = np.eye(k * k)[truth.argmax(axis=1) * k + scores.to_numpy().argmax(axis=1)]
    blocks = resamples(len(cell), groups=groups, n_bootstrap=n_bootstrap, seed=seed)
    point = _confusion_metrics((np.ones((1, len(cell))) @ cell).reshape(-1, k, k))
    drawn = [_confusion_metrics((weights @ cell).reshape(-1, k, k)) for weights in blocks]
    blind = np.tile(truth.sum(axis=0)[:, None] / k, (1, k))[None]
    chance = _confusion_metrics(blind)
    rows = []
    for name, values in point.items():
        low_high = [interval(column) for column in np.concatenate([d[name] for d in drawn] or [values[:0]]).T]
        for target, value, limits, level in zip([*labels, "macro"], values[0], low_high, chance[name][0], strict=True):
            members = truth[:, labels.index(target)] if target in labels else np.ones(len(truth), dtype=bool)
            if target == "macro" or name not in ("accuracy", "kappa"):
                note = "" if members.any() else "no study of this class"
                rows.append((target, name, value, *limits, int(members.sum()), members.mean(), note, level))
    columns = ["target", "metric", "value", "ci_low", "ci_high", "n", "prevalence", "note", "chance"]
    return pd.DataFrame(rows, columns=columns)


def _confusion_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(b, K, K) counts of truth by answer -> for each metric (b, K + 1): the classes, then the macro."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total, truth, said = counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1)
        right = np.diagonal(counts, axis1=1, axis2=2)
        there = np.where(truth > 0, 1.0, np.nan)
        found = {
            "sensitivity": right / truth,
            "precision": there * right / np.maximum(said, 1e-12),
            "f1": there * 2 * right / (truth + said),
        }
        known = np.maximum((truth > 0).sum(axis=1), 1)
        found = {name: np.column_stack([v, np.nansum(v, axis=1) / known]) for name, v in found.items()}
        agreed, expected = right.sum(axis=1) / total, (truth * said).sum(axis=1) / total**2
        blank = np.full(truth.shape, np.nan)
        kappa = np.where(expected < 1, (agreed - expected) / (1 - expected), np.nan)
        return found | {"accuracy": np.column_stack([blank, agreed]), "kappa": np.column_stack([blank, kappa])}


def _exclusive(scores: pd.DataFrame, frame: pd.DataFrame) -> np.ndarray:
    """(n, K) bool with one True a row. Raises ValueError for other studies, none, or the first that has not one."""
    if list(scores.index) != list(frame["study_id"].astype(str)):
        raise ValueError("scores and frame do not hold the same studies in the same order")
    truth = binary_targets(frame, list(scores.columns)).to_numpy() == 1
    wrong = np.flatnonzero(truth.sum(axis=1) != 1)
    if len(wrong):
        study = frame["study_id"].iloc[wrong[0]]
        raise ValueError(f"study {study} has {truth[wrong[0]].sum()} of the {truth.shape[1]} labels; it must have one")
    if not len(truth):
        raise ValueError("no studies to judge: the frame is empty")
    return truth


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


def _similarity(objective: nn.Module, images: ImageFeatures, texts: TextFeatures, kind: Kind) -> torch.Tensor:
    if kind == "prior":
        return objective.zero_shot_scores(images, texts)
    if kind == "objective":
        return objective.similarity(images, texts)
    image, text = (nn.functional.normalize(part, dim=1) for part in objective.global_embeddings(images, texts))
    return image @ text.T
