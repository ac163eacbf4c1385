"""Label policy: which studies are positive, negative or left out, given label columns of 1, 0, -1 and blank."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

Unmentioned = Literal["negative", "ignore"]
Uncertain = Literal["ignore", "positive", "negative"]
_UNMENTIONED = {"ignore": np.nan, "negative": 0.0}
_UNCERTAIN = {**_UNMENTIONED, "positive": 1.0}

# What an uncertain CheXpert label is in the released GLoRIA code, by class (datasets/image_dataset.py).
CHEXPERT_UNCERTAIN: dict[str, Uncertain] = {
    "Atelectasis": "positive",
    "Cardiomegaly": "negative",
    "Consolidation": "negative",
    "Edema": "positive",
    "Pleural Effusion": "positive",
}


def binary_targets(
    frame: pd.DataFrame,
    labels: Sequence[str],
    *,
    unmentioned: Unmentioned = "negative",
    uncertain: Uncertain | Literal["published"] | Mapping[str, Uncertain] = "ignore",
) -> pd.DataFrame:
    """Label columns (1, 0, -1, blank) as 1.0, 0.0 or NaN; NaN: the study is left out for this label.

    `unmentioned` is what a blank becomes. CheXpert's convention, and the default, is negative: a finding that the
    report does not mention is taken as absent. `uncertain` is what -1 becomes, for all labels or by label;
    "published" stands for `CHEXPERT_UNCERTAIN`.
    Raises KeyError for a label that is no column and for an unknown policy, ValueError for another label value.
    """
    columns, uncertain = {}, CHEXPERT_UNCERTAIN if uncertain == "published" else uncertain
    for label in labels:
        policy = uncertain if isinstance(uncertain, str) else uncertain.get(label, "ignore")
        values = pd.to_numeric(frame[label]).astype(float)
        wrong = ~(values.isna() | values.isin((-1, 0, 1)))
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            raise ValueError(f"label {label!r}: {values.iloc[row]:g} in row {row} is not 1, 0, -1 or blank")
        columns[label] = values.fillna(_UNMENTIONED[unmentioned]).where(values != -1, _UNCERTAIN[policy])
    return pd.DataFrame(columns, index=frame.index)
