"""Decisions at a threshold, and calibration of probabilities.

The threshold is chosen on the validation split, where it has the highest F1, and applied to the test split. Calibration
is the expected calibration error (Naeini et al., AAAI 2015; Guo et al., ICML 2017) with bins of equal width, for the
probability of the positive class.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve

from gloria_core.tasks.metrics import bootstrap_rows

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
    """`best_threshold` of every label, from validation targets and scores (n, K) with the same columns.

    A study without a score counts as one without a target, so that a label that could not be fitted has NaN.
    """
    known = targets[scores.columns].where(scores.notna().to_numpy())
    return {label: best_threshold(known[label], scores[label].fillna(0.0)) for label in scores.columns}


def reliability(y: Sequence[float], probability: Sequence[float], *, bins: int = BINS) -> pd.DataFrame:
    """For each bin of predicted probability that holds a study: mean prediction, observed frequency, and count n.

    Bins are [0, 1/bins), ..., the last one closed. Columns: confidence, frequency, n.
    """
    table = pd.DataFrame({"confidence": np.asarray(probability, float), "frequency": np.asarray(y, float)}).dropna()
    numbers = _bins(table["confidence"].to_numpy(), bins)
    return table.groupby(numbers).mean().assign(n=np.unique(numbers, return_counts=True)[1]).reset_index(drop=True)


def _bins(probability: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Number of the bin of each probability (n,). Raises ValueError for one outside [0, 1]."""
    if len(probability) and not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError(
            f"probabilities must lie in [0, 1]; they are {probability.min():.3g} to {probability.max():.3g}"
        )
    return np.minimum((probability * bins).astype(int), bins - 1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


# of weighted counts (b,): true and false positives, false and true negatives, and sum (p - y) in each bin (b, BINS)
_FORMULAS: dict[str, Callable[..., np.ndarray]] = {
    "accuracy": lambda tp, fp, fn, tn, gaps: _ratio(tp + tn, tp + fp + fn + tn),
    "balanced_accuracy": lambda tp, fp, fn, tn, gaps: (_ratio(tp, tp + fn) + _ratio(tn, tn + fp)) / 2,
    "f1": lambda tp, fp, fn, tn, gaps: np.where(tp + fn > 0, _ratio(2 * tp, 2 * tp + fp + fn), np.nan),
    "sensitivity": lambda tp, fp, fn, tn, gaps: _ratio(tp, tp + fn),
    "specificity": lambda tp, fp, fn, tn, gaps: _ratio(tn, tn + fp),
    "ece": lambda tp, fp, fn, tn, gaps: _ratio(np.abs(gaps).sum(axis=1), tp + fp + fn + tn),
}
DECISIONS = tuple(_FORMULAS)


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
    """One row per label and metric with 95 % interval, and `macro`; see `metrics.bootstrap_rows`.

    targets (n, K): 1, 0, NaN = left out; probabilities (n, K) in [0, 1]; `thresholds` by label, in probability. A study
    at or above the threshold is called positive. Not defined, and NaN: everything for a label without threshold or
    scores, F1 and sensitivity without a positive, specificity without a negative. Precision 0 / 0 counts as 0 in F1.
    Columns as `metrics.metric_rows`, and `chance`: for accuracy that of the majority class, else NaN.
    Raises ValueError for a probability outside [0, 1].
    """
    labels = list(probabilities.columns)
    known, tables, notes, prevalence = targets[labels].notna().to_numpy(), [], [], []
    for k, label in enumerate(labels):
        y, p = (part[label].to_numpy(dtype=float)[known[:, k]] for part in (targets, probabilities))
        threshold = thresholds.get(label, float("nan"))
        note = "no threshold: validation does not have both classes" if np.isnan(threshold) else ""
        note = "not scored" if np.isnan(p).any() else note
        notes.append(note if len(y) else "no study with a known label")
        prevalence.append(y.mean() if len(y) else np.nan)
        if notes[-1]:
            tables.append(None)
            continue
        called = p >= threshold
        counts = (y * called, (1 - y) * called, y * ~called, (1 - y) * ~called)
        tables.append(np.column_stack([*counts, np.eye(BINS)[_bins(p)] * (p - y)[:, None]]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = np.full((len(weights), len(labels), len(metrics)), np.nan)
        for k, table in enumerate(tables):
            if table is not None:
                sums = weights[:, known[:, k]].astype(float) @ table
                values[:, k] = np.column_stack([_FORMULAS[m](*sums[:, :4].T, sums[:, 4:]) for m in metrics])
        return values

    prevalence = np.array(prevalence)
    chance = np.where(np.array(metrics) == "accuracy", np.maximum(prevalence, 1 - prevalence)[:, None], np.nan)
    rows = bootstrap_rows(
        statistic,
        known,
        labels,
        metrics,
        macro=[label for label in macro if label in labels],
        notes=notes,
        columns={"prevalence": prevalence, "chance": chance},
        classes=[targets[labels].to_numpy() == value for value in (1, 0)],
        groups=groups,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    most = max((known[:, labels.index(label)].sum() for label in macro if label in labels), default=0)
    return rows.assign(n=rows["n"].mask(rows["target"] == "macro", most))
