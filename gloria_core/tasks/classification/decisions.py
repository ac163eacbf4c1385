"""From scores to yes and no, and whether a probability means what it says.

A threshold belongs to the validation split: there it is the one of highest F1, and the test split is only ever judged
with it. Calibration is the expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017) with bins of
equal width, computed for the probability of the positive class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve

from gloria_core.tasks.metrics import interval, resamples

DECISIONS = ("accuracy", "balanced_accuracy", "f1", "sensitivity", "specificity", "ece")
COLUMNS = ["target", "metric", "value", "ci_low", "ci_high", "n", "prevalence", "note"]
BINS = 10


def best_threshold(y: Sequence[float], score: Sequence[float]) -> float:
    """The score at and above which calling positive gives the highest F1 (n,); NaN targets are left out.

    Of several, the highest threshold. NaN where only one class is known.
    """
    y, score = np.asarray(y, dtype=float), np.asarray(score, dtype=float)
    known = ~np.isnan(y)
    if len(np.unique(y[known])) < 2:
        return float("nan")
    precision, recall, thresholds = precision_recall_curve(y[known], score[known])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = np.flatnonzero(f1[:-1] >= f1[:-1].max() - 1e-12)
    return float(thresholds[best[-1]])


def thresholds_of(targets: pd.DataFrame, scores: pd.DataFrame) -> dict[str, float]:
    """`best_threshold` of every label, from validation targets and scores (n, K) with the same columns."""
    return {label: best_threshold(targets[label], scores[label]) for label in scores.columns}


def reliability(y: Sequence[float], probability: Sequence[float], *, bins: int = BINS) -> pd.DataFrame:
    """For each bin of predicted probability that holds a study: mean prediction, observed frequency, and count n.

    Bins are [0, 1/bins), ..., the last one closed. Columns: confidence, frequency, n.
    """
    y, probability = np.asarray(y, dtype=float), np.asarray(probability, dtype=float)
    known = ~np.isnan(y)
    y, probability = y[known], probability[known]
    _check_probabilities(probability)
    where = np.minimum((probability * bins).astype(int), bins - 1)
    table = pd.DataFrame({"bin": where, "confidence": probability, "frequency": y})
    found = table.groupby("bin").agg(
        confidence=("confidence", "mean"), frequency=("frequency", "mean"), n=("bin", "size")
    )
    return found.reset_index(drop=True)


def decision_rows(
    targets: pd.DataFrame,
    probabilities: pd.DataFrame,
    thresholds: Mapping[str, float],
    *,
    macro: Sequence[str] = (),
    metrics: Sequence[str] = DECISIONS,
    groups: Sequence[object] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per label and metric with 95 % interval, and `macro`: the mean over the labels named in it.

    targets (n, K): 1, 0, NaN = left out; probabilities (n, K) in [0, 1]; `thresholds` by label, in probability. A study
    at or above the threshold is called positive. Not defined, and NaN: everything for a label without threshold or
    scores, F1 and sensitivity without a positive, specificity without a negative. Precision 0 / 0 counts as 0 in F1.
    Columns as `metrics.metric_rows`, and `chance`: for accuracy that of the majority class, else NaN.
    Raises ValueError for an unknown metric or a probability outside [0, 1].
    """
    unknown = [name for name in metrics if name not in DECISIONS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; available: {', '.join(DECISIONS)}")
    labels = list(probabilities.columns)
    judged = [_Decided(targets[name], probabilities[name], thresholds.get(name, float("nan"))) for name in labels]
    point = np.array([[judge(np.ones((1, len(targets))), m)[0] for m in metrics] for judge in judged])
    blocks = [np.full((0, len(labels), len(metrics)), np.nan)]
    for weights in resamples(len(targets), groups=groups, n_bootstrap=n_bootstrap, seed=seed):
        blocks.append(np.stack([np.stack([judge(weights, m) for m in metrics], axis=1) for judge in judged], axis=1))
    drawn, rows = np.concatenate(blocks), []
    for k, (label, judge) in enumerate(zip(labels, judged, strict=True)):
        majority = max(judge.prevalence, 1 - judge.prevalence)
        for m, metric in enumerate(metrics):
            limits = interval(drawn[:, k, m] if np.isfinite(point[k, m]) else np.array([]))
            chance = majority if metric == "accuracy" else float("nan")
            rows.append((label, metric, point[k, m], *limits, judge.n, judge.prevalence, judge.note, chance))
    chosen = [k for k, label in enumerate(labels) if label in macro]
    for m, metric in enumerate(metrics if chosen else ()):
        defined = [k for k in chosen if np.isfinite(point[k, m])]
        value = point[defined, m].mean() if defined else float("nan")
        limits = interval(drawn[:, defined, m].mean(axis=1) if defined else np.array([]))
        note = f"mean over {len(defined)} of {len(macro)} labels"
        n = max((judged[k].n for k in chosen), default=0)
        rows.append(("macro", metric, value, *limits, n, float("nan"), note, float("nan")))
    return pd.DataFrame(rows, columns=[*COLUMNS, "chance"])


class _Decided:
    """One label's targets and decisions; calling it with (b, n) weights gives b values of a metric."""

    def __init__(self, y: pd.Series, probability: pd.Series, threshold: float) -> None:
        y, p = y.to_numpy(dtype=float), probability.to_numpy(dtype=float)
        self.known = ~np.isnan(y)
        self.y, self.p, self.n = y[self.known], p[self.known], int(self.known.sum())
        self.prevalence = float(self.y.mean()) if self.n else float("nan")
        self.note = ""
        if not self.n:
            self.note = "no study with a known label"
        elif np.isnan(self.p).any():
            self.note = "not scored"
        elif np.isnan(threshold):
            self.note = "no threshold: one class only in validation"
        else:
            _check_probabilities(self.p)
            self.called = self.p >= threshold
            self.bins = np.minimum((self.p * BINS).astype(int), BINS - 1)

    def __call__(self, weights: np.ndarray, metric: str) -> np.ndarray:
        if self.note:
            return np.full(len(weights), np.nan)
        weights = weights[:, self.known].astype(float)
        if metric == "ece":
            gap = np.stack([(weights * (self.bins == b)) @ (self.p - self.y) for b in range(BINS)])
            return _ratio(np.abs(gap).sum(axis=0), weights.sum(axis=1))
        yes, no = self.y == 1, self.y == 0
        counts = (yes & self.called, no & self.called, yes & ~self.called, no & ~self.called)
        return _FORMULAS[metric](*(weights @ part for part in counts))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)


_FORMULAS: dict[str, Callable[..., np.ndarray]] = {  # of true and false positives, false and true negatives
    "accuracy": lambda tp, fp, fn, tn: _ratio(tp + tn, tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn: (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
    "f1": lambda tp, fp, fn, tn: np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
    "sensitivity": lambda tp, fp, fn, tn: _ratio(tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn: _ratio(tn, tn + fp),
}


def _check_probabilities(values: np.ndarray) -> None:
    if len(values) and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1]; found {values.min():.3g} to {values.max():.3g}")
