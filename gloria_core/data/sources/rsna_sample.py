"""RSNA pneumonia boxes on copies of the NIH images that they were drawn on (Shih et al. 2019).

Article: https://doi.org/10.1148/ryai.2019180041. RSNA's radiologists drew boxes of opacities suspicious for pneumonia
on 26,684 of the images of NIH ChestX-ray14. This source reads a folder with such images under NIH's names, and tables:
`stage_2_train_labels.csv` (patientId, x, y, width, height, Target; one row a box, in pixels of 1024 x 1024),
`rsna_to_nih.csv` (patientId, image_index, rsna_class), and if there, `image_source.csv` (image_index, source) and NIH's
`Data_Entry_2017*.csv` (projection, sex, age).
RSNA gave every image a patient of its own; here a patient is NIH's (the number before the underscore), so that images
of one person stay in one split. There are no reports: findings and impression are empty.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data.manifest import ExcludedRows, Failure, ManifestError, OnError, raise_failures, validate
from gloria_core.data.sources.nih import find_table, read_columns, read_entries, read_extra, require
from gloria_core.data.sources.rsna_pneumonia import nih_patient
from gloria_core.data.splits import assign_label_ranks, assign_splits

LABEL = "Pneumonia"
ENTRIES = "Data_Entry_2017*.csv"
BOX_PIXELS = 1024
SUFFIXES = (".jpg", ".jpeg", ".png")
_LABELS = {name: name for name in ("patientId", "x", "y", "width", "height", "Target")}
_MATCHES = {"patientId": "patientId", "image_index": "image", "rsna_class": "rsna_class"}


def prepare(root: Path | str, *, seed: int = 0, on_error: OnError = "raise") -> pd.DataFrame:
    """The checked manifest: label "Pneumonia" (RSNA's Target), boxes in pixels of the image files, one study an image.

    Splits of 70/10/20 % and label ranks follow `seed`, patient-disjoint and stratified by the label. Where NIH's table
    of entries is there, `is_ap_view`, `is_male` (blank for images that it lacks) and `meta_age` come from it, and the
    views are PA or AP.
    on_error="exclude" leaves out patients without a known image, or whose image is not there, and lists them in
    `attrs["excluded"]`. Where the images come from several sources (`meta_source`), the source may give the label away:
    judge within a source.
    Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    if on_error not in ("raise", "exclude"):
        raise ValueError(f"on_error must be 'raise' or 'exclude', not {on_error!r}")
    path, matches = root / "stage_2_train_labels.csv", root / "rsna_to_nih.csv"
    for table in (path, matches):
        if not table.is_file():
            raise ManifestError(f"{table} is missing; the root must hold RSNA's labels and the match to NIH's images")
    labels, known = _read_labels(path), read_columns(matches, _MATCHES)
    for name in ("patientId", "image"):
        require(matches, _theirs(name), known[name], ~known[name].duplicated(), "a match must be one to one")
    files = _files(root)
    known["file"] = [files.get(image.rsplit(".", 1)[0], "") for image in known["image"]]
    of_patient = known.set_index("patientId").to_dict("index")
    rows, failures = [], []
    boxed = dict(iter(labels[labels["Target"] == "1"].groupby("patientId")[["x", "y", "width", "height"]]))
    for index, patient in labels["patientId"].drop_duplicates().items():
        found = of_patient.get(patient, {})
        # only boxes need the size of the file; whether the others can be read is asked when the images are cached
        size = _size(root / found["file"]) if patient in boxed and found.get("file") else None
        if not found.get("file") or (patient in boxed and size is None):
            why = "its image is missing or unreadable" if found else "no such patient in rsna_to_nih.csv"
            failures.append(Failure(patient, int(index) + 2, "patientId", repr(patient), why))
            continue
        rows.append(_row(patient, found, boxed.get(patient), size))
    if on_error == "raise" or not rows:
        raise_failures(failures, source=f"{path} (on_error='exclude' keeps the images that are there)")
    frame = pd.DataFrame(rows)
    sources = read_extra(root / "image_source.csv", "image_index", "source")
    if sources:
        frame["meta_source"] = [sources.get(image, "") for image in frame["image"]]
    frame = assign_label_ranks(assign_splits(frame.drop(columns="image"), seed=seed), seed=seed)
    frame = validate(_with_entries(frame, root), source=f"manifest of {root}")
    frame.attrs["excluded"] = ExcludedRows.of(failures)
    return frame


def _with_entries(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The frame with what NIH's table says of each image; added after the splits, which it does not move."""
    if not any(root.glob(ENTRIES)):
        return frame
    of = read_entries(find_table(root, ENTRIES)).set_index("study").reindex(frame["study_id"])
    view = of["view"].to_numpy(object)
    return frame.assign(
        views=np.where(pd.isna(view), frame["views"], view),
        is_ap_view=of["view"].map({"AP": 1.0, "PA": 0.0}).to_numpy(float),
        is_male=of["sex"].map({"M": 1.0, "F": 0.0}).to_numpy(float),
        meta_age=of["age"].fillna("").to_numpy(object),
    )


def _theirs(name: str) -> str:
    return next(theirs for theirs, ours in _MATCHES.items() if ours == name)


def _read_labels(path: Path) -> pd.DataFrame:
    """One row a box (or a patient without one); numbers as numbers, index + 2 is the row of the file."""
    table = read_columns(path, _LABELS)
    require(path, "Target", table["Target"], table["Target"].isin(["0", "1"]), "a target is 0 or 1")
    positive = table["Target"] == "1"
    for name in ("x", "y", "width", "height"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        good = numbers.notna() & (numbers > 0 if name in ("width", "height") else numbers >= 0)
        remedy = "target 1 has a box of x, y >= 0 and width, height > 0; target 0 has none"
        require(path, name, table[name], good.where(positive, table[name] == ""), remedy)
        table[name] = numbers
    both = table.groupby("patientId")["Target"].transform("nunique") == 1
    require(path, "Target", table["Target"], both, "a patient is target 1 or target 0, not both")
    return table


def _row(
    patient: str, match: dict[str, str], boxes: pd.DataFrame | None, size: tuple[int, int] | None
) -> dict[str, object]:
    """One study of the manifest, without split, rank and source; `image` is NIH's name."""
    entries = []
    for box in [] if boxes is None else boxes.to_numpy(float):
        scaled = box * np.array([*size, *size]) / BOX_PIXELS
        entries.append({"label": LABEL, "image": 0, "xywh": [round(float(value), 3) for value in scaled]})
    stem = match["image"].rsplit(".", 1)[0]
    return {
        "study_id": stem,
        "patient_id": nih_patient(match["image"]),  # as the nih source names them, so that leaks between the two show
        "image": match["image"],
        "images": match["file"],
        "views": "FRONTAL",
        "findings": "",
        "impression": "",
        LABEL: float(len(entries) > 0),
        "boxes": json.dumps(entries) if entries else "",
        "masks": "",
        "meta_rsna_patient": patient,
        "meta_rsna_class": match["rsna_class"],
    }


def _files(root: Path) -> dict[str, str]:
    """Stem -> path relative to `root`, of every image in images/."""
    found = sorted(p for p in (root / "images").glob("*") if p.suffix.lower() in SUFFIXES)
    return {path.stem: path.relative_to(root).as_posix() for path in found}


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None
