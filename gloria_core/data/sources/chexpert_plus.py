"""CheXpert Plus (Chambon et al. 2024, https://arxiv.org/abs/2405.19538): CheXpert's images with their reports.

Reads `df_chexpert_plus_240401.csv` and, where it is there, the labels in `chexbert_labels/`. Images are CheXpert's own
JPEG (original or small) or the PNG of CheXpert Plus.
"""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import CHEXPERT_LABELS, ManifestError, OnError
from gloria_core.data.sources.chexpert import PROJECTION, SIDE, VALID_FRACTION, listed_patients, named_images
from gloria_core.data.sources.mimic_cxr import unwrapped

TABLE = "df_chexpert_plus_240401.csv"
WHERE = "from https://stanfordaimi.azurewebsites.net (CheXpert Plus; log in, accept the agreement)"
NEEDS = {TABLE: f"reports and metadata of 223,462 images, {WHERE}"}
COLUMNS = {
    "path_to_image": raw.Column(
        "path",
        unique=True,
        pattern=r"(?:train|valid|test)/patient\d+/study\d+/view\d+_[a-z]+\.(?:jpg|png)",
        remedy="a path is train/patient00001/study1/view1_frontal.jpg",
    ),
    "frontal_lateral": SIDE,
    "ap_pa": PROJECTION,
    "split": raw.Column("split", values=["train", "valid"]),
    "section_findings": "findings",
    "section_impression": "impression",
}
OPTIONAL = {"age": "meta_age", "sex": "meta_sex", "race": "meta_race", "ethnicity": "meta_ethnicity"}
# Folders under the root that train/ and valid/ may lie in
HOMES = ("", "PNG/", "PNG/PNG/", "CheXpert-v1.0/", "CheXpert-v1.0-small/", "images/")


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    labels: Literal["report", "impression", "findings", "none"] = "impression",
    unit: raw.Unit = "study",
    views: raw.ViewRule = "frontal",
    texts_only: bool = True,
    hold_out: str | Path = "",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder that holds df_chexpert_plus_240401.csv and the images.

    split_rule: "patient": the owner's valid (200 patients) is test, 2 % of the training patients are valid.
        "published": the owner's train and valid as they are (the use of gloria-Extended's example); no test.
    labels: which of the CheXbert files `chexbert_labels/<...>_fixed.json` to take; "none" for no label column. A file
        that is not there means no labels, unless another than the default is asked for.
    texts_only: leaves out studies with neither findings nor impression, and lists them as excluded.
    hold_out: a 5x200 list (csv with Path, PRIOR's json) whose patients are left out of train and valid.
    De-identification marks stay as the owner wrote them; wrapped lines are joined.
    """
    folder = raw.RawFolder(root, "CheXpert Plus")
    (path,) = folder.require(NEEDS)
    table = named_images(path, "path_to_image", raw.read_table(path, COLUMNS, optional=OPTIONAL))
    for name in ("findings", "impression"):
        table[name] = [unwrapped(text) for text in table[name]]
    rows = raw.Rows(table, source=path, cell=("path_to_image", "path"), key="image_id")
    rows.table["images"] = _places(folder, table) if check_images else table["path"]
    held = table["patient_id"].isin(listed_patients(hold_out)) & (table["split"] == "train")
    rows.exclude(held, "its patient is held out for the 5x200 test set")
    if texts_only:
        silent = (rows.table["findings"] == "") & (rows.table["impression"] == "")
        rows.exclude(silent, "neither findings nor impression")
    rows.exclude_missing(rows.table["images"] != "", on_error)
    rows.keep_views(views)
    rows.check_rest("use views='all' or texts_only=False")
    table = rows.table if unit == "study" else rows.table.assign(study_id=rows.table["image_id"])
    names, draw = [], ""
    if (known := _labels(folder, labels)) is not None:
        table, names = table.join(known, on="key"), list(CHEXPERT_LABELS)
    if split_rule == "patient":
        table["split"], draw = table["split"].replace("valid", "test"), "valid"
    rows.table = raw.group_studies(table)
    return raw.finish(folder, rows, [*names, "is_ap_view", "is_male"], seed=seed, draw=draw, fraction=VALID_FRACTION)


def _places(folder: raw.RawFolder, table: pd.DataFrame) -> pd.Series:
    """Path below the root of each image, "" where there is none; JPEG or PNG, in the first home that has it."""
    homes = [home for home in HOMES if any((folder.root / home / part).is_dir() for part in ("train", "valid"))]
    paths = [home + table["key"] + suffix for home in homes for suffix in (".jpg", ".png")]
    return folder.first_existing(paths or [table["path"]])


def _labels(folder: raw.RawFolder, which: str) -> pd.DataFrame | None:
    """Labels by key (train/patient.../view1_frontal), from a file with a JSON object a line; None without one."""
    if which == "none":
        return None
    name = f"{which}_fixed.json"
    path = folder.optional(f"*/{name}|{name}", without="labels")
    if path is None:
        if which != "impression":
            raise ManifestError(f"{folder.root} lacks chexbert_labels/{name}, {WHERE}; or use labels='none'")
        return None
    rows = []
    for number, line in enumerate(raw.read_text(path)[0].splitlines(), start=1):
        try:
            item = json.loads(line)
            key = item["path_to_image"].rsplit(".", 1)[0]
            values = [float(np.nan if item[name] is None else item[name]) for name in CHEXPERT_LABELS]
        except (ValueError, TypeError, KeyError) as error:
            raise ManifestError(f"{path}, line {number}: no labels ({error!r}); download it again") from error
        if any(value not in (1, 0, -1) and value == value for value in values):
            raise ManifestError(f"{path}, line {number}: a label is neither 1, 0, -1 nor null; download it again")
        rows.append([key, *values])
    if not rows:
        raise ManifestError(f"{path}: the file has no line; download it again, or use labels='none'")
    return pd.DataFrame(rows, columns=["key", *CHEXPERT_LABELS]).drop_duplicates("key").set_index("key")
