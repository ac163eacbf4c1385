"""Zero-shot classification: a finding is scored by how similar an image is to sentences that state it.

Prompts become one score for each finding by a rule (`Scoring`):

- `max`: the best prompt (GLoRIA, Huang et al. 2021; the released `zero_shot_classification`, whose comment says mean).
- `mean`: the mean over all prompts (CXR-CLIP, You et al. 2023, the released `zeroshot_gloria`).
- `pair`: softmax over "no X" and "X" at temperature 1, a number in (0, 1) that is above a half where X is nearer
  (CXR-CLIP, `zeroshot_binary` and `zeroshot_binary_BioVIL`). Of several prompts a side, their means are taken.
- `contrast`: best positive prompt minus best negative prompt ("X" against "no X", CheXzero, Tiu et al. 2022, without
  its softmax, which does not change the order of the studies when the two are its only inputs).
- `against_normal`: best positive prompt minus the mean over the prompts of "No Finding". Images differ in how similar
  they are to any sentence; a normal report as the common reference removes that, without the word "no", which text
  encoders read poorly. The label "No Finding" itself is scored as by `max`.
- `prior`: PRIOR's softmax over the labels (Cheng et al. 2023), no function of single similarities; see `scores`.

GLoRIA then standardises each class over the cohort (`normalise="cohort"`), so that classes can be compared by argmax.
A study's score then depends on the other studies. AUROC of one class is the same with and without it.

Scores are judged for each finding by itself (`evaluate`), or as a choice of one among K (`multiclass`, CheXpert 5x200).

Tables of scores and of targets (1, 0, NaN: `label_policy.binary_targets`) have a row a study, by study_id, and a column
a label. Targets of more studies than are judged may be given.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import SkipValidation, validate_call
from torch import Tensor, nn
from torch.nn.functional import normalize

from gloria_core.data.prompts import NO_FINDING
from gloria_core.data.splits import exclusive_test_set
from gloria_core.tasks.classification.label_policy import binary_targets
from gloria_core.tasks.features import image_batches, inference, select, text_features
from gloria_core.tasks.metrics import Metric, bootstrap_rows, metric_rows
from gloria_core.types import ImageFeatures, TextFeatures

Scoring = Literal["max", "mean", "pair", "contrast", "against_normal"]
Normalise = Literal["none", "cohort"]
Similarity = Literal["objective", "global", "prior"]
# For each label its prompts: a list, or {"pos": [...], "neg": [...]}. Other keys ("unc") are not read.
Prompts = Mapping[str, Sequence[str] | Mapping[str, Sequence[str]]]
TEXTS_AT_A_TIME = 64  # bounds the (images, texts, regions, words) block of a local similarity


def no_x_prompts(labels: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """ "X" against "No X", the label's name unchanged (CXR-CLIP on SIIM and VinDr)."""
    return {label: {"pos": [label], "neg": [f"No {label}"]} for label in labels if label != NO_FINDING}


def biovil_prompts(labels: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """ "Findings suggesting x." against "No evidence of x", names in small letters.

    BioViL's pair for pneumonia (Boecking et al. 2022) as CXR-CLIP's released code has it, full stop in the first only;
    the same words are put around other findings.
    """
    sentences = {"pos": "Findings suggesting {}.", "neg": "No evidence of {}"}
    named = [label for label in labels if label != NO_FINDING]
    return {label: {side: [text.format(label.lower())] for side, text in sentences.items()} for label in named}


def sides(prompts: Prompts, label: str) -> tuple[Sequence[str], Sequence[str]]:
    """Positive and negative prompts of a label. Raises ValueError where it has no positive ones."""
    given = prompts[label]
    if isinstance(given, str):
        raise ValueError(f"prompts of {label!r} must be a list of texts, not one text")
    positive, negative = (given["pos"], given.get("neg", ())) if isinstance(given, Mapping) else (given, ())
    if not positive:
        raise ValueError(f"label {label!r} has no prompts")
    return positive, negative


def prompt_list(prompts: Prompts) -> list[str]:
    """Every distinct prompt of all labels, positives and negatives, in order of first use."""
    return list(dict.fromkeys(text for label in prompts for side in sides(prompts, label) for text in side))


def scorings_of(prompts: Prompts) -> list[Scoring]:
    """The scoring rules that have the prompts they need."""
    paired = ["pair", "contrast"] if all(sides(prompts, label)[1] for label in prompts) else []
    return ["max", "mean", *paired, *(["against_normal"] if NO_FINDING in prompts else [])]


def choose_scoring(prompts: Prompts, scoring: str = "") -> tuple[Scoring, str]:
    """`scoring` if it is given, else the first of `against_normal`, `contrast` and `max` that has the prompts it needs.

    Also a sentence that says why.
    """
    possible, reason = scorings_of(prompts), "as given"
    if not scoring and "against_normal" in possible:
        scoring, reason = "against_normal", f"there are prompts for {NO_FINDING}, to compare with"
    elif not scoring:
        scoring, every = ("contrast", "every") if "contrast" in possible else ("max", "not every")
        reason = f"{NO_FINDING} is no label here, and {every} label has negative prompts"
    return scoring, f"scoring is {scoring}: {reason}"


@validate_call(config={"arbitrary_types_allowed": True})
def combine(
    similarity: pd.DataFrame,
    prompts: SkipValidation[Prompts],
    *,
    scoring: Scoring = "max",
    normalise: Normalise = "none",
) -> pd.DataFrame:
    """Similarities of n studies with texts (columns) -> scores (n, K) of the labels of `prompts`.

    `normalise="cohort"` subtracts the mean over all n studies and divides by their population standard deviation; a
    column that does not vary becomes zeros. Raises ValueError for an unknown name, a label without the prompts that its
    scoring needs, or a cohort of fewer than two studies.
    """
    if scoring == "against_normal" and NO_FINDING not in prompts:
        raise ValueError(f'scoring="against_normal" needs prompts for {NO_FINDING!r}')
    if normalise == "cohort" and len(similarity) < 2:
        raise ValueError('normalise="cohort" needs at least two studies')
    columns = {}
    for label in prompts:
        positive, negative = (similarity[list(side)].to_numpy() for side in sides(prompts, label))
        if scoring in ("contrast", "pair") and not negative.shape[1]:
            raise ValueError(f'label {label!r} has no negative prompts, which scoring="{scoring}" needs')
        if scoring == "mean":
            score = positive.mean(axis=1)
        elif scoring == "pair":
            score = 1 / (1 + np.exp(negative.mean(axis=1) - positive.mean(axis=1)))
        else:
            score = positive.max(axis=1)
            if scoring == "contrast":
                score = score - negative.max(axis=1)
            if scoring == "against_normal" and label != NO_FINDING:
                score = score - similarity[list(sides(prompts, NO_FINDING)[0])].to_numpy().mean(axis=1)
        columns[label] = score.astype(np.float64)
        if normalise == "cohort":
            centred, deviation = columns[label] - columns[label].mean(), columns[label].std()
            constant = deviation <= 1e-9 * max(1.0, np.abs(score).max())
            columns[label] = 0.0 * score if constant else centred / deviation
    return pd.DataFrame(columns, similarity.index)


def similarities(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: Sequence[str],
    *,
    kind: Similarity = "objective",
    batch_size: int = 64,
) -> pd.DataFrame:
    """float32 similarity of every study's frontal image (rows: study_id) with every text (columns), each encoded once.

    `kind`: "objective" its own similarity, local part included; "global" the cosine of its global embeddings (all that
    CXR-CLIP and ConVIRT have); "prior" `zero_shot_scores` of an objective that has them, a softmax over the N texts.
    Only the regions of one batch are in memory. The similarity itself is computed in float32.
    """
    objective = model.objective

    def of_global(images: ImageFeatures, texts: TextFeatures) -> Tensor:
        image, text = (normalize(part, dim=1) for part in objective.global_embeddings(images, texts))
        return image @ text.T

    kinds = {"objective": objective.similarity, "global": of_global}
    if hasattr(objective, "zero_shot_scores"):
        kinds["prior"] = objective.zero_shot_scores
    if kind not in kinds:
        raise ValueError(f"{model.config.objective!r} has no similarity {kind!r}; available: {', '.join(kinds)}")
    encoded = text_features(model, texts)
    values = np.empty((len(frame), len(texts)), dtype=np.float32)
    step = len(texts) if kind == "prior" else TEXTS_AT_A_TIME
    for rows, images in image_batches(model, frame, cache, batch_size=batch_size):
        with inference(model, "float32") as where:
            for first in range(0, len(texts), step):
                columns = slice(first, first + step)
                block = kinds[kind](images, select(encoded.features, columns).to(where))
                values[rows, columns] = block.float().cpu().numpy()
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"similarity of study {frame['study_id'].iloc[row]} with {texts[column]!r} is not finite")
    return pd.DataFrame(values, index=pd.Index(frame["study_id"].astype(str), name="study_id"), columns=list(texts))


def scores(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    *,
    scoring: Scoring | Literal["prior"] = "max",
    normalise: Normalise = "none",
    kind: Similarity = "objective",
    batch_size: int = 64,
) -> pd.DataFrame:
    """Score of every study (index: study_id) for every label of `prompts`; `kind` as in `similarities`.

    `scoring="prior"`: softmax over the K labels of the global similarity plus half that of the local one (PRIOR, Cheng
    et al. 2023, released zero-shot code), one prompt a label, for an objective that has it; labels compete.
    Scores order the studies of one label. They are no probabilities, and without `normalise="cohort"` their levels
    differ between labels.
    """
    texts = prompt_list(prompts)
    if scoring == "prior":
        scoring, kind = "max", "prior"
        if [len(side) for label in prompts for side in sides(prompts, label)[:1]] != [1] * len(texts):
            raise ValueError('scoring="prior" takes one prompt a label, a different one for each, and no negatives')
    similarity = similarities(model, frame, cache, texts, kind=kind, batch_size=batch_size)
    return combine(similarity, prompts, scoring=scoring, normalise=normalise)


def evaluate(
    scores: pd.DataFrame,
    frames: pd.DataFrame | Mapping[str, pd.DataFrame],
    targets: pd.DataFrame | None = None,
    *,
    macro: Sequence[str] = (),
    metrics: Sequence[Metric] = ("auroc",),
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Metric rows (target, metric, value, ci_low, ci_high, n, prevalence, note) of each label, then `macro`.

    `frames`: the studies to judge, all of those scored or some; or several sets of them by name, which a further column
    `dataset` tells apart. `targets`: by default those of `binary_targets`. Patients are resampled whole. A label with
    one class only has value NaN, and its `note` says why; the macro is the mean over those of its labels that have a
    value. Raises ValueError for a study without scores.
    """
    several, tables = isinstance(frames, Mapping), []
    for name, frame in frames.items() if several else [("", frames)]:
        own = _of_studies(scores, frame)
        truth = binary_targets(frame, list(scores)) if targets is None else targets.loc[own.index, list(scores)]
        options = {"groups": frame["patient_id"].astype(str), "n_bootstrap": n_bootstrap, "seed": seed}
        rows = metric_rows(truth, own, metrics=metrics, macro=macro, **options)
        tables.append(rows.assign(dataset=name) if several else rows)
    return pd.concat(tables, ignore_index=True)


def _of_studies(scores: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    studies = frame["study_id"].astype(str)
    missing = studies[~studies.isin(scores.index)]
    if len(missing):
        raise ValueError(f"{len(missing)} studies have no scores (study_id {', '.join(missing[:5])})")
    return scores.loc[studies]


def wording(similarity: pd.DataFrame, prompts: Prompts, targets: pd.DataFrame) -> pd.DataFrame:
    """AUROC of every positive prompt by itself: columns label, prompt, auroc, n, positives, note.

    NaN, and the reason in the note, where a label has one class only. `similarity`: of all prompts, from
    `similarities`.
    """
    labels, texts = zip(*((label, text) for label in prompts for text in sides(prompts, label)[0]), strict=True)
    known, values = targets.loc[similarity.index, list(labels)], similarity[list(texts)]
    rows = metric_rows(
        known.set_axis(range(len(texts)), axis=1), values.set_axis(range(len(texts)), axis=1), n_bootstrap=0
    )
    rows = rows.assign(label=labels, prompt=texts).rename(columns={"value": "auroc"})
    return rows[["label", "prompt", "auroc", "n", "positives", "note"]]


def compare_scorings(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    targets: pd.DataFrame,
    *,
    macro: Sequence[str] = (),
    batch_size: int = 64,
) -> pd.DataFrame:
    """AUROC of each label and `macro` (rows) by each scoring rule (columns) that has the prompts it needs.

    The last rules are `pair` with the papers' own sentences: `pair, no X` (CXR-CLIP) and `pair, BioViL`. Then n and
    positives of the label, and a note where it has no AUROC.
    """
    rules = {rule: (prompts, rule) for rule in scorings_of(prompts)}
    rules |= {"pair, no X": (no_x_prompts(prompts), "pair"), "pair, BioViL": (biovil_prompts(prompts), "pair")}
    texts = list(dict.fromkeys(text for written, _ in rules.values() for text in prompt_list(written)))
    similarity = similarities(model, frame, cache, texts, batch_size=batch_size)
    columns = {}
    for name, (written, rule) in rules.items():
        table = combine(similarity, written, scoring=rule)
        of_rule = [label for label in macro if label in written]
        rows = evaluate(table, frame, targets, macro=of_rule, n_bootstrap=0).set_index("target")
        columns[name] = rows["value"]
        columns.setdefault("counts", rows[["n", "positives", "note"]])
    counts = columns.pop("counts")
    return pd.DataFrame(columns).join(counts).reindex([*prompts, *(["macro"] if macro else [])])


def multiclass(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    labels: Sequence[str],
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int = 64,
) -> pd.DataFrame:
    """One among K, as the papers do it, on the studies of the frame that have exactly one of the labels.

    Protocols (column `protocol`): `gloria` takes the best prompt and standardises each class over the cohort,
    `cxr_clip` the mean of the global cosine, `prior` its own softmax of "X is observed" (its released code), where the
    objective has one.
    Rows as `multiclass_rows`; the metrics of `gloria` have plain names, others the protocol as a suffix. Empty for
    fewer than two labels that such a study has.
    """
    alone = exclusive_test_set(frame, labels=labels, per_class=None, seed=seed)
    positive = {label: sides(prompts, label)[0] for label in labels}
    protocols = {
        "gloria": (positive, {"scoring": "max", "normalise": "cohort"}),
        "cxr_clip": (positive, {"scoring": "mean", "kind": "global"}),
    }
    if hasattr(model.objective, "zero_shot_scores"):
        protocols["prior"] = ({label: [f"{label} is observed"] for label in labels}, {"scoring": "prior"})
    tables = [pd.DataFrame(columns=["protocol", *MULTICLASS_COLUMNS])]
    for protocol, (written, options) in protocols.items() if (alone[labels] == 1).any().sum() > 1 else ():
        answers = scores(model, alone, cache, written, batch_size=batch_size, **options)
        rows = multiclass_rows(answers, alone, n_bootstrap=n_bootstrap, seed=seed)
        suffix = "" if protocol == "gloria" else f"_{protocol}"
        tables.append(rows.assign(protocol=protocol, metric=rows["metric"] + suffix))
    return pd.concat(tables[1:] or tables, ignore_index=True)


MULTICLASS_COLUMNS = ["target", "metric", "value", "ci_low", "ci_high", "n", "patients", "chance", "note"]


def multiclass_rows(
    scores: pd.DataFrame, frame: pd.DataFrame, *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The label of the highest score as the answer, where each study has exactly one of the K labels.

    Rows: sensitivity, precision and F1 of each class, and as `macro` their means over the classes that have studies;
    as `macro` also accuracy (CXR-CLIP's micro) and Cohen's kappa (PRIOR). `n` counts the studies of the class. A class
    that is never the answer has precision 0. Chance is that of answers drawn uniformly. A tie goes to the first label.
    Raises ValueError for a study without scores, no studies, or the first study that does not have exactly one label.
    """
    labels, answer = list(scores.columns), _of_studies(scores, frame).to_numpy().argmax(axis=1)
    truth = binary_targets(frame, labels).to_numpy() == 1
    if not len(truth):
        raise ValueError("no studies to judge: the frame is empty")
    wrong = np.flatnonzero(truth.sum(axis=1) != 1)
    if len(wrong):
        study = frame["study_id"].iloc[wrong[0]]
        raise ValueError(f"study {study} has {truth[wrong[0]].sum()} of the {len(labels)} labels; it must have one")
    k = len(labels)
    cells = np.eye(k * k)[truth.argmax(axis=1) * k + answer]
    names = ["sensitivity", "precision", "f1", "accuracy", "kappa"]
    notes = ["" if any_study else "no study of this class" for any_study in truth.any(axis=0)]
    chance = {"chance": _of_confusion(np.tile(truth.sum(axis=0)[:, None] / k, (1, k))[None])[0]}
    options = {"groups": frame["patient_id"].astype(str), "n_bootstrap": n_bootstrap, "seed": seed}
    options |= {"macro": labels, "notes": notes, "columns": chance, "skip_undefined": True}

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _of_confusion((weights @ cells).reshape(-1, k, k))

    of_all = np.isin(names, ["accuracy", "kappa"])
    rows = bootstrap_rows(statistic, truth[:, :, None] | of_all, labels, names, **options)
    overall = rows["metric"].isin(["accuracy", "kappa"])
    return rows.loc[(rows["target"] == "macro") | ~overall, MULTICLASS_COLUMNS].reset_index(drop=True)


def _of_confusion(counts: np.ndarray) -> np.ndarray:
    """Counts of truth by answer (b, K, K) -> (b, K, 5): sensitivity, precision, F1, overall accuracy and kappa."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total, truth, said = counts.sum(axis=(1, 2)), counts.sum(axis=2), counts.sum(axis=1)
        correct = np.diagonal(counts, axis1=1, axis2=2)
        sensitivity = correct / truth
        precision = np.where(truth > 0, correct / np.maximum(said, 1e-12), np.nan)
        f1 = np.where(truth > 0, 2 * correct / (truth + said), np.nan)
        accuracy, expected = correct.sum(axis=1) / total, (truth * said).sum(axis=1) / total**2
        kappa = np.where(expected < 1, (accuracy - expected) / (1 - expected), np.nan)
    overall = (np.broadcast_to(values[:, None], truth.shape) for values in (accuracy, kappa))
    return np.stack([sensitivity, precision, f1, *overall], axis=2)
