"""From label columns to what a classifier is asked: which studies are positive, which negative, which left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

Unmentioned = Literal["negative", "ignore"]
Uncertain = Literal["ignore", "positive", "negative"]

CHEXPERT_UNCERTAIN: dict[str, Uncertain] = {
    "Atelectasis": "positive",
    "Cardiomegaly": "negative",
    "Consolidation": "negative",
    "Edema": "positive",
    "Pleural Effusion": "positive",
}
"""What the released GLoRIA code makes of an uncertain CheXpert label, by class (datasets/image_dataset.py)."""


def binary_targets(
    frame: pd.DataFrame,
    labels: Sequence[str],
    *,
    unmentioned: Unmentioned = "negative",
    uncertain: Uncertain | Mapping[str, Uncertain] = "ignore",
) -> pd.DataFrame:
    """Label columns (1, 0, -1, blank) as 1.0, 0.0 or NaN; NaN means: this study is not asked about this label.

    `unmentioned` decides what a blank is. CheXpert's convention, and the default, is negative: a finding that the
    report does not mention is taken as absent. `uncertain` decides what -1 is, for all labels or by label.
    Raises KeyError for a label that is no column, ValueError for an unknown policy or another label value.
    """
    missing = [label for label in labels if label not in frame.columns]
    if missing:
        raise KeyError(f"no label column {missing[0]!r}; columns: {', '.join(map(str, frame.columns))}")
    if unmentioned not in ("negative", "ignore"):
        raise ValueError(f"unmentioned must be 'negative' or 'ignore', not {unmentioned!r}")
    replacement = {"ignore": np.nan, "positive": 1.0, "negative": 0.0}
    columns = {}
    for label in labels:
        policy = uncertain if isinstance(uncertain, str) else uncertain.get(label, "ignore")
        if policy not in replacement:
            raise ValueError(f"uncertain must be 'ignore', 'positive' or 'negative', not {policy!r} ({label})")
        values = pd.to_numeric(frame[label]).to_numpy(dtype=float, na_value=np.nan)
        wrong = ~(np.isnan(values) | np.isin(values, (-1, 0, 1)))
        if wrong.any():
            raise ValueError(
                f"label {label!r}: {values[wrong][0]:g} in row {int(wrong.argmax())} is not 1, 0, -1 or blank"
            )
        blank = np.isnan(values)
        values = np.where(values == -1, replacement[policy], values)
        columns[label] = np.where(blank, 0.0 if unmentioned == "negative" else np.nan, values)
    return pd.DataFrame(columns, index=frame.index)
