"""The RSNA pneumonia detection challenge of 2018 (Shih et al. 2019, https://doi.org/10.1148/ryai.2019180041).

Read is Kaggle's folder: `stage_2_train_images/*.dcm` (or PNG or JPEG copies of them), `stage_2_train_labels.csv` and
`stage_2_detailed_class_info.csv`: 26,684 frontal images, 9,555 boxes on 6,012 of them. The labels of Kaggle's test
images are not public, so the papers split the training images. Images, not patients, have ids: see `rsna_tables`.

The tables of the RSNA pneumonia challenge, read and checked: boxes, three-way classes, and NIH's image names.

Shih et al. 2019, https://doi.org/10.1148/ryai.2019180041. The column `patientId` is the id of an image, not of a
patient: every image has its own, while NIH's patients, from whose images the challenge was drawn, have several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydicom import dcmread

from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    DICOM,
    PICTURES,
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    file_sizes,
    finish,
    locate,
    patient_leaks,
    read_table,
    require,
    scaled,
    settle,
)
from gloria_core.data.splits import assign_splits, drawn_twice, seen_in_training, torn_patients

CLASSES = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
BOX_PIXELS = 1024
"""Side of the original images, whose pixels the boxes count."""
LABEL = "Pneumonia"

Boxes = dict[str, list[list[float]]]


def read_labels(path: Path) -> tuple[pd.Series, Boxes]:
    """Target (0 or 1) by image id, sorted by id as pandas groups them, and the boxes [x, y, w, h] of each image."""
    table = read_table(path, ["patientId", "x", "y", "width", "height", "Target"])
    ids = table["patientId"]
    check_paths(path, "patientId", ids)
    check_cells(path, "Target", table["Target"], table["Target"].isin(["0", "1"]), "a target is 0 or 1")
    positive = (table["Target"] == "1").to_numpy()
    numbers = table[["x", "y", "width", "height"]].apply(pd.to_numeric, errors="coerce")
    for name in numbers:
        good = numbers[name].gt(0) if name in ("width", "height") else numbers[name].ge(0)
        rule = "a box has x, y >= 0 and width, height > 0 in pixels; a row with Target 0 has none"
        check_cells(path, name, table[name], np.where(positive, good, table[name] == ""), rule)
    alone = ~ids.duplicated(keep=False) | positive
    check_cells(path, "patientId", ids, alone, "an image is there twice without a box; keep one row of it")
    boxes: Boxes = {}
    for name, box in zip(ids[positive], numbers[positive].to_numpy(float).tolist(), strict=True):
        boxes.setdefault(name, []).append(box)
    return pd.Series(positive.astype(float), index=ids).groupby(level=0, sort=True).max(), boxes


def read_classes(path: Path, targets: pd.Series) -> pd.Series:
    """The three-way class of each image; it must agree with `targets`."""
    table = read_table(path, ["patientId", "class"])
    check_cells(path, "class", table["class"], table["class"].isin(CLASSES), f"a class is one of {', '.join(CLASSES)}")
    table = table.drop_duplicates()
    check_cells(path, "patientId", table["patientId"], ~table["patientId"].duplicated(), "an image has two classes")
    classes = table.set_index("patientId")["class"].reindex(targets.index)
    agree = (classes == "Lung Opacity") == (targets == 1)
    if classes.isna().any() or not agree.all():
        first = targets.index[(classes.isna() | ~agree).to_numpy()][0]
        raise ManifestError(
            f"{path}: image {first!r} has class {classes[first]!r} and Target {targets[first]:.0f} in the table of "
            "labels; take both tables from one download"
        )
    return classes


def read_nih_names(path: Path) -> dict[str, str]:
    """RSNA's image id -> name of the image in ChestX-ray14, from RSNA's own mapping (JSON) or a CSV with both names."""
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return {entry["subset_img_id"]: entry["img_id"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{path}: no list of entries with 'subset_img_id' and 'img_id' ({error!r}); download it again"
            ) from error
    table = read_table(path, ["patientId", "image_index"])
    check_unique(path, "patientId", table["patientId"])
    return dict(zip(table["patientId"], table["image_index"], strict=True))


def nih_patient(image: str) -> str:
    """NIH's patient of an image "00000282_003.png": "282", as in NIH's table of entries."""
    return image.partition("_")[0].lstrip("0") or "0"


HOW = "Kaggle, rsna-pneumonia-detection-challenge (log in and accept the rules)"
LABELS = "stage_2_train_labels.csv|stage_2_train_labels.csv.zip"
CLASSES_TABLE = "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images/"
NAMES = ("pneumonia-challenge-dataset-mappings_2018.json", "rsna_to_nih.csv")
HELD_OUT = {"published": 0.3, "published_detection": 10_674}
"""GLoRIA (also CXR-CLIP and MGCA's classification), and MGCA's detection and segmentation, `preprocess/rsna.py`."""

SplitRule = Literal["patient", "published", "published_detection"]


def prepare(
    root: Path | str,
    *,
    split_rule: SplitRule = "patient",
    headers: bool = False,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label "Pneumonia", boxes "Pneumonia" in pixels of the file.

    split_rule: "patient" draws 70/10/20 %, stratified; "published" is GLoRIA's 18,678 / 4,003 / 4,003 of train, valid
        and test, "published_detection" MGCA's 16,010 / 5,337 / 5,337, drawn from all images of the table, whether the
        files are there or not. Both published splits are by image. Patients are known only with RSNA's mapping to NIH
        (`pneumonia-challenge-dataset-mappings_2018.json`, or `rsna_to_nih.csv` for a part) in the root: then "patient"
        is patient-disjoint, and `attrs["leaks"]` counts the patients that a published split has on both sides.
    headers: read view, sex and age from every DICOM header (a few minutes for all on a network disk).
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy.
    """
    check_option("split_rule", split_rule, ("patient", *HELD_OUT))
    check_option("on_error", on_error, ("raise", "exclude"))
    root = Path(root)
    paths = require(root, {LABELS: f"the boxes; {HOW}", IMAGES: f"the DICOM images; {HOW}"}, "rsna_pneumonia")
    targets, boxes = read_labels(paths[LABELS])
    table = pd.DataFrame({"name": targets.index, "target": targets.to_numpy()})
    table["class"] = read_classes(root / CLASSES_TABLE, targets).to_numpy() if (root / CLASSES_TABLE).is_file() else ""
    names = next((read_nih_names(root / name) for name in NAMES if (root / name).is_file()), {})
    table["nih"] = table["name"].map(names).fillna("")
    known = table["nih"].map(lambda image: nih_patient(image) if image else "")
    table["patient"] = known.where(known != "", table["name"])
    leaks = {}
    if split_rule != "patient":
        table["split"] = drawn_twice(len(table), held_out=HELD_OUT[split_rule])
        leaks = _leaks(known, table["split"])
        table["patient"] = torn_patients(table["patient"], table["split"])
    table["file"] = locate(root, table["name"], [IMAGES.rstrip("/")], (*DICOM, *PICTURES))
    gone = absent(table, table["file"] != "", key="name", value="name", column="patientId")
    table = table[table["file"] != ""].reset_index(drop=True)
    settle(gone, source=str(paths[LABELS]), on_error=on_error, left=len(table))
    frame = _frame(table, boxes, root, headers=headers)
    if split_rule == "patient":
        frame = assign_splits(frame, seed=seed)
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone, leaks=leaks)


def _leaks(patients: pd.Series, split: pd.Series) -> dict[str, int]:
    """Of the images whose NIH patient is known; nothing can be said of the others."""
    known = (patients != "").to_numpy()
    if not known.any():
        return {}
    counts = patient_leaks(patients[known], split[known])
    return {"images with a known patient": int(known.sum()), **counts} | seen_in_training(
        patients, split, rows="images with a known patient", unit="patient"
    )


def _frame(table: pd.DataFrame, boxes: Mapping[str, list[list[float]]], root: Path, *, headers: bool) -> pd.DataFrame:
    """The manifest without ranks, and without splits unless the table has them."""
    original = (BOX_PIXELS, BOX_PIXELS)
    copies = table["name"].isin(list(boxes)) & ~table["file"].str.endswith(DICOM)
    sizes = file_sizes(root, table.loc[copies, "file"])
    broken = [path for path, size in sizes.items() if size is None]
    if broken:
        raise ManifestError(
            f"{root}: {broken[0]} has boxes and cannot be read ({len(broken)} such files); copy it again"
        )
    cells = [
        json.dumps(
            [{"label": LABEL, "image": 0, "xywh": scaled(b, sizes.get(file, original), original)} for b in boxes[name]]
        )
        if name in boxes
        else ""
        for name, file in zip(table["name"], table["file"], strict=True)
    ]
    frame = pd.DataFrame(
        {
            "study_id": table["name"],
            "patient_id": table["patient"],
            "images": table["file"],
            "views": "FRONTAL",
            LABEL: table["target"],
            "boxes": cells,
            "meta_rsna_class": table["class"],
            "meta_nih_image": table["nih"],
        }
    )
    if "split" in table:
        frame["split"] = table["split"]
    return _with_headers(frame, root) if headers else frame


def _with_headers(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_header, [root / path for path in frame["images"]]))
    view, sex, age = (pd.Series(part, dtype=object) for part in zip(*found, strict=True))
    return frame.assign(
        views=view.where(view.isin(["PA", "AP"]), "FRONTAL"),
        is_ap_view=np.where(view.isin(["PA", "AP"]), view == "AP", np.nan),
        is_male=np.where(sex.isin(["M", "F"]), sex == "M", np.nan),
        meta_age=age,
    )


def _header(path: Path) -> tuple[str, str, str]:
    """View position, sex and age of a DICOM file, "" where it does not say. Raises ManifestError for no DICOM file."""
    tags = ("ViewPosition", "PatientSex", "PatientAge")
    try:
        header = dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        # raw values: RSNA writes ages as "43", which is against the standard's "043Y" and would warn on every file
        raw = [header.get_item(tag) if tag in header else None for tag in tags]
        return tuple((item.value or b"").decode("ascii").strip(" \0") if item else "" for item in raw)
    # a damaged header can fail anywhere in the reader
    except Exception as error:
        raise ManifestError(f"{path}: no readable DICOM header ({error}); headers=False does not need it") from error
