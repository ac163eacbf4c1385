"""Linear probe: what a frozen image encoder knows, read out by logistic regression at several label fractions.

One L2-regularised logistic regression a label (scikit-learn, lbfgs) on features standardised with the mean and
deviation of the training subset. The protocol is that of ConVIRT and GLoRIA: 1, 10 and 100 % of the training labels,
the whole validation and test split. All objectives see the same subsets, the same validation and the same grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from gloria_core.tasks.classification.label_policy import Uncertain, Unmentioned, binary_targets
from gloria_core.tasks.metrics import Metric, auroc, metric_rows

GOLDEN_RATIO = 0.6180339887498949
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Grid of scikit-learn's C (inverse of the L2 penalty) for standardised features; larger fits closer."""


def subset(frame: pd.DataFrame, fraction: float, seed: int = 0) -> pd.DataFrame:
    """Rows of split `train` with `(label_rank + seed * golden ratio) mod 1 < fraction`.

    Seed 0 is the manifest's own subset (`label_rank < fraction`); another seed turns the ranks, so that within a seed
    1 % lies inside 10 % inside 100 %, whole patients stay together, and multiples of the golden ratio keep small
    subsets of different seeds apart. Raises ValueError for a fraction outside (0, 1] or an empty subset.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    rank = (frame["label_rank"].to_numpy(dtype=float) + seed * GOLDEN_RATIO) % 1.0
    chosen = frame[(frame["split"] == "train").to_numpy() & (rank < fraction)]
    if not len(chosen):
        raise ValueError(
            f"no training study at fraction {fraction} with seed {seed}: {len(frame)} rows in the manifest"
        )
    return chosen


@dataclass(frozen=True)
class Probe:
    """A fitted probe: standardisation (Dg,), weights (K, Dg), bias (K,), and for each label why it has none, or ""."""

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    labels: tuple[str, ...]
    strength: float
    notes: tuple[str, ...]

    def scores(self, features: np.ndarray) -> pd.DataFrame:
        """(n, Dg) features -> (n, K) log odds; NaN throughout for a label that could not be fitted."""
        values = ((features - self.mean) / self.scale) @ self.weights.T + self.bias
        return pd.DataFrame(values, columns=list(self.labels))


def fit_probe(
    features: np.ndarray,
    targets: pd.DataFrame,
    *,
    strength: float | Sequence[float] = STRENGTHS,
    validation: tuple[np.ndarray, pd.DataFrame] | None = None,
    max_iter: int = 500,
) -> Probe:
    """Fit one logistic regression per column of `targets` (n, K; 1, 0, NaN = left out) on (n, Dg) features.

    Several strengths: the one with the highest mean validation AUROC over the labels, the smallest where they tie; one
    value for all labels, because at 1 % of labels a choice per label would be noise. A label whose known targets are
    all alike is not fitted: NaN scores, and a note that says so. lbfgs starts from zero and the problem is convex, so
    there is no random initialisation. Raises ValueError for several strengths without validation data.
    """
    strengths = (float(strength),) if isinstance(strength, int | float) else tuple(sorted(strength))
    if len(strengths) > 1 and validation is None:
        raise ValueError("several strengths need validation=(features, targets) to choose between them")
    if len(features) != len(targets):
        raise ValueError(f"{len(features)} rows of features, {len(targets)} rows of targets")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    inputs = ((features - mean) / scale).astype(np.float64)
    best: tuple[float, Probe] | None = None
    for value in strengths:
        weights, bias, notes = _fit_all(inputs, targets, value, max_iter)
        probe = Probe(mean, scale, weights, bias, tuple(targets.columns), value, notes)
        if len(strengths) == 1:
            return probe
        reached = _mean_auroc(probe, *validation)
        if best is None or reached > best[0] + 1e-12:
            best = (reached, probe)
    return best[1]


def linear_probe(
    features: np.ndarray,
    frame: pd.DataFrame,
    *,
    labels: Sequence[str],
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    seeds: Sequence[int] = (0,),
    macro: Sequence[str] = (),
    strength: float | Sequence[float] = STRENGTHS,
    policy: tuple[Unmentioned, Uncertain | Mapping[str, Uncertain]] = ("negative", "ignore"),
    metrics: Sequence[Metric] = ("auroc",),
    n_bootstrap: int = 1000,
) -> pd.DataFrame:
    """Probe at every fraction and seed, scored on split `test`: metric rows as `zero_shot.evaluate`, with more columns.

    features: (n, Dg), row for row the studies of `frame` (all splits, encoded once). Split `valid` chooses the
    strength. At fraction 1 every seed has the same subset: run once, under the first seed. The seed selects the
    training subset (`subset`) and nothing else; the bootstrap of the test set is the same for all rows.
    `policy` = (unmentioned, uncertain), see `targets.binary_targets`; it holds for training and scoring alike.
    More columns: label_fraction, seed, split, n_train, strength. Raises ValueError where a split is empty.
    """
    if len(features) != len(frame):
        raise ValueError(f"{len(features)} rows of features for {len(frame)} studies")
    frame = frame.reset_index(drop=True)
    targets = binary_targets(frame, labels, unmentioned=policy[0], uncertain=policy[1])
    test, valid = (frame.index[frame["split"] == split] for split in ("test", "valid"))
    if not len(test) or (not len(valid) and not isinstance(strength, int | float)):
        raise ValueError(f"the manifest has {len(test)} test and {len(valid)} validation studies; the probe needs both")
    patients, tables = frame["patient_id"].astype(str).to_numpy()[test], []
    for fraction in fractions:
        for seed in seeds if fraction < 1 else seeds[:1]:
            rows = subset(frame, fraction, seed).index
            validation = (features[valid], targets.loc[valid])
            probe = fit_probe(features[rows], targets.loc[rows], strength=strength, validation=validation)
            table = metric_rows(
                targets.loc[test],
                probe.scores(features[test]),
                metrics=metrics,
                macro=macro,
                groups=patients,
                n_bootstrap=n_bootstrap,
            )
            table["note"] = _notes(table, probe)
            about = {"label_fraction": fraction, "seed": seed, "split": "test", "n_train": len(rows)}
            tables.append(table.assign(**about, strength=probe.strength))
    return pd.concat(tables, ignore_index=True)


def _notes(table: pd.DataFrame, probe: Probe) -> list[str]:
    """Why a label was not fitted, which says more than that it was not scored; else the metric's own note."""
    of_fit = dict(zip(probe.labels, probe.notes, strict=True))
    return [of_fit.get(target, "") or note for target, note in zip(table["target"], table["note"], strict=True)]


def _fit_all(
    inputs: np.ndarray, targets: pd.DataFrame, strength: float, max_iter: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    weights, bias, notes = [], [], []
    for label in targets.columns:
        y = targets[label].to_numpy(dtype=float)
        known = ~np.isnan(y)
        if len(np.unique(y[known])) < 2:
            weights.append(np.full(inputs.shape[1], np.nan))
            bias.append(np.nan)
            notes.append(f"not fitted: {int(np.nansum(y))} positive of {int(known.sum())} training studies")
            continue
        model = LogisticRegression(C=strength, max_iter=max_iter)
        with warnings.catch_warnings():
            # an unconverged fit is still a probe; it is said in the note rather than once a label on the screen
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(inputs[known], y[known].astype(int))
        weights.append(model.coef_[0])
        bias.append(model.intercept_[0])
        notes.append(f"stopped at {max_iter} iterations" if model.n_iter_[0] >= max_iter else "")
    return np.stack(weights), np.array(bias), tuple(notes)


def _mean_auroc(probe: Probe, features: np.ndarray, targets: pd.DataFrame) -> float:
    scores = probe.scores(features)
    fitted = [label for label in probe.labels if not scores[label].isna().any()]
    found = np.array([auroc(targets[label].to_numpy(), scores[label].to_numpy()) for label in fitted], dtype=float)
    return float(np.nanmean(found)) if np.isfinite(found).any() else 0.5
