"""SIIM-ACR pneumothorax segmentation, 2019 (https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation).

Three layouts are read:
- stage 1: `train-rle.csv` (ImageId, " EncodedPixels") and DICOM files in `dicom-images-train/<study>/<series>/`;
- stage 2: `stage_2_train.csv` and `stage_2_images/*.dcm`;
- the PNG version: `stage_1_train_images.csv`, `stage_1_test_images.csv` (new_filename, ImageId, has_pneumo),
  `png_images/` and `png_masks/`.
Runs become mask files below the root, in `masks_siim_pneumothorax/`, once; the rows of one study are one mask.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.image_places import DICOM, PICTURES, locate
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.owner_folder import absent, check_option, finish, patient_leaks, settle
from gloria_core.data.published_splits import drawn_twice, seen_in_training, torn_patients
from gloria_core.data.sources.siim_tables import MASKS, read_pictures, read_runs, write_masks
from gloria_core.data.splits import assign_splits

LABEL = "Pneumothorax"
HOW = "Kaggle, siim-acr-pneumothorax-segmentation"
TABLES = ("train-rle.csv", "stage_2_train.csv", "stage_1_train_images.csv")
FOLDERS = ("dicom-images-train", "dicom-images-test", "stage_2_images", "png_images", "images", "train")


def prepare(
    root: Path | str,
    *,
    table: str = "",
    split_rule: Literal["patient", "published"] = "patient",
    masks: bool = True,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label "Pneumothorax", a mask "Pneumothorax" for each positive one.

    table: which of `train-rle.csv`, `stage_2_train.csv`, `stage_1_train_images.csv` (or another table of one of these
        forms below the root) is read; by default the one that is there.
    split_rule: "patient" draws 70/10/20 % of the images, stratified (every image has a patient of its own: the owner
        gives no others). "published": of run-length tables the draw of GLoRIA and MGCA, 70/15/15 % of the *rows*. An
        image whose rows fall into several splits becomes a study in each, with the mask of its rows there, as MGCA's
        released code groups them; their ids, and their patients', are "x (train)", "x (test)", and `attrs["leaks"]`
        counts them. Of the PNG version the owner's test list is test, and an eighth of the others is valid.
    masks: write the masks of run-length tables to `masks_siim_pneumothorax/*.png` (those that are there are kept);
        False leaves masks out.
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy, also for broken runs.
    """
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    root = Path(root)
    path = _table(root, table)
    rows, pictures = _read(path)
    leaks: dict[str, int] = {}
    rows["study"] = rows["name"]
    if split_rule == "published" and pictures is None:
        rows["split"] = drawn_twice(len(rows), held_out=0.3)
        leaks = patient_leaks(rows["name"], rows["split"], what="images")
        leaks |= seen_in_training(rows["name"], rows["split"], rows="rows", unit="image")
        rows["study"] = torn_patients(rows["name"], rows["split"])
    images = rows.drop_duplicates("study").set_index("study", drop=False)
    images["file"] = _files(root, images)
    images["positive"] = rows.groupby("study")["positive"].any()
    images.index = images["row"]
    gone = absent(images, images["file"] != "", key="study", value="name", column="ImageId")
    images = images[images["file"] != ""].reset_index(drop=True)
    settle(gone, source=str(path), on_error=on_error, left=len(images))
    runs = rows[rows["study"].isin(images["study"]) & rows["positive"]]
    if masks and pictures is None:
        pictures = write_masks(root, runs, source=str(path))
    frame = _split(_frame(images, pictures if masks else {}), images, split_rule, seed)
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone, leaks=leaks)


def _table(root: Path, name: str) -> Path:
    """The table that is asked for, or the first of the three layouts that is there."""
    if not root.is_dir():
        raise ManifestError(
            f"siim_pneumothorax: the root {root} is not a folder; give the folder of the {HOW} download"
        )
    for known in [name] if name else TABLES:
        if (root / known).is_file():
            return root / known
    here = ", ".join(sorted(path.name for path in root.iterdir())[:12]) or "nothing"
    wanted = name or " or ".join(TABLES)
    raise ManifestError(
        f"siim_pneumothorax: {root} lacks {wanted}; {HOW}; option table=... names another. It has: {here}"
    )


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, str] | None]:
    """Rows of name, positive, stem, row, and runs or, of the PNG version, split; of that also name -> mask path."""
    header = path.open(encoding="utf-8-sig").readline()
    if "new_filename" not in header:
        return read_runs(path), None
    tables = [(path, "train")]
    other = path.with_name(path.name.replace("train", "test"))
    if other != path and other.is_file():
        tables.append((other, "test"))
    rows = read_pictures(tables)
    stems = rows.loc[rows["positive"]]
    return rows, {name: f"png_masks/{stem}.png" for name, stem in zip(stems["name"], stems["stem"], strict=True)}


def _files(root: Path, images: pd.DataFrame) -> pd.Series:
    """Path of each image below the root: flat folders first, then the tree of stage 1."""
    stems = images["stem"]
    found = locate(root, stems, [name for name in FOLDERS if (root / name).is_dir()], (*DICOM, *PICTURES))
    if (found != "").all():
        return found
    tree: dict[str, str] = {}
    for folder in (root / name for name in FOLDERS[:2]):
        for place, _, names in os.walk(folder):
            for name in names:
                stem, _, suffix = name.rpartition(".")
                if f".{suffix.lower()}" in DICOM:
                    file = (Path(place) / name).relative_to(root).as_posix()
                    if tree.setdefault(stem, file) != file:
                        raise ManifestError(
                            f"{root}: image {stem!r} is there twice, {tree[stem]} and {file}; remove one"
                        )
    return found.where(found != "", stems.map(tree).fillna(""))


def _frame(images: pd.DataFrame, masks: dict[str, str]) -> pd.DataFrame:
    cells = [
        json.dumps([{"label": LABEL, "image": 0, "path": masks[study]}]) if study in masks else ""
        for study in images["study"]
    ]
    return pd.DataFrame(
        {
            "study_id": images["study"],
            "patient_id": images["study"],
            "images": images["file"],
            "views": "FRONTAL",
            LABEL: images["positive"].astype(float),
            "masks": cells,
        }
    )


def _split(frame: pd.DataFrame, images: pd.DataFrame, rule: str, seed: int) -> pd.DataFrame:
    if rule == "patient":
        return assign_splits(frame, seed=seed)
    frame = frame.assign(split=images["split"].to_numpy())
    if (frame["split"] == "valid").any():
        return frame
    learn = frame["split"] == "train"
    parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)
    return frame.assign(split=np.where(learn, parts["split"].reindex(frame.index), frame["split"]))


__all__ = ["FOLDERS", "LABEL", "MASKS", "TABLES", "prepare"]
