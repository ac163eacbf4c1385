"""Chest radiographs of children, normal or pneumonia, of Kermany et al. 2018 (https://doi.org/10.17632/rscbjbr9sj).

Read is the owner's folder (`train/NORMAL/*.jpeg`, `train/PNEUMONIA/`, `test/...`, and Kaggle's `val/...`), or a
re-packed one with an `index.csv` and lung masks of v7labs (https://github.com/v7labs/covid-19-xray-dataset).
The label is nearly trivial (see the card); the masks are what the set is good for.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError

LABEL, MASK = "Pneumonia", "Lungs"
FOLDERS = {
    "train/": "of the owner's folder chest_xray/: train/NORMAL, train/PNEUMONIA (or index.csv of a re-packed folder)",
    "test/": "and test/NORMAL, test/PNEUMONIA",
}
KINDS = {"NORMAL": 0.0, "PNEUMONIA": 1.0}
COLUMNS = {
    "id": raw.Column("study_id", unique=True),
    "image": raw.Column("images", unique=True, path=True, filled=True),
    "label": raw.Column(LABEL, values=KINDS),
    "patient": raw.Column("patient_id", filled=True, remedy="give every image its patient"),
    "split_original": raw.Column("meta_original_split", values=["train", "val", "test", ""]),
}
MASK_COLUMN = raw.Column("mask", path=True)
OPTIONAL = {"lung_mask": MASK_COLUMN, "subtype": "meta_subtype", "mask_matched_by": "meta_mask_matched_by"}
NAMES = (
    # names of the 2018 release, of its second part of normal images, and of later releases
    r"(?P<person>person\d+)_(?P<kind>bacteria|virus)_\d+",
    r"(?P<person>(?:NORMAL2-)?IM-\d+)-\d+(?:-\d+)?(?P<kind>)",
    r"(?P<person>(?P<kind>NORMAL|BACTERIA|VIRUS)-\d+)-\d+",
)


def prepare(
    root: Path, *, split_rule: raw.SplitRule = "patient", seed: int = 0, on_error: OnError = "raise"
) -> pd.DataFrame:
    """The checked manifest: one study an image, label "Pneumonia", masks "Lungs" where the folder has them.

    split_rule: "patient" draws 70/10/20 %, patient-disjoint and stratified; "published" takes the owner's test folder
        as test and draws an eighth of the other patients as valid (Kaggle's val/ of 16 images is too small to select
        by). Patients are read from the file names; those on both sides are counted in `attrs["leaks"]`.
    on_error="exclude" leaves out images or masks of the index that are not there and lists them in `attrs["excluded"]`.
    """
    folder, leaks = raw.RawFolder(root, "kermany"), {}
    path = folder.optional("index.csv")
    table = raw.read_table(path, COLUMNS, optional=OPTIONAL) if path else _read_folders(folder)
    rows = raw.Rows(table, source=path or root, cell=("image", "images"))
    rows.exclude_missing(folder.complete(table["images"]), None)
    mask = rows.table["mask"]
    there = (mask == "") | folder.complete(mask)
    rows.exclude_missing(there, on_error, reason="no such mask file", cell=("lung_mask", "mask"))
    order = ["meta_subtype", "meta_original_split", "meta_mask_matched_by"]
    table = rows.table[[name for name in rows.table if name not in order] + order]
    rows.table = table = table.assign(views="AP", masks=raw.mask_cells(MASK, table["mask"]))
    if split_rule == "published":
        table["split"] = np.where(table["meta_original_split"] == "test", "test", "train")
        table["patient_id"], leaks = raw.tear(table["patient_id"], table["split"], rows="images", unit="patient")
    return raw.finish(folder, rows, [LABEL], seed=seed, draw="all" if split_rule == "patient" else "valid", leaks=leaks)


def _read_folders(folder: raw.RawFolder) -> pd.DataFrame:
    """The same columns from the owner's tree; patients are read from the names."""
    root = folder.root
    if (root / "chest_xray").is_dir() and not (root / "train").is_dir():
        raise ManifestError(f"kermany: {root} holds the folder chest_xray; give {root / 'chest_xray'} as the root")
    folder.require(FOLDERS)
    rows = []
    for split in ("train", "val", "test"):
        for kind, label in KINDS.items():
            files = folder.by_stem([f"{split}/{kind}"], raw.PICTURES)
            if not files and split != "val":
                raise ManifestError(f"kermany: {root / split / kind} has no image (.jpeg); unpack the archive again")
            rows += [(name, path, label, split) for name, paths in files.items() for path in paths]
    table = pd.DataFrame(rows, columns=["study_id", "images", LABEL, "meta_original_split"])
    twice = table["study_id"].duplicated(keep=False)
    if twice.any():
        first, second = table.loc[table["study_id"] == table.loc[twice, "study_id"].iloc[0], "images"].iloc[:2]
        raise ManifestError(f"kermany: {root} has one name twice, {first} and {second}; remove one")
    matches = [table["study_id"].str.extract(f"^{pattern}$") for pattern in NAMES]
    parts = matches[0].combine_first(matches[1]).combine_first(matches[2])
    strange = parts["person"].isna()
    if strange.any():
        raise ManifestError(
            f"kermany: {strange.sum()} names do not say their patient ({table.loc[strange, 'images'].iloc[0]}); "
            "the owner's are like person1_bacteria_1.jpeg, IM-0115-0001.jpeg or VIRUS-1006-0001.jpeg"
        )
    subtype = parts["kind"].str.lower().replace("", "normal")
    return table.assign(patient_id=parts["person"], mask="", meta_subtype=subtype, meta_mask_matched_by="")
