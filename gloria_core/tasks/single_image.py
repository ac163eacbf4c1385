"""Zero-shot classification of a single image: its scores compared with those of a validation cohort, and maps.

The level of a zero-shot score depends on the finding, the wording and the model, so it is compared with the validation
split: the share of validation studies *without* the finding that score lower, and a probability by Platt's scaling
(Platt 1999: logistic regression on the score, with his smoothed targets). Both need validation labels only, and hold
for patients like those of the cohort, with its prevalence. A score that separates the classes badly changes the
probability little, however high it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import percentileofscore
from sklearn.linear_model import LogisticRegression
from torch import nn

from gloria_core.data.geometry import Geometry
from gloria_core.data.images import read_gray
from gloria_core.data.prompts import NO_FINDING
from gloria_core.tasks.classification.decisions import decision_rows, thresholds_of
from gloria_core.tasks.features import image_batches
from gloria_core.tasks.maps import kinds_of, phrase_maps
from gloria_core.tasks.phrases import Phrase
from gloria_core.tasks.zero_shot import Prompts, Scoring, combine, prompt_list, scores, sides, similarities
from gloria_core.types import Behavior

MIN_STUDIES = 5  # positives and negatives that a finding needs in validation to have a probability
UNCALIBRATED = f"no probability: validation has fewer than {MIN_STUDIES} studies with it, or without it"
# A finding stands out from this percentile among studies without it, if its odds have also risen by this factor.
MIN_PERCENTILE, MIN_ODDS_FACTOR = 0.9, 2.0
CAUTION = "This is the output of a research model, not a diagnosis."


@dataclass(frozen=True)
class Cohort:
    """Validation scores (`zero_shot.scores`) and targets (1, 0, NaN) of prompts by one scoring, (n, K) by study_id."""

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
        """The same for the probabilities, of the findings that have them."""
        probabilities = self.probabilities(self.scores).dropna(axis=1)
        return thresholds_of(self.targets[probabilities.columns], probabilities)

    def percentile(self, label: str, value: float) -> float:
        """Share of the validation studies without the finding that score lower, ties half; NaN without such studies."""
        return percentileofscore(self.scores[label][self.targets[label] == 0], value, kind="mean") / 100

    def probabilities(self, other: pd.DataFrame) -> pd.DataFrame:
        """Scores of other studies (columns as here) as probabilities by Platt's scaling, one curve a finding.

        NaN for a finding with fewer than `MIN_STUDIES` positives or negatives. The curve never falls: where higher
        scores mean the finding less often, the score is no evidence, and the probability is the prevalence.
        """
        columns = {}
        for label in other.columns:
            known, values = self.targets[label].notna(), other[label].to_numpy(dtype=float)
            y, score = (table.loc[known, label].to_numpy(dtype=float) for table in (self.targets, self.scores))
            positive, negative = (y == 1).sum(), (y == 0).sum()
            if min(positive, negative) < MIN_STUDIES:
                columns[label] = float("nan")
                continue
            middle, spread = score.mean(), score.std() or 1.0
            x, asked = (((part - middle) / spread)[:, None] for part in (score, values))
            # Platt's targets lie between 0 and 1: each study counts as positive by this weight, as negative by the rest
            weight = np.where(y == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
            both, weights = np.concatenate([x, x]), np.concatenate([weight, 1 - weight])
            fit = LogisticRegression(C=1e6).fit(both, np.repeat([1, 0], len(x)), sample_weight=weights)
            columns[label] = fit.predict_proba(asked)[:, 1] if fit.coef_[0, 0] > 0 else y.mean()
        return pd.DataFrame(columns, index=other.index)

    def decide(
        self,
        other: pd.DataFrame,
        targets: pd.DataFrame,
        frame: pd.DataFrame,
        *,
        macro: Sequence[str],
        n_bootstrap: int = 1000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Yes or no for the studies of a frame, from their scores, by the thresholds of validation.

        Rows of accuracy, F1, sensitivity and specificity as `decision_rows`, the metrics with suffix `_at_threshold`.
        """
        studies = frame["study_id"].astype(str)
        known, chances = targets.loc[studies, list(other)], self.probabilities(other.loc[studies])
        options = {"groups": frame["patient_id"], "n_bootstrap": n_bootstrap, "seed": seed}
        options |= {"metrics": ("accuracy", "f1", "sensitivity", "specificity"), "macro": macro}
        rows = decision_rows(known, chances, self.probability_thresholds, **options)
        notes = rows["note"].replace("not scored", UNCALIBRATED)
        return rows.assign(metric=rows["metric"] + "_at_threshold", note=notes)


@dataclass(frozen=True)
class Answer:
    """Result of `explain_image`.

    `text`: one or two sentences. `table`: one row a finding, those that stand out first: score, percentile,
    probability, prevalence, odds_factor (odds of the probability over those of the prevalence), threshold (of highest
    F1 in validation), n and positives (validation studies where it is known, and with it), stands_out (bool), prompt
    (its best); without a cohort, score and prompt. `image`: (H, W) uint8 as in the file. `maps`: for the first finding
    (H, W) values in pixels of the file, NaN outside what the model saw;
    empty where the objective has none. `map_kind`: "cosine", "attention" or "".
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
    targets: pd.DataFrame,
    *,
    scoring: Scoring = "against_normal",
    batch_size: int = 64,
) -> Cohort | None:
    """The cohort of a frame of validation studies; None where it has none. `targets`: of these or more studies."""
    if frame.empty:
        return None
    own = scores(model, frame, cache, prompts, scoring=scoring, batch_size=batch_size)
    return Cohort(prompts, scoring, own, targets.loc[own.index, list(prompts)])


def explain_image(
    model: nn.Module,
    image: str | Path | np.ndarray,
    prompts: Prompts,
    *,
    scoring: Scoring = "against_normal",
    cohort: Cohort | None = None,
    behavior: Behavior = "corrected",
) -> Answer:
    """Scores, comparison and maps of one radiograph: a PNG, JPEG or DICOM file, or its gray values (H, W) uint8.

    `cohort`: of the same prompts and scoring (`validation_cohort`); without one there are scores only. `behavior`: of
    the resizing, as in the cache that the model was trained on.
    The first finding has a map, the mean over the words of its best prompt: the cosine where the model has it (the only
    kind with a sign), else the attention.
    Raises ImageError for an unusable file, ValueError for a cohort of other prompts or scoring.
    """
    if cohort is not None and (cohort.scoring != scoring or dict(cohort.prompts) != dict(prompts)):
        raise ValueError("the cohort was scored with other prompts or another scoring; make one with these")
    gray = np.asarray(image) if isinstance(image, np.ndarray) else read_gray(image)
    geometry = Geometry.fit(*gray.shape, model.config.image_size, behavior=behavior)
    study, pixels = pd.DataFrame({"study_id": [""], "images": [""], "views": [""]}), {"": geometry.apply(gray)}
    similarity = similarities(model, study, pixels, prompt_list(prompts))
    best = {label: similarity[list(sides(prompts, label)[0])].iloc[0].idxmax() for label in prompts}
    table = _table(combine(similarity, prompts, scoring=scoring).iloc[0].to_dict(), best, cohort)
    kind = next((kind for kind in ("cosine", "attention") if kind in kinds_of(model)), "")
    first, maps = [label for label in table.index if label != NO_FINDING][:1] if kind else [], {}
    for label in first:
        _, features = next(image_batches(model, study, pixels))
        (grids,) = phrase_maps(model, features, [(0, Phrase.of_text(best[label], label))], [kind])
        maps[label] = geometry.map_to_original(grids[kind], crop=model.config.crop)
    return Answer(plain_answer(table, cohort), table, gray, maps, kind)


def plain_answer(table: pd.DataFrame, cohort: Cohort | None) -> str:
    """The table of an `Answer` in words."""
    findings = table.drop(index=NO_FINDING, errors="ignore")
    findings = table if findings.empty else findings
    first, name = findings.iloc[0], findings.index[0]
    if cohort is None:
        return (
            f"The image is most like the sentences for {name} (score {first['score']:.2f}). Without a validation "
            f"cohort it cannot be said whether that is high. {CAUTION}"
        )
    standing_out = list(findings.index[findings["stands_out"]])
    n = int((cohort.targets[name] == 0).sum())
    place = f"its score exceeds {100 * first['percentile']:.0f} % of the {n} validation studies without it"
    if not n:
        place = "there is no validation study without it to compare with"
    calibrated = f"probability {100 * first['probability']:.0f} %, where {100 * first['prevalence']:.0f} % have it"
    place += f"; {calibrated if np.isfinite(first['probability']) else UNCALIBRATED}"
    if not standing_out:
        normal = NO_FINDING in table.index and table.loc[NO_FINDING, "stands_out"]
        like = " The image is most like the sentences for a normal study." if normal else ""
        return f"Nothing stands out.{like} The nearest finding is {name}: {place}. {CAUTION}"
    others = f" So does, less: {', '.join(standing_out[1:])}." if len(standing_out) > 1 else ""
    return f"{name} stands out: {place}.{others} {CAUTION}"


def _table(values: dict[str, float], best: dict[str, str], cohort: Cohort | None) -> pd.DataFrame:
    table = pd.DataFrame({"score": values, "prompt": best})
    table.index.name = "finding"
    if cohort is None:
        return table.sort_values("score", ascending=False, kind="stable")
    table["percentile"] = [cohort.percentile(label, value) for label, value in values.items()]
    table["probability"] = cohort.probabilities(pd.DataFrame([values])).iloc[0]
    table["prevalence"], table["threshold"] = cohort.targets.mean(), pd.Series(cohort.thresholds)
    table["n"], table["positives"] = cohort.targets.notna().sum(), (cohort.targets == 1).sum()
    odds = table[["probability", "prevalence"]] / (1 - table[["probability", "prevalence"]])
    table["odds_factor"] = odds["probability"] / odds["prevalence"]
    table["stands_out"] = (table["percentile"] >= MIN_PERCENTILE) & (table["odds_factor"] >= MIN_ODDS_FACTOR)
    table = table.sort_values(["stands_out", "odds_factor", "percentile"], ascending=False, kind="stable")
    return table.assign(prompt=table.pop("prompt"))
