"""From a table of images to one manifest row a study: the steps that datasets with several images a study share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest_rules import Failure

ViewRule = Literal["frontal", "AP", "PA", "lateral", "all"]
VIEW_RULES = ("frontal", "AP", "PA", "lateral", "all")
Unit = Literal["study", "image"]
UNITS = ("study", "image")


def wanted_views(view: pd.Series, rule: ViewRule) -> np.ndarray:
    """(n,) bool: which images a rule keeps, from their manifest views (PA, AP, FRONTAL, LATERAL)."""
    lateral = (view == "LATERAL").to_numpy(bool)
    named = {"all": np.ones(len(view), bool), "frontal": ~lateral, "lateral": lateral}
    return named[rule] if rule in named else (view == rule).to_numpy(bool)


def unseen_studies(table: pd.DataFrame, kept: np.ndarray, *, column: str, reason: str) -> list[Failure]:
    """A Failure for each study of which no image is `kept` (bool, a row each); it names the study's first row."""
    left = table[~table["study"].isin(table["study"][kept])].drop_duplicates("study")
    return [
        Failure(str(study), int(index) + 2, column, repr(cell), reason)
        for index, study, cell in zip(left.index, left["study"], left[column], strict=True)
    ]


def group_studies(images: pd.DataFrame, *, keep: Sequence[str]) -> pd.DataFrame:
    """One row a study, in the order of the study ids, from a row an image.

    `images` has study, patient, image (path) and view. A study's images stand frontal first, then by path; its other
    columns `keep` are those of its first image. Returns study_id, patient_id, images, views and `keep`.
    """
    lateral = (images["view"] == "LATERAL").to_numpy(bool)
    ordered = images.iloc[np.lexsort([images["image"].to_numpy(str), lateral, images["study"].to_numpy(str)])]
    first = ordered.drop_duplicates("study")
    # most studies have one image: only the others need to be joined
    several = ordered[ordered["study"].duplicated(keep=False)]
    joined = several.groupby("study", sort=False)[["image", "view"]].agg(";".join)
    columns = {"study_id": first["study"].to_numpy(), "patient_id": first["patient"].to_numpy()}
    for ours, theirs in (("images", "image"), ("views", "view")):
        cells = (
            first["study"].map(joined[theirs]) if len(joined) else pd.Series(np.nan, index=first.index, dtype=object)
        )
        columns[ours] = cells.where(cells.notna(), first[theirs]).to_numpy()
    return pd.DataFrame({**columns, **{name: first[name].to_numpy() for name in keep}})
