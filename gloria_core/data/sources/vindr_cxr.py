"""VinDr-CXR (Nguyen et al. 2022, https://doi.org/10.1038/s41597-022-01498-w): 18,000 frontal images with boxes.

Two layouts are read: PhysioNet's (`annotations/annotations_train.csv`, `image_labels_train.csv`, the same for test,
`train/*.dicom`, `test/*.dicom`) and that of the Kaggle contest (`train.csv`, `train/*.dicom`; its test images have no
public labels). Three radiologists read each training image, each on their own; five agreed on each test image.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from scipy.sparse.csgraph import connected_components
from torchvision.ops import box_iou

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary
from gloria_core.data.splits import random_split

Readers = Literal["union", "majority"]

NO_FINDING = "No Finding"
# The owner's spellings that differ between tables or from ours
NAMES = {"No finding": NO_FINDING, "Other diseases": "Other disease"}
CORNERS = ["x_min", "y_min", "x_max", "y_max"]
HOW = "PhysioNet, vindr-cxr (credentialed), or Kaggle, vinbigdata-chest-xray-abnormalities-detection"
IMAGE = raw.Column("study_id", path=True, filled=True)
SIZES = ("train_meta.csv", "test_meta.csv")  # beside copies on Kaggle: the size of each original
PIXELS = {"pattern": r"[1-9]\d*", "remedy": "a side is a whole number of pixels"}
SIDES = {"dim1": raw.Column("width", **PIXELS), "dim0": raw.Column("height", **PIXELS)}
# The 18 targets of CXR-CLIP (You et al. 2023): those with more than ten positive test images
CXR_CLIP_LABELS = vocabulary("vindr_cxr", "cxr_clip_labels")


def prepare(
    root: Path,
    *,
    readers: Readers = "union",
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.5,
    labels: Literal["all", "cxr_clip"] = "all",
    split_rule: raw.SplitRule = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, labels by the owner's names ("No Finding" where no other is present).

    readers: a training label is present if one reader saw it ("union", CXR-CLIP's rule), or two of three ("majority").
        Boxes of one finding that overlap by an intersection over union of `overlap` or more are one box, their mean;
        "majority" keeps only those of two readers or more. Test labels and boxes are the owner's consensus.
    labels: "cxr_clip" keeps the 18 targets of that paper (of Kaggle's 14, those that are among them).
    split_rule: test is the owner's. "patient" draws an eighth of the training images as valid, stratified; "published"
        a fifth by CXR-CLIP's call of `train_test_split`. Kaggle's layout has no test labels: "patient" draws 70/10/20 %
        of its training images, "published" gives train and valid only. The owner gives no patients; each image is one.
    Boxes count pixels of the original DICOM file. They are scaled to PNG and JPEG copies where `train_meta.csv` or
        `test_meta.csv` (image_id, dim0: height, dim1: width) gives the size of the original; a box that ends outside
        such a copy is an error without them.
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    """
    folder, parts = raw.RawFolder(root, "vindr_cxr"), []
    tables = _tables(folder)
    for split, boxes_path, labels_path in tables:
        boxes = read_boxes(boxes_path)
        kaggle = labels_path is None
        part = labels_of_boxes(boxes, readers) if kaggle else read_image_labels(labels_path, readers, boxes["label"])
        names = [name for name in part if labels == "all" or name in CXR_CLIP_LABELS]
        entries = merged_boxes(boxes[boxes["label"].isin(names)], readers, overlap)
        part = part[names].rename_axis("study_id").reset_index()
        part = part.assign(
            split=random_split(len(part), held_out=0.2) if (split_rule, split) == ("published", "train") else split,
            images=folder.locate(part["study_id"], [split], (*raw.DICOM, *raw.PICTURES)),
            views="PA",
            entries=[entries.get(name, []) for name in part["study_id"]],
            meta_owner_split=split,
        )
        parts.append((part, names))
    source = " and ".join(str(labels_path or boxes_path) for _, boxes_path, labels_path in tables)
    rows = raw.Rows(pd.concat([part for part, _ in parts]), source=source, cell=("image_id", "study_id"))
    rows.exclude_missing(rows.table["images"] != "", on_error)
    rows.table["boxes"] = _boxes(rows.table, folder)
    trained = rows.table["split"] == "train"
    if split_rule == "patient" and not trained.any():
        raise ManifestError(f"vindr_cxr: no training image is left; check the folder {root / 'train'}")
    draw = "" if split_rule == "published" else "all" if trained.all() else "valid"
    return raw.finish(
        folder, rows, list(dict.fromkeys(name for _, names in parts for name in names)), seed=seed, draw=draw
    )


def _boxes(table: pd.DataFrame, folder: raw.RawFolder) -> list[str]:
    """The JSON cell of each image; boxes of PNG and JPEG copies are scaled where a table has the original's size."""
    copies = table[table["entries"].map(bool) & ~table["images"].str.endswith(raw.DICOM)]
    sizes, originals = folder.sizes(copies["images"]), {}
    for path in map(folder.optional, SIZES if len(copies) else ()):
        if path is not None:
            known = raw.read_table(path, {"image_id": "image", **SIDES})
            originals |= {name: (float(w), float(h)) for name, w, h in known.itertuples(index=False)}
    for study, image, entries in copies[["study_id", "images", "entries"]].itertuples(index=False):
        size = sizes[image]
        for entry in entries if size else ():
            if study in originals:
                entry["xywh"] = raw.scaled(entry["xywh"], originals[study], size)
            elif any(entry["xywh"][i] + entry["xywh"][i + 2] > size[i] + 1 for i in (0, 1)):
                raise ManifestError(
                    f"{folder.root / image}: box {entry['xywh']} ends outside its {size[0]} x {size[1]} pixels: boxes "
                    f"count those of the DICOM files; use these, or add {' and '.join(SIZES)} with the columns "
                    "image_id, dim0 and dim1 (height and width of the DICOM image)"
                )
    return [raw.cell(entries) for entries in table["entries"]]


def _tables(folder: raw.RawFolder) -> list[tuple[str, Path, Path | None]]:
    """Split, table of boxes and table of image labels (None: Kaggle's layout) of what is there."""
    if kaggle := folder.optional("train.csv"):
        return [("train", kaggle, None)]
    home = "annotations/" if (folder.root / "annotations").is_dir() else ""
    kinds = {"annotations": "the boxes", "image_labels": "the labels"}
    names = [(kind, split) for split in ("train", "test") for kind in kinds]
    paths = folder.require({f"{home}{k}_{split}.csv": f"{kinds[k]} of the {split} images; {HOW}" for k, split in names})
    return [("train", *paths[:2]), ("test", *paths[2:])]


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: study_id, label, reader ("" for a consensus), x_min, y_min, x_max, y_max (NaN: no box)."""
    label = raw.Column("label", filled=True, remedy="every row has a class")
    columns = {"image_id": IMAGE, "class_name": label, **{name: name for name in CORNERS}}
    table = raw.read_table(path, columns, optional={"rad_id": "reader"})
    table["label"] = table["label"].replace(NAMES)
    blank = (table[CORNERS] == "").all(axis=1)
    numbers = table[CORNERS].apply(pd.to_numeric, errors="coerce")
    for low, high in (("x_min", "x_max"), ("y_min", "y_max")):
        shown = table[low] + " to " + table[high]
        good = blank | ((numbers[low] >= 0) & (numbers[low] < numbers[high]))
        raw.check_cells(path, f"{low}, {high}", shown, good, "a box has 0 <= min < max in pixels, or is blank")
    marked = (table["label"] == NO_FINDING) & ~blank
    raw.check_cells(path, "class_name", table["label"], ~marked, "an image without a finding has no box")
    return table.assign(**numbers)


def read_image_labels(path: Path, readers: Readers, known: Iterable[str]) -> pd.DataFrame:
    """Labels of each image (1 or 0), indexed by image and sorted; several readers are made one.

    known: labels of the table of boxes, whose spelling counts.
    """
    spelt = {theirs: name for name, theirs in raw.columns_of(path, [*CXR_CLIP_LABELS, *NAMES, *known]).items()}
    names = [spelt.get(name, name) for name in raw.header_of(path) if name.lower() not in ("image_id", "rad_id")]
    rule = {"values": raw.BINARY, "remedy": "a label is 0 or 1"}
    labels = {name: raw.Column(NAMES.get(name, name), **rule) for name in names}
    table = raw.read_table(path, {"image_id": IMAGE, **labels}, optional={"rad_id": "reader"})
    reading = (table["study_id"] + " " + table.pop("reader")).str.strip()
    raw.check_cells(path, "image_id and rad_id", reading, ~reading.duplicated(), "a reading occurs twice; keep one row")
    several = table["study_id"].duplicated().any()
    return _agreed(table.groupby("study_id", sort=True).mean(), readers if several else "majority")


def labels_of_boxes(boxes: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """The same from Kaggle's table of boxes alone: a reader saw what they marked."""
    seen = boxes.drop_duplicates(["study_id", "reader", "label"])
    count = seen.pivot_table(index="study_id", columns="label", values="reader", aggfunc="count", fill_value=0)
    number = boxes.groupby("study_id", sort=True)["reader"].nunique()
    return _agreed(count.div(number, axis=0), readers)


def _agreed(fraction: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """Labels from the fraction of readers who saw them; "No Finding" is what has none."""
    present = (fraction > 0 if readers == "union" else fraction > 0.5).astype(float)
    findings = present.drop(columns=NO_FINDING, errors="ignore")
    return findings.assign(**{NO_FINDING: (findings.sum(axis=1) == 0).astype(float)})


def merged_boxes(boxes: pd.DataFrame, readers: Readers, overlap: float) -> dict[str, list[dict]]:
    """Boxes of each image as manifest entries; those of one finding that overlap are one, their mean."""
    entries: dict[str, list[dict]] = {}
    for (image, label), part in boxes[boxes["x_min"].notna()].groupby(["study_id", "label"], sort=True):
        corners, who = part[CORNERS].to_numpy(float), part["reader"].to_numpy(object)
        for members in _overlapping(corners, overlap):
            if readers == "majority" and (who != "").all() and len(set(who[members])) < 2:
                continue
            x0, y0, x1, y1 = corners[members].mean(0)
            xywh = [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)]
            entries.setdefault(image, []).append({"label": label, "xywh": xywh})
    return entries


def _overlapping(corners: np.ndarray, overlap: float) -> list[list[int]]:
    """Indices of boxes (n, 4), grouped by chains of intersection over union >= `overlap`, in order of the first."""
    if len(corners) == 1:
        return [[0]]
    linked = box_iou(torch.from_numpy(corners), torch.from_numpy(corners)).numpy() >= overlap
    group = connected_components(linked, directed=False)[1]
    return [np.flatnonzero(group == number).tolist() for number in pd.unique(group)]
