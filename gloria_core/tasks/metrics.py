"""Metric tables with bootstrap intervals: one resampling for all tasks, and the ranking metrics AUROC and AUPRC.

Intervals are percentile bootstrap (Efron 1979): samples, or whole patients where patient ids are given, are drawn with
replacement. A resample is a row of counts, not a copy of the data, so a metric is a function of weights (`Statistic`).

AUROC is the probability that a positive study outscores a negative one, ties counting half (Hanley and McNeil 1982).
AUPRC is average precision, the step-wise sum without interpolation that scikit-learn uses. Scores are sorted once, and
every resample is then a weighted metric: 1000 resamples of 2000 studies and 14 labels cost about a second.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

Metric = Literal["auroc", "auprc"]
# Patients of each class below which a metric that compares classes has no interval: of m patients, about exp(-m) of
# the resamples hold none. At 5 these are 0.7 %, well below the 2.5 % of a tail; at 3 they are 5 %.
MIN_PER_CLASS = 5
ENDS = 50 * (1 - 0.95), 50 * (1 + 0.95)  # percentiles between which an interval of 95 % lies
# Patients below which nothing has an interval: of two, every second resample is one of them alone.
MIN_PATIENTS = 3
# Weights of n samples (b, n) -> values (b, ...), one for each row of weights.
Statistic = Callable[[np.ndarray], np.ndarray]


def resamples(
    n: int, *, groups: Sequence[object] | None = None, n_bootstrap: int = 1000, seed: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap counts in blocks (b, n) of float32: how often each sample is in each resample.

    With `groups` (patient ids) whole groups are drawn, so that studies of one patient stay together. The draws depend
    on the seed, n and the groups only; blocks need about 64 MB.
    """
    if groups is not None and len(groups) != n:
        raise ValueError(f"{len(groups)} group ids for {n} studies")
    codes = np.arange(n) if groups is None else np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    units = int(codes.max()) + 1 if n else 0
    if not units:
        return
    rng, block = np.random.default_rng(seed), max(1, 16_000_000 // n)
    for first in range(0, n_bootstrap, block):
        rows = min(block, n_bootstrap - first)
        drawn = rng.integers(units, size=(rows, units)) + np.arange(rows)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)
        yield counts.astype(np.float32)[:, codes]


def ratio_of_sums(above: np.ndarray, below: np.ndarray) -> Statistic:
    """The statistic sum(w * above) / sum(w * below), NaN where the lower sum is zero: a mean, a share, a pooled Dice.

    Shape: above (n, ...), below of the same shape or one that broadcasts to it -> values (b, ...)
    """
    n, *shape = above.shape
    above, below = (
        np.broadcast_to(np.asarray(part, dtype=float), (n, *shape)).reshape(n, int(np.prod(shape)))
        for part in (above, below)
    )

    def statistic(weights: np.ndarray) -> np.ndarray:
        over, under = weights @ above, weights @ below
        values = np.divide(over, under, out=np.full(over.shape, np.nan), where=under > 0)
        return values.reshape(len(weights), *shape)

    return statistic


def bootstrap_rows(
    statistic: Statistic,
    counted: np.ndarray,
    targets: Sequence[str],
    metrics: Sequence[str],
    *,
    macro: Sequence[str] = (),
    notes: Sequence[str] | np.ndarray | None = None,
    columns: Mapping[str, np.ndarray] | None = None,
    classes: Sequence[np.ndarray] = (),
    groups: Sequence[object] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
    skip_undefined: bool = False,
) -> pd.DataFrame:
    """One row per target and metric with 95 % interval, then one row `macro` per metric: the mean over `macro`.

    `statistic` maps weights (b, n) to values (b, K, M). All targets and metrics share the resamples, so that the macro
    interval contains the correlation between targets. The macro leaves out targets without a value, and its note says
    how many counted. A resample in which a target of the macro is undefined is left out of the macro's interval; with
    `skip_undefined` it contributes the mean of the other targets.

    `counted`: samples that count, (n, K) or (n, K, M) bool; `n` is their number, for the macro that of samples that
    count for any of its targets. `notes`: (K,) or (K, M), written beside the row. `columns`: name -> (K,) or (K, M),
    further columns; the macro has the mean over the targets that counted. `classes`: masks (n, K) of samples that the
    metrics compare, for instance the positives and the negatives.
    The note also says where all resamples agree, so that the interval has no width and says nothing.
    NaN bounds, and the reason in the note: with fewer than `MIN_PATIENTS` patients among the samples that count, or
    `MIN_PER_CLASS` among those of a class; for a macro of such a target. Without `groups` a sample is a patient.
    `groups`, `n_bootstrap`, `seed`: see `resamples`.
    Columns: target, metric, value, ci_low, ci_high, n, positives (samples of the first of `classes`, where given),
    patients, the further columns, note. KeyError for an unknown macro target.
    """
    targets, columns = list(targets), dict(columns or {})
    unknown = [name for name in macro if name not in targets]
    if unknown:
        raise KeyError(f"macro label {unknown[0]!r} is not among {', '.join(map(str, targets))}")
    size, shape = len(counted), (len(targets), len(metrics))

    def by_target(values: Sequence[object] | np.ndarray, kind: type) -> np.ndarray:
        values = np.asarray(values, dtype=kind)
        return np.broadcast_to(values if values.ndim == 2 else values[:, None], shape)

    counted = np.asarray(counted, dtype=bool)
    counted = np.broadcast_to(counted if counted.ndim == 3 else counted[..., None], (size, *shape))
    notes = by_target([""] * len(targets) if notes is None else notes, object)
    columns = {name: by_target(values, float) for name, values in columns.items()}
    value = statistic(np.ones((1, size)))[0]
    blocks = [statistic(weights) for weights in resamples(size, groups=groups, n_bootstrap=n_bootstrap, seed=seed)]
    drawn = np.concatenate(blocks) if blocks else np.empty((0, *shape))
    patients = np.arange(size) if groups is None else np.asarray(groups, dtype=str)

    def too_few(k: int, m: int) -> str:
        for mask in [None, *classes] if len(drawn) else []:
            among, least = ("", MIN_PATIENTS) if mask is None else (" of a class", MIN_PER_CLASS)
            n = len(np.unique(patients[counted[:, k, m] & (True if mask is None else mask[:, k])]))
            if n < least:
                return f"no interval: {n} of {least} needed patients{among}"
        return ""

    averaged = [(target, [k], notes[k]) for k, target in enumerate(targets)]
    if macro:
        averaged.append(("macro", [targets.index(name) for name in macro], None))
    rows = []
    for target, members, note in averaged:
        for m, metric in enumerate(metrics):
            defined = [k for k in members if np.isfinite(value[k, m])]
            values, point = drawn[:0, 0, m], float("nan")
            if defined:
                values, point = drawn[:, defined, m], float(value[defined, m].mean())
                values = values[~np.isnan(values).all(axis=1)]
                values = (np.nanmean if skip_undefined else np.mean)(values, axis=1)
            shown = members if len(members) == 1 else defined
            text = f"mean over {len(defined)} of {len(members)} labels" if note is None else note[m]
            few = [reason for reason in (too_few(k, m) for k in defined) if reason]
            if few:
                values, text = values[:0], "; ".join(part for part in (text, few[0]) if part)
            samples = counted[:, members, m]
            values = values[~np.isnan(values)]  # resamples where the metric is not defined are left out
            low, high = np.percentile(values, ENDS).tolist() if len(values) else (np.nan, np.nan)
            if low == high:
                text = "; ".join(part for part in (text, "every resample gives this number") if part)
            row = {"target": target, "metric": metric, "value": point, "ci_low": low, "ci_high": high}
            row["n"] = int(samples.any(axis=1).sum())
            if classes:
                row["positives"] = int((samples & classes[0][:, members]).any(axis=1).sum())
            row["patients"] = len(np.unique(patients[samples.any(axis=1)]))
            row |= {name: float(column[shown, m].mean()) if shown else np.nan for name, column in columns.items()}
            rows.append(row | {"note": text})
    counts = ["n", *(["positives"] if classes else []), "patients"]
    return pd.DataFrame(rows, columns=["target", "metric", "value", "ci_low", "ci_high", *counts, *columns, "note"])


# ranking metrics of counts (b, m) of positives and negatives at the m distinct scores, in rising order
def _auroc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    below = negative.cumsum(axis=1) - 0.5 * negative
    return (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))


def _auprc(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    true, wrong = (part[:, ::-1].cumsum(axis=1) for part in (positive, negative))
    precision = true / np.maximum(true + wrong, 1e-12)
    average = (positive[:, ::-1] * precision).sum(axis=1) / positive.sum(axis=1)
    return np.where(negative.sum(axis=1) > 0, average, np.nan)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {"auroc": _auroc, "auprc": _auprc}


def _ranking(y: np.ndarray, scores: np.ndarray, metric: Metric) -> Statistic:
    """The statistic of known targets (n,) of 1 and 0, and scores (n,) that are finite: weights (b, n) -> (b,)."""
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], y[order]
    # where each run of equal scores starts
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        weights = weights[:, order]
        parts = weights * positive, weights * (1.0 - positive)
        if len(starts) < len(order):
            parts = tuple(np.add.reduceat(part, starts, axis=1) for part in parts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return _METRICS[metric](*parts)

    return statistic


def metric_rows(
    targets: pd.DataFrame,
    scores: pd.DataFrame,
    *,
    metrics: Sequence[Metric] = ("auroc",),
    macro: Sequence[str] = (),
    groups: Sequence[object] | None = None,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """AUROC and AUPRC of every label with 95 % interval, and `macro`; see `bootstrap_rows`.

    targets (n, K): 1, 0, NaN = left out; scores (n, K): the same columns and order of studies, NaN throughout for a
    label that is not scored. A label with one class only has value NaN, with fewer than `MIN_PER_CLASS` patients of a
    class it has no interval, and its `note` says why.
    Columns: target, metric, value, ci_low, ci_high, n, prevalence, note. Raises KeyError for an unknown label,
    ValueError for an unknown metric, other targets, other lengths, or a label that is scored in some studies only.
    """
    if len(targets) != len(scores):
        raise ValueError(f"{len(targets)} rows of targets, {len(scores)} rows of scores")
    for metric in metrics:
        if metric not in _METRICS:
            raise ValueError(f"unknown metric {metric!r}; available: {', '.join(_METRICS)}")
    labels = list(scores.columns)
    unknown = [label for label in [*labels, *macro] if label not in targets.columns or label not in labels]
    if unknown:
        raise KeyError(f"label {unknown[0]!r} is not in both targets and scores")
    y, known = targets[labels].to_numpy(dtype=float), targets[labels].notna().to_numpy()
    statistics, notes, prevalence = [], [], []
    for k, label in enumerate(labels):
        own, score = y[known[:, k], k], scores[label].to_numpy(dtype=float)[known[:, k]]
        if not np.isin(own, (0.0, 1.0)).all():
            raise ValueError("targets must be 1, 0 or NaN; make targets of labels with label_policy.binary_targets")
        if np.isnan(score).any() and not np.isnan(score).all():
            raise ValueError("some scores are NaN; a label is scored for every study or for none")
        note = "no study with a known label" if not len(own) else "not scored" if np.isnan(score).any() else ""
        statistics.append(None if note else [_ranking(own, score, metric) for metric in metrics])
        one_class = not note and own.min() == own.max()
        notes.append(f"only {'positive' if own[0] else 'negative'} studies" if one_class else note)
        prevalence.append(own.mean() if len(own) else np.nan)

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = np.full((len(weights), len(labels), len(metrics)), np.nan)
        for k, of_label in enumerate(statistics):
            for m, of_metric in enumerate(of_label or ()):
                values[:, k, m] = of_metric(weights[:, known[:, k]])
        return values

    classes = [targets[labels].to_numpy() == value for value in (1, 0)]
    options = {"groups": groups, "n_bootstrap": n_bootstrap, "seed": seed}
    options |= {"macro": macro, "notes": notes, "columns": {"prevalence": np.array(prevalence)}, "classes": classes}
    return bootstrap_rows(statistic, known, labels, metrics, **options)
