"""The RSNA pneumonia detection challenge of 2018 (Shih et al. 2019, https://doi.org/10.1148/ryai.2019180041).

Read is Kaggle's folder: `stage_2_train_images/*.dcm` (or PNG or JPEG copies of them), `stage_2_train_labels.csv` and
`stage_2_detailed_class_info.csv`: 26,684 frontal images, 9,555 boxes on 6,012 of them. The labels of Kaggle's test
images are not public, so the papers split the training images. The column `patientId` is the id of an image: every
image has its own, while NIH's patients, from whose images the challenge was drawn, have several.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pandas as pd
from pydicom import dcmread

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.splits import random_split

CLASSES = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
LABEL = "Pneumonia"
HOW = "Kaggle, rsna-pneumonia-detection-challenge (log in and accept the rules)"
LABELS = "stage_2_train_labels.csv"
CLASSES_TABLE = "stage_2_detailed_class_info.csv"
IMAGES = "stage_2_train_images/"
NEEDS = {LABELS: f"the boxes; {HOW}", IMAGES: f"the DICOM images; {HOW}"}
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
# GLoRIA (also CXR-CLIP and MGCA's classification), and MGCA's detection and segmentation, `preprocess/rsna.py`
HELD_OUT = {"published": 0.3, "published_detection": 10_674}


def read_labels(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row an image (its first in the file): study_id, Pneumonia; one row a box: study_id, label, x, y, w, h."""
    numbers = {"x": "x", "y": "y", "width": "w", "height": "h"}
    name, target = raw.Column("study_id", path=True, filled=True), raw.Column("target", values=["0", "1"])
    table = raw.read_table(path, {"patientId": name, "Target": target, **numbers})
    positive = table["target"] == "1"
    rule = "a box has x, y >= 0 and width, height > 0 in pixels; a row with Target 0 has none"
    table = raw.check_boxes(path, table, numbers, marked=positive, remedy=rule, side=raw.ORIGINAL_SIDE)
    alone = ~table["study_id"].duplicated(keep=False) | positive
    remedy = "an image occurs twice without a box; keep one row of it"
    raw.check_cells(path, "patientId", table["study_id"], alone, remedy)
    images = table.drop_duplicates("study_id").assign(**{LABEL: positive.astype(float)})
    return images[["study_id", LABEL]], table[positive].assign(label=LABEL)


def nih_patient(image: str) -> str:
    """NIH's patient of an image "00000282_003.png": "282", as in NIH's table of entries."""
    return image.partition("_")[0].lstrip("0") or "0"


def prepare(
    root: Path,
    *,
    split_rule: Literal["patient", "published", "published_detection"] = "patient",
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
    """
    folder = raw.RawFolder(root, "rsna_pneumonia")
    path, _ = folder.require(NEEDS)
    table, boxes = read_labels(path)
    table = table.sort_values("study_id")
    name = table["study_id"]
    classes = folder.optional(CLASSES_TABLE, without="classes of the images")
    known = _nih_names(folder)
    nih = name.map(lambda image: known.get(image, ""))
    patient = nih.map(lambda image: nih_patient(image) if image else "")
    table = table.assign(
        patient_id=patient.where(patient != "", name),
        meta_rsna_class=_classes(classes, table) if classes else "",
        meta_nih_image=nih,
    )
    leaks = {}
    if split_rule != "patient":
        table["split"] = random_split(len(table), held_out=HELD_OUT[split_rule], test=True)
        known = patient != ""
        if known.any():
            what = "images with a known patient"
            _, leaks = raw.tear(patient[known], table.loc[known, "split"], rows=what, unit="patient")
            leaks = {what: int(known.sum())} | leaks
        table["patient_id"], _ = raw.tear(table["patient_id"], table["split"], rows="images", unit="patient")
    rows = raw.Rows(table, source=path, cell=("patientId", "study_id"))
    rows.table["images"] = folder.locate(name, [IMAGES.rstrip("/")], (*raw.DICOM, *raw.PICTURES))
    rows.exclude_missing(rows.table["images"] != "", on_error)
    rows.place_boxes(boxes, folder, on_error)
    labels = [LABEL]
    if headers:
        rows.table, labels = _with_headers(rows.table, root), [LABEL, "is_ap_view", "is_male"]
    return raw.finish(folder, rows, labels, seed=seed, draw="all" if split_rule == "patient" else "", leaks=leaks)


def _classes(path: Path, images: pd.DataFrame) -> list[str]:
    """The three-way class of each image; it must agree with its label."""
    columns = {"patientId": "study_id", "class": raw.Column("class", values=CLASSES)}
    table = raw.read_table(path, columns).drop_duplicates()
    raw.check_cells(path, "patientId", table["study_id"], ~table["study_id"].duplicated(), "an image has two classes")
    classes = images["study_id"].map(table.set_index("study_id")["class"])
    wrong = classes.isna() | ((classes == "Lung Opacity") != (images[LABEL] == 1))
    if wrong.any():
        name, kind, target = (values[wrong].iloc[0] for values in (images["study_id"], classes, images[LABEL]))
        raise ManifestError(
            f"{path}: image {name!r} has class {kind!r} and Target {target:.0f} in the table of labels; take both "
            "tables from one download"
        )
    return classes.tolist()


def _nih_names(folder: raw.RawFolder) -> dict[str, str]:
    """RSNA's image id -> name of the image in ChestX-ray14, from RSNA's own mapping (JSON) or a CSV with both names."""
    table = folder.optional("rsna_to_nih.csv")
    without = "" if table else "patients of NIH, and every image is its own patient"
    if path := folder.optional(MAPPING, without=without):
        try:
            return {entry["subset_img_id"]: entry["img_id"] for entry in json.loads(raw.read_text(path)[0])}
        except (ValueError, KeyError, TypeError) as error:
            what = "no list of entries with 'subset_img_id' and 'img_id'"
            raise ManifestError(f"{path}: {what} ({error!r}); download it again") from error
    if table:
        table = raw.read_table(table, {"patientId": raw.Column("name", unique=True), "image_index": "image"})
        return dict(zip(table["name"], table["image"], strict=True))
    return {}


def _with_headers(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    with ThreadPoolExecutor(raw.THREADS) as pool:
        found = list(pool.map(_header, [root / path for path in table["images"]]))
    view, sex, age = (pd.Series(part, dtype=object, index=table.index) for part in zip(*found, strict=True))
    views = view.where(view.isin(["PA", "AP"]), "FRONTAL")
    return table.assign(views=views, is_ap_view=raw.ap_view(view), is_male=raw.male(sex), meta_age=age)


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
