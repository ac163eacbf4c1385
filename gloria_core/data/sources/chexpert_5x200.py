"""CheXpert 5x200: the zero-shot and retrieval test set of GLoRIA (Huang et al. 2021, section 4.1).

200 frontal images for each of the five competition findings, with that finding alone. The authors' file is not public
in full, so it is built from CheXpert's train.csv by rule and seed, or read from a list you have. Everything is test.
`chexpert.prepare` keeps the patients of this set out of training.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, ManifestError, OnError
from gloria_core.data.sources.chexpert import NEEDS as CHEXPERT_NEEDS
from gloria_core.data.sources.chexpert import (
    TRAIN,
    locate,
    named_images,
    path_parts,
    published_5x200,
    read_images,
    read_list,
    ruled_5x200,
)


def prepare(
    root: Path,
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
    """
    folder, home = raw.RawFolder(root, "CheXpert"), root
    if given and folder.optional(TRAIN) is None:
        path, table = Path(given), _from_list(Path(given))
    else:
        (path,) = folder.require({TRAIN: CHEXPERT_NEEDS[TRAIN]})
        home, table = path.parent, read_images(path)
        if given:
            table = _listed(table, Path(given), path)
        elif rule == "seed":
            table = ruled_5x200(table, seed=seed, per_class=per_class)
        elif per_class != 200:
            raise ValueError(f"per_class is {per_class}; the released code of {rule} draws 200, use rule='seed'")
        else:
            table = table[table["path"].isin(published_5x200(table, rule)[0])].sort_values("image_id")
    places = locate(root, home, table)
    table = table.assign(images=places, study_id=table["image_id"], views=table["view"], split="test")
    if reports:
        table["impression"] = table["key"].map(_impressions(Path(reports)))
    rows = raw.Rows(table, source=path, cell=("Path", "path"))
    if check_images:
        rows.exclude_missing(folder.complete(table["images"]), None)
    silent = rows.table["impression"].fillna("") == "" if reports else pd.Series(False, index=rows.table.index)
    rows.exclude_missing(~silent, on_error, reason="no impression")
    return raw.finish(None, rows, [*CHEXPERT_LABELS, "is_ap_view", "is_male"], seed=seed)


def _listed(table: pd.DataFrame, given: Path, path: Path) -> pd.DataFrame:
    """The rows of train.csv that the list names, in the order of the list, with its texts."""
    wanted = read_list(given)
    keys = pd.Series(table.index, index=table["key"])
    unknown = wanted[~wanted["key"].isin(keys.index)]
    if len(unknown):
        raise ManifestError(
            f"{given}, row {unknown.index[0] + 2}: {unknown['path'].iloc[0]!r} is not in {path} "
            f"({len(unknown)} such); it must be the list of a set drawn from this table"
        )
    rows = table.loc[keys[wanted["key"]]].assign(impression=wanted["impression"].str.strip().to_numpy())
    for name in COMPETITION_LABELS:
        stated = wanted[name].to_numpy()
        differs = np.flatnonzero(~np.isnan(stated) & ((stated == 1) != (rows[name] == 1).to_numpy()))
        if len(differs):
            row = int(differs[0])
            raise ManifestError(
                f"{given}, row {row + 2}, column {name!r}: {stated[row]:g} for {wanted['path'].iloc[row]!r}; {path} "
                f"says {rows[name].iloc[row]:g}; give the list that belongs to this table"
            )
    return rows


def _from_list(given: Path) -> pd.DataFrame:
    """The rows of a list alone: the five labels, the others unknown."""
    table = read_list(given)
    if table[list(COMPETITION_LABELS)].isna().all(axis=None):
        raise ManifestError(f"{given} has no labels; put CheXpert's train.csv under the root, they are read from there")
    unknown = dict.fromkeys((name for name in CHEXPERT_LABELS if name not in COMPETITION_LABELS), np.nan)
    table["impression"] = table["impression"].str.strip()
    return named_images(given, "Path", table.assign(side="Frontal", projection="", meta_age="", meta_sex="", **unknown))


def _impressions(path: Path) -> pd.Series:
    """Impressions by path key, from a CheXpert Plus table."""
    if not path.is_file():
        raise ManifestError(f"{path}: no such table; reports= takes df_chexpert_plus_240401.csv of CheXpert Plus")
    table = raw.read_table(path, {"path_to_image": "path", "section_impression": "impression"})
    return table["impression"].str.strip().set_axis(path_parts(path, "path_to_image", table["path"])[0])
