"""Chest radiographs of children, normal or pneumonia, of Kermany et al. 2018 (https://doi.org/10.17632/rscbjbr9sj).

Read is the owner's folder (`train/NORMAL/*.jpeg`, `train/PNEUMONIA/`, `test/...`, and Kaggle's `val/...`), or a
re-packed one with an `index.csv` and lung masks of v7labs (https://github.com/v7labs/covid-19-xray-dataset).
The label is nearly trivial (see the card); the masks are what the set is good for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    PICTURES,
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    existing,
    finish,
    patient_leaks,
    read_table,
    require,
    settle,
)
from gloria_core.data.splits import assign_splits, seen_in_training, torn_patients

LABEL, MASK = "Pneumonia", "Lungs"
NEEDS = {
    "index.csv": "the table of a re-packed folder",
    "train/": "or, of the owner's folder chest_xray/: train/NORMAL, train/PNEUMONIA",
    "test/": "and test/NORMAL, test/PNEUMONIA",
}
_COLUMNS = ("id", "image", "label", "patient", "split_original")
_KINDS = {"NORMAL": 0.0, "PNEUMONIA": 1.0}
_NAMES = (
    # names of the 2018 release, of its second part of normal images, and of later releases
    r"(?P<person>person\d+)_(?P<kind>bacteria|virus)_\d+",
    r"(?P<person>(?:NORMAL2-)?IM-\d+)-\d+(?:-\d+)?",
    r"(?P<person>(?P<kind>NORMAL|BACTERIA|VIRUS)-\d+)-\d+",
)
_SUBTYPES = {"bacteria": "bacteria", "virus": "virus", "BACTERIA": "bacteria", "VIRUS": "virus"}


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label "Pneumonia", masks "Lungs" where the folder has them.

    split_rule: "patient" draws 70/10/20 %, patient-disjoint and stratified; "published" takes the owner's test folder
        as test and draws an eighth of the other patients as valid (Kaggle's val/ of 16 images is too small to select
        by). Patients are read from the file names; those on both sides are counted in `attrs["leaks"]`.
    on_error="exclude" leaves out images or masks of the index that are not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy.
    """
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    root = Path(root)
    failures = []
    if (root / "index.csv").is_file():
        table = _read_index(root / "index.csv")
        there = existing(root, [*table["image"], *table["mask"]])
        gone = absent(table, table["image"].isin(there), key="id", value="image", column="image")
        mask_there = table["mask"].isin(there) | (table["mask"] == "") | ~table["image"].isin(there)
        gone += absent(table, mask_there, key="id", value="mask", column="lung_mask", reason="no such mask file")
        table = table[table["image"].isin(there) & mask_there].reset_index(drop=True)
        settle(gone, source=str(root / "index.csv"), on_error=on_error, left=len(table))
        failures = gone
    else:
        table = _read_folders(root)
    frame = _frame(table)
    leaks = {}
    if split_rule == "patient":
        frame = assign_splits(frame, seed=seed)
    else:
        split = np.where(table["original"] == "test", "test", "train")
        leaks = patient_leaks(table["patient"], split)
        leaks |= seen_in_training(table["patient"], split, rows="images", unit="patient")
        frame = frame.assign(split=split, patient_id=torn_patients(frame["patient_id"], split))
        learn = frame["split"] == "train"
        parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)
        frame.loc[learn, "split"] = parts["split"]
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=failures, leaks=leaks)


def _read_index(path: Path) -> pd.DataFrame:
    """id, image, mask, label, patient, original, subtype and matched of a re-packed folder."""
    optional = {"lung_mask": "mask", "subtype": "subtype", "mask_matched_by": "matched"}
    table = read_table(path, _COLUMNS, optional=optional).rename(columns={"split_original": "original"})
    check_unique(path, "id", table["id"])
    check_unique(path, "image", table["image"])
    check_paths(path, "image", table["image"])
    check_paths(path, "lung_mask", table.loc[table["mask"] != "", "mask"])
    check_cells(path, "label", table["label"], table["label"].isin(_KINDS), "a label is NORMAL or PNEUMONIA")
    check_cells(path, "patient", table["patient"], table["patient"] != "", "give every image its patient")
    known = table["original"].isin(["train", "val", "test", ""])
    check_cells(path, "split_original", table["original"], known, "a split is train, val, test or blank")
    return table


def _read_folders(root: Path) -> pd.DataFrame:
    """The same columns from the owner's tree; patients are read from the names."""
    if (root / "chest_xray").is_dir() and not (root / "train").is_dir():
        raise ManifestError(f"kermany: {root} holds the folder chest_xray; give {root / 'chest_xray'} as the root")
    require(root, {name: what for name, what in NEEDS.items() if name != "index.csv"}, "kermany")
    rows = []
    for split in ("train", "val", "test"):
        for label in _KINDS:
            folder = root / split / label
            files = sorted(p.name for p in folder.glob("*") if p.suffix.lower() in PICTURES) if folder.is_dir() else []
            if not files and split != "val":
                raise ManifestError(f"kermany: {folder} has no image (.jpeg); unpack the owner's archive again")
            rows += [(split, label, name) for name in files]
    table = pd.DataFrame(rows, columns=["original", "label", "name"])
    table["image"] = table["original"] + "/" + table["label"] + "/" + table["name"]
    table["id"] = table["name"].str.rpartition(".")[0]
    twice = table["id"].duplicated(keep=False)
    if twice.any():
        first, second = table.loc[table["id"] == table.loc[twice, "id"].iloc[0], "image"].iloc[:2]
        raise ManifestError(f"kermany: {root} has one name twice, {first} and {second}; remove one")
    parts = [table["id"].str.extract(f"^{pattern}$") for pattern in _NAMES]
    table["patient"] = parts[0]["person"].fillna(parts[1]["person"]).fillna(parts[2]["person"])
    strange = table["patient"].isna()
    if strange.any():
        raise ManifestError(
            f"kermany: {strange.sum()} names do not say their patient ({table.loc[strange, 'image'].iloc[0]}); "
            "the owner's are like person1_bacteria_1.jpeg, IM-0115-0001.jpeg or VIRUS-1006-0001.jpeg"
        )
    kind = parts[0]["kind"].fillna(parts[2]["kind"]).map(_SUBTYPES)
    return table.assign(mask="", matched="", subtype=kind.fillna("normal"))


def _frame(table: pd.DataFrame) -> pd.DataFrame:
    masks = [json.dumps([{"label": MASK, "image": 0, "path": path}]) if path else "" for path in table["mask"]]
    return pd.DataFrame(
        {
            "study_id": table["id"],
            "patient_id": table["patient"],
            "images": table["image"],
            "views": "AP",
            LABEL: table["label"].map(_KINDS),
            "masks": masks,
            "meta_subtype": table["subtype"],
            "meta_original_split": table["original"],
            "meta_mask_matched_by": table["matched"],
        }
    )
