"""CheXpert 5x200: the zero-shot and retrieval test set of GLoRIA (Huang et al. 2021, section 4.1).

200 frontal images for each of the five competition findings, with that finding alone. The authors' file is not public
in full, so it is built from CheXpert's train.csv by rule and seed, or read from a list you have. Everything is test.
`chexpert.prepare` keeps the patients of this set out of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, ManifestError, OnError
from gloria_core.data.raw_folder import absent, check_option, existing, finish, settle
from gloria_core.data.sources.chexpert import (
    find_tables,
    locate,
    path_key,
    published_5x200,
    read_images,
    read_list,
    read_reports,
    ruled_5x200,
)


def prepare(
    root: Path | str,
    *,
    given: str | Path = "",
    rule: Literal["seed", "gloria", "mgca"] = "seed",
    per_class: int = 200,
    reports: str | Path = "",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the 5x200 set of the CheXpert folder `root` (train.csv, train/); a study an image.

    given: a list to take instead: a csv with the column Path (GLoRIA's chexpert_5x200.csv) or PRIOR's
        chexpert_5x200.json. Labels are those of train.csv, and must agree with the list's; without train.csv under
        the root they are the five of the list.
    rule: "seed" draws `per_class` studies a finding, one frontal image each, by `seed` and id; "gloria" and "mgca" draw
        as the released code does (200 images a finding, of any study).
    reports: the table df_chexpert_plus_240401.csv, whose impressions become the texts; otherwise those of the list
        (`Report Impression`), or none.
    on_error: "exclude" leaves out images that are not there (or lack a report in `reports`), and lists them.
    Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    check_option("rule", rule, ("seed", "gloria", "mgca"))
    check_option("on_error", on_error, ("raise", "exclude"))
    if given and not _has_table(root):
        path, folder, table = Path(given), root, _from_list(Path(given))
    else:
        path = find_tables(root, valid=False)["train"]
        folder, table = path.parent, read_images(path)
        table = _listed(table, Path(given), path) if given else _drawn(table, rule, per_class, seed)
    table = table.assign(image=locate(root, folder)(table))
    table["impression"] = _texts(table, reports)
    there = table["image"].isin(existing(root, table["image"].tolist())) if check_images else np.ones(len(table), bool)
    failures = absent(table, there, key="image_id", value="path", column="Path", reason="listed, but no such file")
    silent = table["impression"] == "" if reports else pd.Series(False, index=table.index)
    failures += absent(
        table, ~silent | ~np.asarray(there), key="image_id", value="path", column="Path", reason="no impression"
    )
    table = table[np.asarray(there) & ~silent]
    settle(failures, source=str(path), on_error=on_error, left=len(table))
    return finish(_frame(table), source=f"5x200 of {root}", seed=seed, failures=failures)


def _has_table(root: Path) -> bool:
    return any(any(root.glob(name)) for name in ("train.csv", "CheXpert-v1.0*/train.csv", "*batch 1*/train.csv"))


def _drawn(table: pd.DataFrame, rule: str, per_class: int, seed: int) -> pd.DataFrame:
    if rule == "seed":
        return ruled_5x200(table, seed=seed, per_class=per_class)
    if per_class != 200:
        raise ValueError(f"per_class is {per_class}; the released code of {rule} draws 200, use rule='seed'")
    paths, _ = published_5x200(table, rule)
    return table[table["path"].isin(paths)].sort_values("image_id")


def _listed(table: pd.DataFrame, given: Path, path: Path) -> pd.DataFrame:
    """The rows of train.csv that the list names, in the order of the list, with its texts."""
    wanted = read_list(given)
    keys = pd.Series(table.index, index=path_key(path, table["path"]))
    unknown = wanted[~wanted["key"].isin(keys.index)]
    if len(unknown):
        raise ManifestError(
            f"{given}, row {unknown.index[0] + 2}: {unknown['path'].iloc[0]!r} is not in {path} "
            f"({len(unknown)} such); it must be the list of a set drawn from this table"
        )
    rows = table.loc[keys[wanted["key"]]].assign(impression=wanted["impression"].to_numpy())
    for name in COMPETITION_LABELS:
        said = wanted[name].to_numpy()
        differs = np.flatnonzero(~np.isnan(said) & ((said == 1) != (rows[name] == 1).to_numpy()))
        if len(differs):
            row = int(differs[0])
            raise ManifestError(
                f"{given}, row {row + 2}, column {name!r}: {said[row]:g} for {wanted['path'].iloc[row]!r}, but {path} "
                f"says {rows[name].iloc[row]:g}; give the list that belongs to this table"
            )
    return rows


def _from_list(given: Path) -> pd.DataFrame:
    """The rows of a list alone: the five labels, the others unknown."""
    table = read_list(given)
    if table[list(COMPETITION_LABELS)].isna().all(axis=None):
        raise ManifestError(f"{given} has no labels; put CheXpert's train.csv under the root, they are read from there")
    parts = table["key"].str.split("/", expand=True)
    table["file"] = table["path"].str.extract(r"((?:train|valid|test)/patient.*)$")[0]
    table["patient"], table["image_id"] = parts[1], parts[1] + "_" + parts[2] + "_" + parts[3]
    table["view"], table["sex"], table["age"] = "FRONTAL", "", ""
    return table.assign(**{name: np.nan for name in CHEXPERT_LABELS if name not in COMPETITION_LABELS})


def _texts(table: pd.DataFrame, reports: str | Path) -> pd.Series:
    if not reports:
        return table["impression"].str.strip() if "impression" in table else pd.Series("", index=table.index)
    path = Path(reports)
    if not path.is_file():
        raise ManifestError(f"{path}: no such table; reports= takes df_chexpert_plus_240401.csv of CheXpert Plus")
    return path_key(path, table["path"]).map(read_reports(path)).fillna("")


def _frame(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "study_id": table["image_id"],
            "patient_id": table["patient"],
            "split": "test",
            "images": table["image"],
            "views": table["view"],
            "impression": table["impression"],
            **{name: table[name] for name in CHEXPERT_LABELS},
            "is_ap_view": table["view"].map({"AP": 1.0, "PA": 0.0}).astype(float),
            "is_male": table["sex"].map({"Male": 1.0, "Female": 0.0}).astype(float),
            "meta_age": table["age"],
            "meta_sex": table["sex"],
        }
    )
