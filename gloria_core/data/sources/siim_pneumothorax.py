"""SIIM-ACR pneumothorax segmentation, 2019 (https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation).

Three layouts are read:
- stage 1: `train-rle.csv` (ImageId, " EncodedPixels") and DICOM files in `dicom-images-train/<study>/<series>/`;
- stage 2: `stage_2_train.csv` and `stage_2_images/*.dcm`;
- the PNG version: `stage_1_train_images.csv`, `stage_1_test_images.csv` (new_filename, ImageId, has_pneumo),
  `png_images/` and `png_masks/`.
Runs become mask files below the root, in `masks_siim_pneumothorax/`, once; the rows of one study are one mask.

The tables of SIIM-ACR pneumothorax, read and checked, and their runs written as mask files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.annotations import SIIM_SIDE, RleError, decode_rle, write_mask
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    DICOM,
    PICTURES,
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    finish,
    locate,
    patient_leaks,
    read_table,
    settle,
)
from gloria_core.data.splits import assign_splits, drawn_twice, seen_in_training, torn_patients

MASKS = "masks_siim_pneumothorax"
"""Folder below the root that the decoded masks are written to."""


def read_runs(path: Path) -> pd.DataFrame:
    """One row a run-length text: name, stem, runs, positive, row (index + 2 is the row of the file).

    Spaces in column names and cells do not count: the released table has " EncodedPixels", and " -1" or "-1" for images
    without a finding.
    """
    header = path.open(encoding="utf-8-sig").readline().rstrip("\r\n").split(",")
    columns = {name: name.strip() for name in header if name.strip() in ("ImageId", "EncodedPixels")}
    if len(columns) < 2:
        columns = {"ImageId": "ImageId", " EncodedPixels": "EncodedPixels"}
    table = read_table(path, columns, remedy="Take train-rle.csv of stage 1 or stage_2_train.csv as Kaggle ships it")
    table = table.rename(columns={"ImageId": "name", "EncodedPixels": "runs"})
    table["name"], table["runs"] = table["name"].str.strip(), table["runs"].str.strip()
    check_paths(path, "ImageId", table["name"])
    good = table["runs"].str.fullmatch(r"-1|\d+ \d+(?: \d+ \d+)*")
    check_cells(path, "EncodedPixels", table["runs"], good, "runs are pairs of whole numbers, or -1 without a finding")
    table["positive"] = table["runs"] != "-1"
    several = table.duplicated("name", keep=False)
    both = several & ~table["positive"]
    check_cells(path, "ImageId", table["name"], ~both, "an image without a finding is there twice; keep one row of it")
    again = table.duplicated(["name", "runs"])
    check_cells(path, "ImageId", table["name"], ~again, "the same runs are there twice; keep one row")
    return table.assign(stem=table["name"], row=table.index)


def read_pictures(tables: Sequence[tuple[Path, str]]) -> pd.DataFrame:
    """One row an image of the PNG version: name, stem, positive, split, row."""
    parts = []
    for path, split in tables:
        names = {"new_filename": "file", "ImageId": "name", "has_pneumo": "has"}
        table = read_table(path, names, remedy="Take the tables that come with png_images/")
        check_paths(path, "new_filename", table["file"])
        check_unique(path, "ImageId", table["name"])
        check_unique(path, "new_filename", table["file"])
        check_cells(path, "has_pneumo", table["has"], table["has"].isin(["0", "1"]), "has_pneumo is 0 or 1")
        stem = table["file"].str.replace(r"\.png$", "", regex=True)
        parts.append(table.assign(stem=stem, positive=table["has"] == "1", split=split, row=table.index))
    rows = pd.concat(parts, ignore_index=True)
    twice = rows["name"].duplicated()
    if twice.any():
        where = " and ".join(str(path) for path, _ in tables)
        raise ManifestError(f"{where}: image {rows.loc[twice, 'name'].iloc[0]!r} is in both; keep it in one")
    return rows


def write_masks(root: Path, rows: pd.DataFrame, *, source: str) -> dict[str, str]:
    """Study -> path of its mask, the union of its rows, as 1-bit PNG of 1024 x 1024 below the root.

    rows: as of `read_runs`, with `study`: the image, or a part of its rows. Files that are there are kept.
    Raises ManifestError for runs that are no mask of such an image, naming the row, and for a root one cannot write to.
    """
    paths: dict[str, str] = {}
    for study, part in rows.groupby("study", sort=False):
        name = part["name"].iloc[0]
        if study != name:
            # which rows are a part's is drawn over the whole table, so the file of another table's part is not it
            name = f"{name}-{hashlib.sha256(';'.join(part['runs']).encode()).hexdigest()[:12]}"
        paths[study] = write_mask(
            root, f"{MASKS}/{name}.png", lambda study=study, part=part: _union(study, part, source)
        )
    return paths


def _union(name: str, part: pd.DataFrame, source: str) -> np.ndarray:
    mask = np.zeros((SIIM_SIDE, SIIM_SIDE), bool)
    for row, runs in zip(part["row"], part["runs"], strict=True):
        try:
            mask |= decode_rle(runs, SIIM_SIDE, SIIM_SIDE, format="siim")
        except RleError as error:
            raise ManifestError(
                f"{source}, row {row + 2}, column 'EncodedPixels', image {name!r}: {error}; get the table again"
            ) from error
    return mask


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
