"""SIIM-ACR pneumothorax segmentation, 2019 (https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation).

Three layouts are read:
- stage 1: `train-rle.csv` (ImageId, " EncodedPixels") and DICOM files in `dicom-images-train/<study>/<series>/`;
- stage 2: `stage_2_train.csv` and `stage_2_images/*.dcm`;
- the PNG version: `stage_1_train_images.csv`, `stage_1_test_images.csv` (new_filename, ImageId, has_pneumo),
  `png_images/` and `png_masks/`.
Runs become mask files below the root, in `masks_siim_pneumothorax/`, once; the rows of one study are one mask.
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data import raw_folder as raw
from gloria_core.data.annotations import SIIM_SIDE, RleError, decode_rle, write_mask
from gloria_core.data.files import content_hash
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.splits import random_split

LABEL = "Pneumothorax"
# Folder below the root that the decoded masks are written to
MASKS = "masks_siim_pneumothorax"
HOW = "Kaggle, siim-acr-pneumothorax-segmentation"
TABLES = "train-rle.csv|stage_2_train.csv|stage_1_train_images.csv"
NEEDS = {TABLES: f"the runs or labels; {HOW}; option table=... names another"}
# Folders of stage 1, which have a folder for each study and series
TREES = ("dicom-images-train", "dicom-images-test")
FOLDERS = (*TREES, "stage_2_images", "png_images", "images", "train")
PICTURE = {
    "new_filename": raw.Column("file", path=True, filled=True, unique=True),
    "ImageId": raw.Column("name", unique=True),
    "has_pneumo": raw.Column("positive", values={"0": False, "1": True}, remedy="has_pneumo is 0 or 1"),
}


RUNS = {
    "ImageId": raw.Column("name", strip=True, path=True, filled=True),
    "EncodedPixels": raw.Column(
        "runs",
        strip=True,
        pattern=r"-1|\d+ \d+(?: \d+ \d+)*",
        remedy="runs are pairs of whole numbers, or -1 without a finding",
    ),
}


def prepare(
    root: Path,
    *,
    table: str = "",
    split_rule: raw.SplitRule = "patient",
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

    """
    folder = raw.RawFolder(root, "siim_pneumothorax")
    (path,) = folder.require({table: "option table names it"} if table else NEEDS)
    pictures = "new_filename" in raw.columns_of(path, list(PICTURE))
    rows = read_pictures(path, folder) if pictures else read_runs(path)
    leaks: dict[str, int] = {}
    rows["study_id"] = rows["name"]
    if split_rule == "published" and not pictures:
        rows["split"] = random_split(len(rows), held_out=0.3, test=True)
        rows["study_id"], leaks = raw.tear(rows["name"], rows["split"], rows="rows", unit="image")
    positive = rows.groupby("study_id")["positive"].any()
    images = raw.Rows(rows.drop_duplicates("study_id"), source=path, cell=("ImageId", "name"))
    images.table["images"] = _files(folder, images.table["stem"])
    images.table[LABEL] = images.table["study_id"].map(positive).astype(float)
    images.exclude_missing(images.table["images"] != "", on_error)
    if masks:
        if pictures:
            files = ("png_masks/" + images.table["stem"] + ".png").where(images.table["positive"], "")
        else:
            files = write_masks(folder, rows, images.table, path)
        images.table["masks"] = raw.mask_cells(LABEL, files)
    draw = "all" if split_rule == "patient" else "valid" if pictures else ""
    return raw.finish(folder, images, [LABEL], seed=seed, draw=draw, leaks=leaks)


def read_runs(path: Path) -> pd.DataFrame:
    """One row a run-length text: name, stem, runs, positive.

    Spaces in column names and cells do not count: the released table has " EncodedPixels", and " -1" or "-1" for images
    without a finding.
    """
    cells = raw.read_table(path, RUNS, remedy="Take train-rle.csv of stage 1 or stage_2_train.csv as Kaggle ships it")
    name, runs = cells["name"], cells["runs"]
    both = name.duplicated(keep=False) & (runs == "-1")
    raw.check_cells(path, "ImageId", name, ~both, "an image without a finding occurs twice; keep one row of it")
    raw.check_cells(path, "ImageId", name, ~cells.duplicated(), "the same runs occur twice; keep one row")
    return cells.assign(positive=runs != "-1", stem=name)


def read_pictures(path: Path, folder: raw.RawFolder) -> pd.DataFrame:
    """One row an image of the PNG version, of the train and the test table: name, stem, positive, split."""
    test = path.name.replace("train", "test")
    other = folder.optional(test) if test != path.name else None
    paths = {"train": path} | ({"test": other} if other else {})
    remedy = "Take the tables that come with png_images/"
    rows = pd.concat([raw.read_table(paths[split], PICTURE, remedy=remedy).assign(split=split) for split in paths])
    twice = rows["name"].duplicated().to_numpy()
    if twice.any():
        where = " and ".join(map(str, paths.values()))
        raise ManifestError(f"{where}: image {rows['name'][twice].iloc[0]!r} is in both; keep it in one")
    return rows.assign(stem=rows["file"].str.removesuffix(".png"))


def write_masks(folder: raw.RawFolder, rows: pd.DataFrame, studies: pd.DataFrame, source: Path) -> list[str]:
    """For each study the path of its mask below the root ("" without one): the union of its rows as 1-bit PNG.

    rows: as of `read_runs`, with `study_id`: the image, or a part of its rows. studies: study_id and images. A mask has
    the size of its image file; one whose header cannot be read counts as original.
    Raises ManifestError for runs that are no mask of such an image, naming the row, and for a root one cannot write to.
    """
    parts = dict(iter(rows[rows["positive"]].groupby("study_id")))
    sizes = folder.sizes(studies.loc[studies["study_id"].isin(parts), "images"])
    paths = []
    for study, image in zip(studies["study_id"], studies["images"], strict=True):
        part, size = parts.get(study), sizes.get(image) or (SIIM_SIDE, SIIM_SIDE)
        if part is None:
            paths.append("")
            continue
        name = part["name"].iloc[0]
        if study != name:
            # which rows are a part's is drawn over the whole table, so the file of another table's part is not it
            name = f"{name}-{content_hash(';'.join(part['runs']), digits=12)}"
        mask = _union(part, source, size)
        paths.append(write_mask(folder.root, f"{MASKS}/{name}.png", lambda mask=mask: mask))
    return paths


def _union(part: pd.DataFrame, source: Path, size: tuple[int, int]) -> np.ndarray:
    """The mask of several rows of one study, on `size` (width, height). Shape: (height, width) bool."""
    mask = np.zeros((SIIM_SIDE, SIIM_SIDE), bool)
    for index, study, runs in zip(part.index, part["study_id"], part["runs"], strict=True):
        try:
            mask |= decode_rle(runs, SIIM_SIDE, SIIM_SIDE)
        except RleError as error:
            raise ManifestError(
                f"{source}, row {index + 2}, column 'EncodedPixels', image {study!r}: {error}; get the table again"
            ) from error
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def _files(folder: raw.RawFolder, stems: pd.Series) -> pd.Series:
    """Path of each image below the root: in flat folders, else in the tree of stage 1."""
    paths, root = folder.locate(stems, FOLDERS, (*raw.DICOM, *raw.PICTURES)), folder.root
    if (paths == "").any():
        tree = [Path(place).relative_to(root).as_posix() for name in TREES for place, _, _ in os.walk(root / name)]
        paths = paths.where(paths != "", folder.locate(stems, tree, raw.DICOM))
    return paths
