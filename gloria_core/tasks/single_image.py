"""One radiograph, a plain answer: scores put beside those of a validation cohort, and the map of what was found.

A zero-shot score alone says nothing to a reader: its level depends on the finding, the wording and the model. Beside
the validation split it does: there is the share of validation studies *without* the finding that score lower, and a
probability by Platt's scaling (Platt 1999: logistic regression on the score, with his smoothed targets). Both use
validation labels and no others, and both hold for patients like those of the cohort, with its prevalence. A score that
tells the sick from the well badly moves the probability little, however high it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from gloria_core.data.geometry import Geometry, center_crop
from gloria_core.data.images import read_gray, to_tensor
from gloria_core.tasks.classification.decisions import thresholds_of
from gloria_core.tasks.classification.label_policy import Uncertain, Unmentioned, binary_targets
from gloria_core.tasks.features import EncodedTexts, inference, select, text_features
from gloria_core.tasks.maps import Kind, kinds_of, maps
from gloria_core.tasks.zero_shot import NORMAL, Prompts, Scoring, combine, prompt_list, scores, sides
from gloria_core.training.precision import Precision
from gloria_core.types import Behavior, ImageFeatures

FEWEST = 5
"""Positives and negatives that a finding needs in validation to be given a probability."""
REMARKABLE = (0.9, 2.0)
"""A finding stands out from this percentile among those without it, if its odds have also risen by this factor."""
CAUTION = "This is the output of a research model, not a diagnosis."


@dataclass(frozen=True)
class Cohort:
    """Validation scores (n, K) and targets (n, K; 1, 0, NaN) of prompts under a scoring, to compare with."""

    prompts: Prompts
    scoring: Scoring
    scores: pd.DataFrame
    targets: pd.DataFrame

    @property
    def thresholds(self) -> dict[str, float]:
        """Score of highest F1 for each finding; NaN where validation knows one class only."""
        return thresholds_of(self.targets, self.scores)

    @property
    def probability_thresholds(self) -> dict[str, float]:
        """The same as probabilities, to judge those of other studies by; NaN where there are none."""
        own = self.probabilities(self.scores)
        known = [label for label in own.columns if own[label].notna().all()]
        return dict.fromkeys(own.columns, float("nan")) | thresholds_of(self.targets[known], own[known])

    def percentile(self, label: str, values: np.ndarray) -> np.ndarray:
        """Share of the validation studies without the finding that score lower, ties half; NaN without such studies."""
        without = np.sort(self.scores[label].to_numpy()[self.targets[label].to_numpy() == 0])
        if not len(without):
            return np.full(len(values), np.nan)
        return (np.searchsorted(without, values, "left") + np.searchsorted(without, values, "right")) / 2 / len(without)

    def probabilities(self, other: pd.DataFrame) -> pd.DataFrame:
        """Scores of other studies (columns as here) as probabilities by Platt's scaling, one curve a finding.

        NaN for a finding with fewer than `FEWEST` positives or negatives. The curve never falls: where higher scores
        mean the finding less often, the score is no evidence, and the answer is the prevalence.
        """
        return pd.DataFrame(
            {label: self._platt(label, other[label].to_numpy(dtype=float)) for label in other.columns},
            index=other.index,
        )

    def _platt(self, label: str, values: np.ndarray) -> np.ndarray:
        y, score = self.targets[label].to_numpy(dtype=float), self.scores[label].to_numpy(dtype=float)
        y, score = y[~np.isnan(y)], score[~np.isnan(y)]
        positive, negative = (y == 1).sum(), (y == 0).sum()
        if min(positive, negative) < FEWEST:
            return np.full(len(values), np.nan)
        middle, spread = score.mean(), score.std() or 1.0
        high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
        weight = np.where(y == 1, high, low)
        x = ((score - middle) / spread)[:, None]
        fit = LogisticRegression(C=1e6).fit(
            np.concatenate([x, x]), np.repeat([1, 0], len(x)), sample_weight=np.concatenate([weight, 1 - weight])
        )
        if fit.coef_[0, 0] <= 0:
            return np.full(len(values), y.mean())
        return fit.predict_proba(((values - middle) / spread)[:, None])[:, 1]


@dataclass(frozen=True)
class Answer:
    """What `explain_one` found.

    `text`: one or two plain sentences. `table`: one row a finding, most remarkable first: score, percentile,
    probability, prevalence, odds_factor (odds of the probability over those of the prevalence), threshold (of highest
    F1 in validation), stands_out (bool), prompt (its best); without a cohort, score and prompt. `image`: (H, W) uint8
    as in the file. `maps`: for the mapped findings (H, W) values on the pixels of the file, NaN outside what the model
    saw; empty where the objective has none. `map_kind`: "cosine", "attention" or "".
    """

    text: str
    table: pd.DataFrame
    image: np.ndarray
    maps: Mapping[str, np.ndarray]
    map_kind: str


def validation_cohort(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    prompts: Prompts,
    *,
    scoring: Scoring = "against_normal",
    unmentioned: Unmentioned = "negative",
    uncertain: Uncertain | Mapping[str, Uncertain] = "ignore",
    batch_size: int = 64,
    precision: Precision = "auto",
) -> Cohort:
    """Score a validation frame that has a label column for every finding of `prompts`."""
    found = scores(model, frame, cache, prompts, scoring=scoring, batch_size=batch_size, precision=precision)
    targets = binary_targets(frame, list(prompts), unmentioned=unmentioned, uncertain=uncertain)
    return Cohort(prompts, scoring, found, targets.set_axis(found.index))


def explain_one(
    model: nn.Module,
    image: str | Path | np.ndarray,
    prompts: Prompts,
    *,
    scoring: Scoring = "against_normal",
    cohort: Cohort | None = None,
    mapped: int = 1,
    kind: Kind | None = None,
    behavior: Behavior = "corrected",
    precision: Precision = "auto",
) -> Answer:
    """What the prompts find in one radiograph: a PNG, JPEG or DICOM file, or its gray values (H, W) uint8.

    `cohort`: of the same prompts and scoring, see `validation_cohort`; without one there are scores only. `mapped`:
    how many findings, from the top, get a map; `kind`: of map, by default "cosine" where the model has it (the only
    one with a sign), else "attention". `behavior`: of the resizing, as in the cache that the model was trained on.
    The map is the mean over the words of the finding's best prompt.
    Raises ImageError for an unusable file, ValueError for a cohort of other prompts or scoring.
    """
    if cohort is not None and (cohort.scoring != scoring or dict(cohort.prompts) != dict(prompts)):
        raise ValueError("the cohort was scored with other prompts or another scoring; make one with these")
    gray = np.asarray(image) if isinstance(image, np.ndarray) else read_gray(image)
    geometry = Geometry.fit(*gray.shape, model.config.image_size, behavior=behavior)
    features = _encoded(model, geometry.apply(gray), precision)
    texts = text_features(model, prompt_list(prompts), precision=precision)
    with inference(model, None, "float32") as where:
        similarity = model.objective.similarity(features, texts.features.to(where)).float().cpu().numpy()
    # columns of `similarity` are the prompts as they were given, though published text may have been cleaned
    names = prompt_list(prompts)
    values = combine(similarity, names, prompts, scoring=scoring)[0]
    best = {label: max(sides(prompts, label)[0], key=lambda t: similarity[0, names.index(t)]) for label in prompts}
    table = _table(dict(zip(prompts, values, strict=True)), best, cohort)
    shown, wanted = {}, [label for label in table.index if label != NORMAL][:mapped]
    kind = kind or next((k for k in ("cosine", "attention") if k in kinds_of(model)), None)
    for label in wanted if kind else ():
        grid = _prompt_map(model, features, texts, names.index(best[label]), kind)
        shown[label] = geometry.map_to_original(grid, crop=model.config.crop)
    return Answer(plain_answer(table, cohort), table, gray, shown, kind or "")


def plain_answer(table: pd.DataFrame, cohort: Cohort | None) -> str:
    """The table of an `Answer` in words."""
    findings = table.drop(index=NORMAL, errors="ignore")
    first = findings.iloc[0]
    name = findings.index[0]
    if cohort is None:
        return (
            f"The image is most like the sentences for {name} (score {first['score']:.2f}). Without a validation "
            f"cohort nobody can say whether that is much. {CAUTION}"
        )
    remarkable = list(findings.index[findings["stands_out"]])
    n = int((cohort.targets[name] == 0).sum())
    place = f"its score exceeds {100 * first['percentile']:.0f} % of the {n} validation studies without it"
    if np.isfinite(first["probability"]):
        place += f"; probability {100 * first['probability']:.0f} %, where {100 * first['prevalence']:.0f} % have it"
    if not remarkable:
        normal = NORMAL in table.index and table.loc[NORMAL, "stands_out"]
        like = " The image is most like the sentences for a normal study." if normal else ""
        return f"Nothing stands out.{like} The nearest finding is {name}: {place}. {CAUTION}"
    others = f" So does, less: {', '.join(remarkable[1:])}." if len(remarkable) > 1 else ""
    return f"{name} stands out: {place}.{others} {CAUTION}"


def _table(values: dict[str, float], best: dict[str, str], cohort: Cohort | None) -> pd.DataFrame:
    table = pd.DataFrame({"score": values, "prompt": best})
    table.index.name = "finding"
    if cohort is None:
        return table.sort_values("score", ascending=False, kind="stable")
    columns = {
        "percentile": {label: cohort.percentile(label, np.array([value]))[0] for label, value in values.items()},
        "probability": cohort.probabilities(pd.DataFrame([values])).iloc[0].to_dict(),
        "prevalence": cohort.targets.mean().to_dict(),
        "threshold": cohort.thresholds,
    }
    table = table.assign(**{name: pd.Series(column) for name, column in columns.items()})
    odds = {name: table[name] / (1 - table[name]) for name in ("probability", "prevalence")}
    table["odds_factor"] = odds["probability"] / odds["prevalence"]
    table["stands_out"] = (table["percentile"] >= REMARKABLE[0]) & (table["odds_factor"] >= REMARKABLE[1])
    order = ["score", "percentile", "probability", "prevalence", "odds_factor", "threshold", "stands_out", "prompt"]
    return table.sort_values(["stands_out", "odds_factor", "percentile"], ascending=False, kind="stable")[order]


def _encoded(model: nn.Module, square: np.ndarray, precision: Precision) -> ImageFeatures:
    config = model.config
    with inference(model, None, precision) as where:
        pixels = to_tensor(center_crop(square, config.crop)[None], channels=config.channels, norm=config.norm)
        found = model.encode_images(pixels.to(where))
    extra = None if found.cls_attention is None else found.cls_attention.float()
    return ImageFeatures(found.pooled.float(), found.regions.float(), extra)


def _prompt_map(model: nn.Module, images: ImageFeatures, texts: EncodedTexts, row: int, kind: Kind) -> torch.Tensor:
    """(h, w): mean map over the words of one prompt, special tokens left out."""
    text = select(texts.features, [row])
    words = (text.word_mask & ~text.special_mask)[0]
    with inference(model, None, "float32") as where:
        rows = maps(model.objective, images, text.to(where), kind=kind)[0].double().cpu()
    return rows[: len(words)][words.cpu()].mean(dim=0)
