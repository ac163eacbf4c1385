"""MS-CXR (Boecking et al. 2022, https://physionet.org/content/ms-cxr/): phrases and their boxes on MIMIC-CXR images.

1,162 phrase-region pairs of eight findings, chosen by radiologists. Reads `MS_CXR_Local_Alignment_v1.*.csv` and the JPG
of MIMIC-CXR-JPG. An image is a row: `impression` holds its phrases as sentences, `boxes` the boxes, and `masks` the
regions with the characters of the text that name them, which is what grounding is scored with.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data.manifest import Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    absent,
    check_cells,
    check_option,
    check_paths,
    existing,
    finish,
    patient_leaks,
    read_table,
    require,
    settle,
)

TABLE = "MS_CXR_Local_Alignment_v1.*.csv"
TABLES = f"{TABLE}|ms-cxr*/{TABLE}|*/{TABLE}"
WHERE = "from https://physionet.org/content/ms-cxr/ (credentialed access)"
LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Lung Opacity",
    "Pleural Effusion",
    "Pneumonia",
    "Pneumothorax",
)
MASKS = "ms_cxr_masks"
_SPLITS = {"train": "train", "val": "valid", "valid": "valid", "validate": "valid", "test": "test"}
_COLUMNS = {"category_name": "label", "label_text": "phrase", "path": "path", "dicom_id": "dicom"}
_NUMBERS = ("x", "y", "w", "h", "image_width", "image_height")


def prepare(
    root: Path | str,
    *,
    table: str | Path = "",
    split_rule: Literal["patient", "published"] = "patient",
    write_masks: bool = True,
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the MIMIC-CXR-JPG folder `root` (files/p10/...), with the table in it or at `table`.

    split_rule: "patient" puts everything in test; "published" takes the column split of version 1.1.0. Where MIMIC's
        split table is under the root, `attrs["leaks"]` counts the patients that its official training has, too: leave
        them out of pretraining with `mimic_cxr`'s option hold_out.
    write_masks: writes a 1-bit PNG for each phrase into root/ms_cxr_masks and lists it in `masks` with its spans;
        False leaves `masks` empty (boxes carry the spans, too).
    Boxes are scaled to the size of the image file that is there. Labels: 1 for a finding that has a phrase, else blank,
    for nobody looked for it. Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    path = Path(table) if table else require(root, {TABLES: f"phrases and boxes, {WHERE}"}, "MS-CXR")[TABLES]
    rows = _read(path)
    failures: list[Failure] = []
    if check_images:
        there = rows["path"].isin(existing(root, rows["path"].unique().tolist()))
        failures = absent(rows, there, key="dicom", value="path", column="path", reason="no such image file")
        rows = rows[there]
        settle(failures, source=f"{path} (images of MIMIC-CXR-JPG under {root})", on_error=on_error, left=len(rows))
        rows = _scaled(rows, root, path)
    if split_rule == "published":
        good = rows["split"].isin(list(_SPLITS))
        check_cells(path, "split", rows["split"], good, "it is train, val or test (version 1.1.0); or use 'patient'")
        rows["split"] = rows["split"].map(_SPLITS)
    else:
        rows["split"] = "test"
    frame = pd.DataFrame([_study(dicom, part) for dicom, part in rows.groupby("dicom", sort=True)])
    masks = frame.pop("regions")
    frame["masks"] = [_masks(root, found) for found in masks] if write_masks else ""
    leaks = patient_leaks(frame["patient_id"], frame["split"]) | _seen_by_mimic(root, frame)
    return finish(frame, source=f"manifest of {path}", seed=seed, failures=failures, leaks=leaks)


def _read(path: Path) -> pd.DataFrame:
    """One row a box."""
    table = read_table(path, {**_COLUMNS, **{name: name for name in _NUMBERS}}, optional=["split"])
    check_cells(path, "category_name", table["label"], table["label"].isin(LABELS), f"it is one of {', '.join(LABELS)}")
    check_cells(path, "label_text", table["phrase"], table["phrase"].str.strip() != "", "give the phrase")
    check_paths(path, "path", table["path"])
    for name in _NUMBERS:
        numbers = pd.to_numeric(table[name], errors="coerce")
        good = numbers.notna() & ((numbers >= 0) if name in ("x", "y") else (numbers > 0))
        check_cells(path, name, table[name], good, "a box is x, y >= 0 and w, h > 0 in pixels of the image")
        table[name] = numbers
    parts = table["path"].str.extract(r"(p\d{8})/(s\d{8})/[^/]+$")
    check_cells(path, "path", table["path"], parts[0].notna(), "a path is files/p10/p10000032/s50414267/<dicom_id>.jpg")
    table["patient"], table["study"] = parts[0], parts[1]
    repeated = table.duplicated(["dicom", "label", "phrase", "x", "y", "w", "h"])
    check_cells(path, "dicom_id", table["dicom"], ~repeated, "the same box of the same phrase is there twice")
    return table


def _scaled(rows: pd.DataFrame, root: Path, path: Path) -> pd.DataFrame:
    """Boxes in pixels of the files that are there."""
    names = sorted(set(rows["path"]))
    with ThreadPoolExecutor(8) as pool:
        sizes = dict(zip(names, pool.map(lambda name: _size(root / name), names), strict=True))
    unreadable = rows["path"].map(lambda name: sizes[name] is None)
    check_cells(path, "path", rows["path"], ~unreadable, "the image file cannot be read; download it again")
    across = rows["path"].map(lambda name: sizes[name][0]) / rows["image_width"]
    down = rows["path"].map(lambda name: sizes[name][1]) / rows["image_height"]
    scaled = {name: rows[name] * (across if name in ("x", "w", "image_width") else down) for name in _NUMBERS}
    return rows.assign(**{name: values.round(3) for name, values in scaled.items()})


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None


def _study(dicom: str, rows: pd.DataFrame) -> dict:
    """One image with all its phrases, in the order of the table."""
    text, boxes, regions = "", [], []
    for (label, phrase), part in rows.groupby(["label", "phrase"], sort=False):
        words = " ".join(phrase.split())
        start = len(text) + bool(text)
        text += (" " if text else "") + words
        span = ["impression", start, start + len(words)]
        text += "" if words.endswith((".", "!", "?")) else "."
        found = part[["x", "y", "w", "h"]].to_numpy(float).tolist()
        boxes += [{"label": label, "image": 0, "xywh": box, "spans": [span]} for box in found]
        regions.append((dicom, len(regions), label, span, found, part[["image_height", "image_width"]].iloc[0]))
    first = rows.iloc[0]
    labels = {name: 1.0 if (rows["label"] == name).any() else np.nan for name in LABELS}
    return {
        "study_id": dicom,
        "patient_id": first["patient"],
        "split": first["split"],
        "images": first["path"],
        "views": "FRONTAL",
        "impression": text,
        **labels,
        "boxes": json.dumps(boxes),
        "meta_study": first["study"],
        "regions": regions,
    }


def _masks(root: Path, regions: list[tuple]) -> str:
    """Write the region of each phrase as a 1-bit PNG; the manifest's cell that lists them."""
    entries = []
    (root / MASKS).mkdir(exist_ok=True)
    for dicom, number, label, span, boxes, (height, width) in regions:
        name = f"{MASKS}/{dicom}_{number}.png"
        mask = np.zeros((round(height), round(width)), bool)
        for x, y, w, h in boxes:
            mask[round(y) : max(round(y + h), round(y) + 1), round(x) : max(round(x + w), round(x) + 1)] = True
        part = root / f"{name}.{os.getpid()}.part"
        Image.fromarray(mask).save(part, format="PNG")
        part.replace(root / name)
        entries.append({"label": label, "image": 0, "path": name, "spans": [span]})
    return json.dumps(entries)


def _seen_by_mimic(root: Path, frame: pd.DataFrame) -> dict[str, int]:
    """Patients of the frame in the official training split of MIMIC-CXR, where its table is under the root."""
    tables = sorted(root.glob("mimic-cxr-2*-split.csv*"))
    if not tables:
        return {}
    official = read_table(tables[0], {"subject_id": "subject", "split": "split"})
    seen = set("p" + official.loc[official["split"] == "train", "subject"])
    test = frame["patient_id"][frame["split"] == "test"]
    return {"test patients in the official MIMIC-CXR train": int(test.drop_duplicates().isin(seen).sum())}


def patients_of(path: Path) -> set[str]:
    """The patients (p10000032) of an MS-CXR table, or of any csv with a column `path`, `subject_id` or `patient_id`."""
    if not path.is_file():
        raise ManifestError(f"{path}: no such table; give a csv with the patients to hold out")
    header = read_table(path, [], optional=["subject_id", "path", "patient_id"])
    for name in ("subject_id", "patient_id", "path"):
        found = header[name].str.extract(r"(?:^|/)p?(\d{8})(?:/|$)")[0] if (header[name] != "").any() else None
        if found is not None:
            check_cells(path, name, header[name], found.notna(), "a patient has eight digits")
            return set("p" + found)
    raise ManifestError(f"{path}: row 1 (the header) lacks subject_id, patient_id and path; one must name the patients")
