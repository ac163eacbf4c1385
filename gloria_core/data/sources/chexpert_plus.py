"""CheXpert Plus (Chambon et al. 2024, https://arxiv.org/abs/2405.19538): CheXpert's images with their reports.

Reads `df_chexpert_plus_240401.csv` and, where it is there, the labels in `chexbert_labels/`. Images are CheXpert's own
JPEG (original or small) or the PNG of CheXpert Plus.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    UNITS,
    VIEW_RULES,
    Unit,
    ViewRule,
    absent,
    check_cells,
    check_options,
    check_unique,
    existing,
    finish,
    group_studies,
    patient_leaks,
    read_table,
    require,
    settle,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.sources.chexpert import VALID_SHARE, read_list, views_of
from gloria_core.data.sources.mimic_cxr import unwrapped
from gloria_core.data.splits import assign_splits

TABLE = "df_chexpert_plus_240401.csv"
WHERE = "from https://stanfordaimi.azurewebsites.net (CheXpert Plus; log in, accept the agreement)"
_PATH = r"^((?:train|valid|test)/(patient\d+)/(study\d+)/(view\d+_[a-z]+))\.(?:jpg|png)$"
_SECTIONS = {"section_findings": "findings", "section_impression": "impression"}
_META = {"age": "meta_age", "sex": "meta_sex", "race": "meta_race", "ethnicity": "meta_ethnicity"}
_ALLOWED = {
    "split_rule": ("patient", "published"),
    "labels": ("report", "impression", "findings", "none"),
    "unit": UNITS,
    "views": VIEW_RULES,
    "on_error": ("raise", "exclude"),
}
_HOMES = ("", "PNG/", "PNG/PNG/", "CheXpert-v1.0/", "CheXpert-v1.0-small/", "images/")
"""Folders under the root that train/ and valid/ may lie in."""


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    labels: Literal["report", "impression", "findings", "none"] = "impression",
    unit: Unit = "study",
    views: ViewRule = "frontal",
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
    Raises ManifestError naming file, row, column and remedy; ValueError for an unknown option value.
    """
    root = Path(root)
    given = {"split_rule": split_rule, "labels": labels, "unit": unit, "views": views, "on_error": on_error}
    check_options(_ALLOWED, given)
    path = require(root, {TABLE: f"reports and metadata of 223,462 images, {WHERE}"}, "CheXpert Plus")[TABLE]
    table = _read(path)
    table, left = _without(table, hold_out, texts_only=texts_only)
    table["image"] = _places(root, table, check=check_images)
    there = table["image"] != ""
    failures = absent(table, there, key="image_id", value="path", column="path_to_image", reason="no such image file")
    table = table[there]
    settle(failures, source=str(path), on_error=on_error, left=len(table))
    kept = wanted_views(table["view"], views)
    left += failures + unseen_studies(table, kept, column="path", reason=f"no image of view {views!r}")
    frame = _frame(table[kept], unit, _labels(root, labels), path)
    if split_rule == "patient":
        learn = frame[frame["split"] == "train"]
        frame["split"] = frame["split"].replace("valid", "test")
        cut = assign_splits(learn, fractions={"train": 1 - VALID_SHARE, "valid": VALID_SHARE}, seed=seed)
        frame.loc[learn.index, "split"] = cut["split"]
    leaks = patient_leaks(frame["patient_id"], frame["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=left, leaks=leaks)


def _without(table: pd.DataFrame, hold_out: str | Path, *, texts_only: bool) -> tuple[pd.DataFrame, list[Failure]]:
    """The rows less those of held-out patients and those without text, and a failure for each of these."""
    held = set(read_list(Path(hold_out))["key"].str.split("/").str[1]) if str(hold_out) else set()
    held_out = table["patient"].isin(held) & (table["split"] == "train")
    silent = texts_only & (table["findings"] == "") & (table["impression"] == "") & ~held_out
    left = _failures(table[held_out], "its patient is held out for the 5x200 test set")
    left += _failures(table[silent], "neither findings nor impression")
    return table[~held_out & ~silent], left


def _read(path: Path) -> pd.DataFrame:
    """One row an image: path, key, study, patient, image_id, view, split, findings, impression, metadata."""
    names = {"path_to_image": "path", "frontal_lateral": "side", "ap_pa": "projection", "split": "split"}
    table = read_table(path, {**names, **_SECTIONS}, optional=_META)
    check_unique(path, "path_to_image", table["path"])
    parts = table["path"].str.extract(_PATH)
    remedy = "a path is train/patient00001/study1/view1_frontal.jpg"
    check_cells(path, "path_to_image", table["path"], parts[0].notna(), remedy)
    check_cells(path, "split", table["split"], table["split"].isin(["train", "valid"]), "it is train or valid")
    table["key"], table["patient"] = parts[0], parts[1]
    table["study"] = parts[1] + "_" + parts[2]
    table["image_id"] = table["study"] + "_" + parts[3]
    table["view"] = views_of(path, table["side"], table["projection"], names=("frontal_lateral", "ap_pa"))
    for name in _SECTIONS.values():
        table[name] = [unwrapped(text) for text in table[name]]
    return table


def _places(root: Path, table: pd.DataFrame, *, check: bool) -> pd.Series:
    """Path below the root of each image, "" where there is none; JPEG or PNG, in the first home that has it."""
    if not check:
        return table["path"]
    homes = [home for home in _HOMES if any((root / home / part).is_dir() for part in ("train", "valid"))]
    place = pd.Series("", index=table.index)
    for home in homes:
        for suffix in (".jpg", ".png"):
            paths = home + table["key"] + suffix
            found = paths.isin(existing(root, paths[place == ""].tolist()))
            place = place.where((place != "") | ~found, paths)
    return place


def _labels(root: Path, which: str) -> pd.DataFrame | None:
    """Labels by key (train/patient.../view1_frontal), from a file with a JSON object a line; None without one."""
    if which == "none":
        return None
    path = root / "chexbert_labels" / f"{which}_fixed.json"
    if not path.is_file():
        if which != "impression":
            raise ManifestError(f"{path} is missing: CheXbert's labels, {WHERE}; or use labels='none'")
        return None
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
                key = item["path_to_image"].rsplit(".", 1)[0]
                values = [float(np.nan if item[name] is None else item[name]) for name in CHEXPERT_LABELS]
            except (ValueError, TypeError, KeyError) as error:
                raise ManifestError(f"{path}, line {number}: no labels ({error!r}); download it again") from error
            if any(value not in (1, 0, -1) and value == value for value in values):
                raise ManifestError(f"{path}, line {number}: a label is neither 1, 0, -1 nor null; download it again")
            rows.append([key, *values])
    return pd.DataFrame(rows, columns=["key", *CHEXPERT_LABELS]).drop_duplicates("key").set_index("key")


def _failures(rows: pd.DataFrame, reason: str) -> list[Failure]:
    return [
        Failure(name, int(index) + 2, "path_to_image", repr(path), reason)
        for index, name, path in zip(rows.index, rows["image_id"], rows["path"], strict=True)
    ]


def _frame(table: pd.DataFrame, unit: Unit, labels: pd.DataFrame | None, path: Path) -> pd.DataFrame:
    if table.empty:
        raise ManifestError(f"{path}: no image is left; use views='all' or texts_only=False")
    images = table.assign(
        study=table["study"] if unit == "study" else table["image_id"],
        is_ap_view=table["view"].map({"AP": 1.0, "PA": 0.0}).astype(float),
        is_male=table["meta_sex"].map({"Male": 1.0, "Female": 0.0}).astype(float),
    )
    if labels is not None:
        images = images.join(labels, on="key")
    columns = ["split", "findings", "impression", *([] if labels is None else CHEXPERT_LABELS), "is_ap_view", "is_male"]
    return group_studies(images, keep=[*columns, *_META.values()])
