"""Linear probe: logistic regression on the features of a frozen image encoder, at several label fractions.

One L2-regularised logistic regression a label (scikit-learn, lbfgs) on features standardised with the mean and
deviation of the training subset; protocol of `label_efficiency`. All models get the same subsets, the same validation
split and the same grid of regularisation strengths.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.tasks.label_efficiency import LabelEfficiency
from gloria_core.tasks.metrics import Metric, metric_rows

# Grid of scikit-learn's C (inverse of the L2 penalty) for standardised features; a larger one fits closer.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# C where the validation split cannot choose: it has no study, or no label with both classes.
FIXED_STRENGTH = 1e-2


@dataclass(frozen=True)
class Probe:
    """A fitted probe: standardisation (Dg,), weights (K, Dg), bias (K,), and per label why it was not fitted, or ""."""

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

    def probabilities(self, features: np.ndarray) -> pd.DataFrame:
        """(n, Dg) features -> (n, K) in [0, 1]; NaN as in `scores`."""
        return 1 / (1 + np.exp(-self.scores(features)))

    def classifier(self, encoder: nn.Module) -> ImageClassifier:
        """The probe on a copy of the image encoder whose features it was fitted to."""
        network = ImageClassifier(copy.deepcopy(encoder), len(self.labels), probe=True)
        for name, buffer in network.classifier.named_buffers():
            buffer.copy_(torch.from_numpy(getattr(self, name)))
        return network


def fit_probe(
    features: np.ndarray,
    targets: pd.DataFrame,
    *,
    strength: float | Sequence[float] = STRENGTHS,
    validation: tuple[np.ndarray, pd.DataFrame] | None = None,
    max_iter: int = 500,
) -> Probe:
    """Fit one logistic regression per column of `targets` (n, K; 1, 0, NaN = left out) on (n, Dg) features.

    Several strengths: the one with the highest mean validation AUROC over the labels, the smallest of equals. It is one
    value for all labels, because at 1 % of the labels a choice per label would be noise. A label with only one class is
    not fitted: NaN scores, and a note. lbfgs starts from zero and the problem is convex: nothing is random.
    Raises ValueError for several strengths without validation data.
    """
    strengths = (float(strength),) if isinstance(strength, int | float) else tuple(sorted(strength))
    if len(strengths) > 1 and validation is None:
        raise ValueError("several strengths need validation=(features, targets) to choose between them")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    inputs = ((features - mean) / scale).astype(np.float64)
    best, chosen = -np.inf, None
    for value in strengths:
        fits = [_fit_label(inputs, targets[label].to_numpy(dtype=float), value, max_iter) for label in targets.columns]
        weights, bias, notes = zip(*fits, strict=True)
        probe = Probe(mean, scale, np.stack(weights), np.array(bias), tuple(targets.columns), value, notes)
        reached = mean_auroc(probe, *validation) if len(strengths) > 1 else 0.0
        if reached > best + 1e-12:
            best, chosen = reached, probe
    return chosen


def _fit_label(inputs: np.ndarray, y: np.ndarray, strength: float, max_iter: int) -> tuple[np.ndarray, float, str]:
    """Weights (Dg,), bias and note of one label; y (n,): 1, 0, NaN."""
    known = ~np.isnan(y)
    if len(np.unique(y[known])) < 2:
        note = f"not fitted: {int(np.nansum(y))} positive of {int(known.sum())} training studies"
        return np.full(inputs.shape[1], np.nan), np.nan, note
    model = LogisticRegression(C=strength, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the note says it
        model.fit(inputs[known], y[known].astype(int))
    note = f"stopped at {max_iter} iterations" if model.n_iter_[0] >= max_iter else ""
    return model.coef_[0], model.intercept_[0], note


def mean_auroc(probe: Probe, features: np.ndarray, targets: pd.DataFrame) -> float:
    """Mean AUROC over the labels that have one; 0.5 where none has."""
    rows = metric_rows(targets, probe.scores(features), n_bootstrap=0)
    return 0.5 if rows["value"].isna().all() else float(rows["value"].mean())


def linear_probe(
    features: np.ndarray,
    frame: pd.DataFrame,
    targets: pd.DataFrame,
    protocol: LabelEfficiency,
    *,
    metrics: Sequence[Metric] = ("auroc",),
) -> tuple[pd.DataFrame, dict[tuple[float, int], Probe]]:
    """Probe every training subset of `protocol`: rows of `metric_rows` with the columns of `LabelEfficiency`, and
    strength; and the probes by (fraction, subset).

    features (n, Dg) and targets (n, K) (`label_policy.binary_targets`) belong to the studies of `frame`, all splits, in
    its order. Split `valid` chooses the strength among `STRENGTHS` where it can, else it is `FIXED_STRENGTH`.
    """
    if not len(features) == len(frame) == len(targets):
        raise ValueError(f"{len(features)} rows of features and {len(targets)} of targets for {len(frame)} studies")
    patients, targets = frame["patient_id"].astype(str).to_numpy(), targets.reset_index(drop=True)
    valid = np.flatnonzero(frame["split"] == "valid")
    strength = STRENGTHS if (targets.loc[valid].nunique() == 2).any() else FIXED_STRENGTH

    def fit(train: np.ndarray, subset: int) -> Probe:
        validation = features[valid], targets.loc[valid]
        return fit_probe(features[train], targets.loc[train], strength=strength, validation=validation)

    def score(probe: Probe, rows: np.ndarray) -> pd.DataFrame:
        options = {"metrics": metrics, "groups": patients[rows], **protocol.options}
        table = metric_rows(targets.loc[rows], probe.scores(features[rows]), **options)
        # why a label was not fitted says more than that it was not scored
        not_fitted = dict(zip(probe.labels, probe.notes, strict=True))
        notes = [not_fitted.get(t) or note for t, note in zip(table["target"], table["note"], strict=True)]
        return table.assign(note=notes, strength=probe.strength)

    return protocol.run(frame, fit, targets=targets, score=score)
