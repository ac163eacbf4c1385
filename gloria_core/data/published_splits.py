"""Splits as papers drew them, and how much of the test set their training had seen.

GLoRIA (Huang et al. 2021), MGCA (Wang et al. 2022) and CXR-CLIP (You et al. 2023) call scikit-learn's
`train_test_split` twice with `random_state=0`; the first part of the second call is the test set. What they give to it
differs: a list of patients, or, where an image has several rows, the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from gloria_core.data.manifest import ManifestError
from gloria_core.data.manifest_rules import torn_ids


def drawn_twice(n: int, *, held_out: float | int, seed: int = 0) -> np.ndarray:
    """Split of each of n rows: "train", or of the `held_out` rows (share or number) one half "test", the other "valid".

    Shape: (n,) text. Raises ManifestError where there are too few rows.
    """
    rows = np.arange(n)
    split = np.full(n, "train", dtype=object)
    try:
        _, rest = train_test_split(rows, test_size=held_out, random_state=seed)
        test, valid = train_test_split(rest, test_size=0.5, random_state=seed)
    except ValueError as error:
        raise ManifestError(f"the published split does not fit {n} rows ({error}); use split_rule='patient'") from None
    split[test], split[valid] = "test", "valid"
    return split


def drawn_once(n: int, *, held_out: float, seed: int = 0) -> np.ndarray:
    """Split of each of n rows: "train", or "valid" for a share of `held_out`. Shape: (n,) text."""
    split = np.full(n, "train", dtype=object)
    try:
        split[train_test_split(np.arange(n), test_size=held_out, random_state=seed)[1]] = "valid"
    except ValueError as error:
        raise ManifestError(f"the published split does not fit {n} rows ({error}); use split_rule='patient'") from None
    return split


def seen_in_training(units: Sequence[str], split: Sequence[str], *, rows: str, unit: str) -> dict[str, int]:
    """{"test images": n, "test images whose patient is in train": m} with `rows`="images", `unit`="patient".

    units, split: (n,) what must not be torn apart, and the split, of each row. A row whose unit is "" is not counted.
    """
    table = pd.DataFrame({"unit": np.asarray(units, object), "split": np.asarray(split, object)})
    table = table[table["unit"] != ""]
    test = table.loc[table["split"] == "test", "unit"]
    trained = set(table.loc[table["split"] == "train", "unit"])
    return {f"test {rows}": len(test), f"test {rows} whose {unit} is in train": int(test.isin(trained).sum())}


def torn_patients(patients: pd.Series, split: Sequence[str]) -> pd.Series:
    """Patient ids for a published split that is not patient-disjoint: "p" becomes "p (train)" and "p (test)".

    A manifest has no patient in two splits; so what was torn apart gets two names, and the leak is counted instead. An
    image may then be in two splits, too, where all its studies are of one patient torn apart.
    """
    split = pd.Series(np.asarray(split, object), index=patients.index)
    torn = split.groupby(patients.to_numpy(object)).nunique()
    apart = patients.isin(torn.index[torn > 1])
    return patients.mask(apart, torn_ids(patients, split))
