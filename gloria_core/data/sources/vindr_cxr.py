"""VinDr-CXR (Nguyen et al. 2022, https://doi.org/10.1038/s41597-022-01498-w): 18,000 frontal images with boxes.

Two layouts are read: PhysioNet's (`annotations/annotations_train.csv`, `image_labels_train.csv`, the same for test,
`train/*.dicom`, `test/*.dicom`) and that of the Kaggle contest (`train.csv`, `train/*.dicom`; its test images have no
public labels). Three radiologists read each training image, each on their own; five agreed on each test image.

The tables of VinDr-CXR, read and checked, and the three readers of an image made one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    DICOM,
    PICTURES,
    absent,
    check_cells,
    check_option,
    check_paths,
    finish,
    locate,
    read_table,
    require,
    settle,
)
from gloria_core.data.splits import assign_splits, drawn_once

Readers = Literal["union", "majority"]

NO_FINDING = "No Finding"
_NAMES = {"No finding": NO_FINDING, "Other diseases": "Other disease"}
"""The owner's spellings that differ between tables or from ours."""
_CORNERS = ["x_min", "y_min", "x_max", "y_max"]


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: image, label, reader ("" for a consensus), x_min, y_min, x_max, y_max (NaN: no box)."""
    table = read_table(
        path, {"image_id": "image", "class_name": "label", **{c: c for c in _CORNERS}}, optional=["rad_id"]
    )
    table = table.rename(columns={"rad_id": "reader"})
    check_paths(path, "image_id", table["image"])
    check_cells(path, "class_name", table["label"], table["label"] != "", "every row has a class")
    table["label"] = table["label"].replace(_NAMES)
    cells = table[_CORNERS]
    blank = (cells == "").all(axis=1)
    numbers = cells.apply(pd.to_numeric, errors="coerce")
    for low, high in (("x_min", "x_max"), ("y_min", "y_max")):
        shown = table[low] + " to " + table[high]
        good = blank | ((numbers[low] >= 0) & (numbers[low] < numbers[high]))
        check_cells(path, f"{low}, {high}", shown, good, "a box has 0 <= min < max in pixels, or is blank")
    marked = (table["label"] == NO_FINDING) & ~blank
    check_cells(path, "class_name", table["label"], ~marked, "an image without a finding has no box")
    table[_CORNERS] = numbers
    return table


def read_image_labels(path: Path, readers: Readers) -> pd.DataFrame:
    """Labels of each image (1 or 0), indexed by image and sorted; several readers are made one."""
    header = path.open(encoding="utf-8-sig").readline().rstrip("\r\n").split(",")
    reader = next((name for name in header if name.lower() == "rad_id"), "")
    names = [name for name in header if name not in ("image_id", reader)]
    table = read_table(path, ["image_id", *([reader] if reader else []), *names])
    check_paths(path, "image_id", table["image_id"])
    for name in names:
        check_cells(path, name, table[name], table[name].isin(["0", "1", "0.0", "1.0"]), "a label is 0 or 1")
    key = ["image_id", reader] if reader else ["image_id"]
    shown = table[key].agg(" ".join, axis=1)
    check_cells(path, " and ".join(key), shown, ~table.duplicated(key), "a reading is there twice; keep one row of it")
    values = table[names].astype(float).rename(columns=_NAMES)
    return _agreed(values.groupby(table["image_id"], sort=True).mean(), readers if reader else "majority")


def labels_of_boxes(boxes: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """The same from Kaggle's table of boxes alone: a reader saw what they marked."""
    seen = boxes.drop_duplicates(["image", "reader", "label"])
    share = seen.pivot_table(index="image", columns="label", values="reader", aggfunc="count", fill_value=0)
    number = boxes.groupby("image", sort=True)["reader"].nunique()
    return _agreed(share.div(number, axis=0), readers)


def _agreed(share: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """Labels from the share of readers who saw them; "No Finding" is what has none."""
    present = (share > 0 if readers == "union" else share > 0.5).astype(float)
    findings = present.drop(columns=NO_FINDING, errors="ignore")
    return findings.assign(**{NO_FINDING: (findings.sum(axis=1) == 0).astype(float)})


def merged_boxes(boxes: pd.DataFrame, readers: Readers, overlap: float) -> dict[str, list[dict]]:
    """Boxes of each image as manifest entries; those of one finding that overlap are one, their mean."""
    marked = boxes[boxes["x_min"].notna()]
    found: dict[str, list[dict]] = {}
    marked = marked.sort_values(["image", "label"], kind="stable")
    images, labels, readings = (marked[name].to_numpy(object) for name in ("image", "label", "reader"))
    places = marked[_CORNERS].to_numpy(float)
    starts = (
        np.flatnonzero(np.r_[True, (images[1:] != images[:-1]) | (labels[1:] != labels[:-1])]) if len(marked) else []
    )
    for start, end in zip(starts, [*starts[1:], len(marked)], strict=True):
        image, label, corners, who = images[start], labels[start], places[start:end], readings[start:end]
        for members in _groups(corners, overlap):
            if readers == "majority" and (who != "").all() and len(set(who[members])) < 2:
                continue
            x0, y0, x1, y1 = corners[members].mean(0)
            xywh = [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)]
            found.setdefault(image, []).append({"label": label, "image": 0, "xywh": xywh})
    return found


def _groups(corners: np.ndarray, overlap: float) -> list[list[int]]:
    """Indices of boxes (n, 4) that hang together by an intersection over union >= `overlap`, in order of the first."""
    if len(corners) == 1:
        return [[0]]
    low = np.maximum(corners[:, None, :2], corners[None, :, :2])
    high = np.minimum(corners[:, None, 2:], corners[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = (corners[:, 2:] - corners[:, :2]).prod(-1)
    linked = shared / (area[:, None] + area[None] - shared) >= overlap
    group = np.arange(len(corners))
    for i, j in zip(*np.nonzero(np.triu(linked, 1)), strict=True):
        group[group == max(group[i], group[j])] = min(group[i], group[j])
    return [np.flatnonzero(group == number).tolist() for number in np.unique(group)]


HOW = "PhysioNet, vindr-cxr (credentialed), or Kaggle, vinbigdata-chest-xray-abnormalities-detection"
CXR_CLIP_LABELS = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
)
"""The 18 targets of CXR-CLIP (You et al. 2023): those with more than ten positive test images."""


def prepare(
    root: Path | str,
    *,
    readers: Readers = "union",
    overlap: float = 0.5,
    labels: Literal["all", "cxr_clip"] = "all",
    split_rule: Literal["patient", "published"] = "patient",
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
    Boxes are in pixels of the original DICOM file: prepare PNG copies of another size from the DICOM files instead.
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy.
    """
    check_option("readers", readers, ("union", "majority"))
    check_option("labels", labels, ("all", "cxr_clip"))
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap is an intersection over union in (0, 1], not {overlap}")
    root = Path(root)
    parts, gone, sources = [], [], []
    for split, boxes_path, labels_path in _tables(root):
        boxes = read_boxes(boxes_path)
        known = labels_of_boxes(boxes, readers) if labels_path is None else read_image_labels(labels_path, readers)
        part = _part(root, split, known, merged_boxes(boxes, readers, overlap))
        if split_rule == "published" and split == "train":
            part["split"] = drawn_once(len(part), held_out=0.2)
        gone += absent(part, part["images"] != "", key="study_id", value="study_id", column="image_id")
        parts.append(part[part["images"] != ""])
        sources.append(str(labels_path or boxes_path))
    frame = pd.concat(parts, ignore_index=True)
    settle(gone, source=" and ".join(sources), on_error=on_error, left=len(frame))
    frame = _kept(frame, labels)
    if split_rule == "patient":
        frame = _drawn(frame, seed)
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone)


def _tables(root: Path) -> list[tuple[str, Path, Path | None]]:
    """Split, table of boxes and table of image labels (None: Kaggle's layout) of what is there."""
    if (root / "train.csv").is_file():
        return [("train", root / "train.csv", None)]
    folder = "annotations/" if (root / "annotations").is_dir() else ""
    needs = {
        f"{folder}{kind}_{split}.csv": f"{what} of the {split} images; {HOW}"
        for kind, what in (("annotations", "the boxes"), ("image_labels", "the labels"))
        for split in ("train", "test")
    }
    paths = require(root, needs, "vindr_cxr")
    return [
        (split, paths[f"{folder}annotations_{split}.csv"], paths[f"{folder}image_labels_{split}.csv"])
        for split in ("train", "test")
    ]


def _part(root: Path, split: str, labels: pd.DataFrame, boxes: dict[str, list[dict]]) -> pd.DataFrame:
    """The manifest rows of one table, sorted by image as `groupby` does; `images` is "" where there is no file."""
    names = pd.Series(labels.index.to_numpy(object))
    part = pd.DataFrame({"study_id": names, "patient_id": names, "split": split})
    part["images"] = locate(root, names, [split], (*DICOM, *PICTURES))
    part["views"] = "PA"
    for name in labels:
        part[name] = labels[name].to_numpy(float)
    part["boxes"] = [json.dumps(boxes[name]) if name in boxes else "" for name in names]
    part["meta_owner_split"] = split
    return part


def _kept(frame: pd.DataFrame, labels: str) -> pd.DataFrame:
    """The label columns that are asked for, and the boxes of these labels."""
    if labels == "all":
        return frame
    fixed = ("study_id", "patient_id", "split", "images", "views", "boxes", "meta_owner_split", NO_FINDING)
    columns = [name for name in frame if name in (*fixed, *CXR_CLIP_LABELS)]
    cells = []
    for cell in frame["boxes"]:
        entries = [entry for entry in json.loads(cell or "[]") if entry["label"] in CXR_CLIP_LABELS]
        cells.append(json.dumps(entries) if entries else "")
    return frame[columns].drop(columns=NO_FINDING).assign(boxes=cells)


def _drawn(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    learn = frame["split"] == "train"
    if not learn.any():
        raise ManifestError("vindr_cxr: no training image is left; check the folder train/")
    if learn.all():
        return assign_splits(frame, seed=seed)
    parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)
    return frame.assign(split=np.where(learn, parts["split"].reindex(frame.index), frame["split"]))
