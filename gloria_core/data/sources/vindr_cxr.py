"""VinDr-CXR (Nguyen et al. 2022, https://doi.org/10.1038/s41597-022-01498-w): 18,000 frontal images with boxes.

Two layouts are read: PhysioNet's (`annotations/annotations_train.csv`, `image_labels_train.csv`, the same for test,
`train/*.dicom`, `test/*.dicom`) and that of the Kaggle contest (`train.csv`, `train/*.dicom`; its test images have no
public labels). Three radiologists read each training image, each on their own; five agreed on each test image.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.image_places import DICOM, PICTURES, locate
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.owner_folder import absent, check_option, finish, require, settle
from gloria_core.data.published_splits import drawn_once
from gloria_core.data.sources.vindr_tables import (
    NO_FINDING,
    Readers,
    labels_of_boxes,
    merged_boxes,
    read_boxes,
    read_image_labels,
)
from gloria_core.data.splits import assign_splits

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
