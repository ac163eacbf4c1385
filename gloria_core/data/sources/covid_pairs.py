"""Radiographs with sentences written about them, from the COVID-19 image collection of Cohen et al.

Cohen, Morrison, Dao: "COVID-19 Image Data Collection", arXiv 2003.11597; github.com/ieee8023/covid-chestxray-dataset.
The texts are from case reports, not from hospitals, and nearly all patients have pneumonia: real words and real masks,
but no place to claim accuracy. Read is one `index.csv` (an image a row) with images, lung and lesion masks beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ExcludedRows, Failure, ManifestError, OnError, validate
from gloria_core.data.sources.nih import read_columns, require
from gloria_core.data.splits import assign_label_ranks, assign_splits

LABELS = {
    "No Finding": r"^No Finding$",
    "Pneumonia": r"^Pneumonia",
    "COVID-19": r"COVID-19",
    "Bacterial Pneumonia": r"/Bacterial",
    "Fungal Pneumonia": r"/Fungal",
    "Tuberculosis": r"^Tuberculosis",
}
"""Label columns, and how they are read from the column `finding` ("Pneumonia/Viral/COVID-19")."""
UNKNOWN = ("Unknown", "todo", "")
VIEWS = {"PA": "PA", "AP": "AP", "AP Supine": "AP", "AP Erect": "AP", "L": "LATERAL"}
_WORDS = {
    "ground_glass_opacities": (
        "Ground Glass Opacity",
        r"ground[- ]glass(?:[- ](?:opacit\w+|opacifications?|densit\w+))?",
    ),
    "consolidation": ("Consolidation", r"consolidations?|consolidative"),
    "pleural_effusion": ("Pleural Effusion", r"pleural effusions?"),
    "pneumothorax": ("Pneumothorax", r"pneumothora(?:x|ces)"),
    "endotracheal_tube": ("Endotracheal Tube", r"endotracheal tube"),
}
"""Lesion masks that a sentence may name: their label, and the words that name them."""
_NAMES = {
    "index": ("id", "path", "text_imaging", "finding", "view", "patient", "offset", "sex", "age"),
    "truth": ("lungmask_v7", "lung_boxes", "lesion_masks", "doi", "url", "licence"),
}


def prepare(
    root: Path | str,
    *,
    texts_only: bool = True,
    deduplicate: bool = False,
    lateral: bool = False,
    split_rule: Literal["patient", "test"] = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest of the collection under `root`; one study an image, `impression` its sentences.

    texts_only: only images with sentences about the radiograph (`text_imaging`); False keeps the others, without text.
    deduplicate: of images with the same words, only the first (of the same patient, mostly); retrieval can also merge
        texts by itself and keep the images.
    lateral: keep lateral views, too, each as a study of its own. Most tasks take frontal images only.
    split_rule: "patient" draws 70/10/20 %, patient-disjoint and stratified; "test" puts everything there, for models
        that were trained elsewhere.
    Masks: "Lung" (both in one file, the v7labs annotation); by other annotators, for a few images, "Left Lung", "Right
    Lung", lesions, tubes and mediastinum, with the words of the sentences that name them. Boxes: each lung.
    What is left out is listed in `attrs["excluded"]` with its row and the reason; on_error="exclude" leaves out, too,
    images that are not there. Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    if split_rule not in ("patient", "test") or on_error not in ("raise", "exclude"):
        raise ValueError(
            f"split_rule={split_rule!r}: use 'patient' or 'test'; on_error={on_error!r}: 'raise', 'exclude'"
        )
    path = root / "index.csv"
    if not path.is_file():
        raise ManifestError(f"{path} is missing; give the folder that holds index.csv and images/")
    names = {name: name for part in _NAMES.values() for name in part}
    table = read_columns(path, names)
    _check(path, table)
    there = np.array([(root / name).is_file() for name in table["path"]])
    if on_error == "raise":
        require(path, "path", table["path"], pd.Series(there), "no such file: complete the copy, or on_error='exclude'")
    reasons = _reasons(table, there, texts_only=texts_only, deduplicate=deduplicate, lateral=lateral)
    kept = table[reasons == ""]
    if kept.empty:
        raise ManifestError(
            f"{path}: nothing is left of {len(table)} images; allow lateral views or images without text"
        )
    frame = _frame(kept, path)
    frame = assign_splits(frame, seed=seed) if split_rule == "patient" else frame.assign(split="test")
    frame = validate(assign_label_ranks(frame, seed=seed), source=f"manifest of {root}")
    left = [
        Failure(table["id"][i], i + 2, "id", repr(table["id"][i]), reasons[i]) for i in np.flatnonzero(reasons != "")
    ]
    frame.attrs["excluded"] = ExcludedRows(ExcludedRows.of(left))
    return frame


def _check(path: Path, table: pd.DataFrame) -> None:
    require(path, "id", table["id"], ~table["id"].duplicated() & (table["id"] != ""), "give every image one id")
    require(path, "view", table["view"], table["view"].isin(list(VIEWS)), f"a view is one of {', '.join(VIEWS)}")
    require(path, "patient", table["patient"], table["patient"] != "", "give every image its patient")
    require(path, "sex", table["sex"], table["sex"].isin(["M", "F", ""]), "a sex is M, F or blank")


def _reasons(
    table: pd.DataFrame, there: np.ndarray, *, texts_only: bool, deduplicate: bool, lateral: bool
) -> np.ndarray:
    """(n,) why a row is left out, "" where it is not."""
    reasons = np.where(there, "", "the image file is missing").astype(object)
    if not lateral:
        reasons[(reasons == "") & (table["view"] == "L")] = "a lateral view"
    if texts_only:
        reasons[(reasons == "") & (table["text_imaging"].str.strip() == "")] = "no sentence about the radiograph"
    if deduplicate:
        words = table["text_imaging"].str.lower().str.findall(r"\w+").str.join(" ")
        among = (reasons == "") & (words != "")
        reasons[among.to_numpy() & words.where(among).duplicated().to_numpy()] = "the text of an earlier image"
    return reasons


def _frame(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    known = ~table["finding"].isin(UNKNOWN)
    labels = {name: np.where(known, table["finding"].str.contains(rule), np.nan) for name, rule in LABELS.items()}
    views = table["view"].map(VIEWS)
    entries = [_entries(row, path, index + 2) for index, row in zip(table.index, table.to_dict("records"), strict=True)]
    frame = pd.DataFrame(
        {
            "study_id": table["id"],
            "patient_id": table["patient"],
            "images": table["path"],
            "views": views,
            "findings": "",
            "impression": table["text_imaging"].str.strip(),
            **labels,
            "is_ap_view": np.where(views == "LATERAL", np.nan, views == "AP"),
            "is_male": np.where(table["sex"] == "", np.nan, table["sex"] == "M"),
            "boxes": [json.dumps(boxes) if boxes else "" for boxes, _ in entries],
            "masks": [json.dumps(masks) if masks else "" for _, masks in entries],
        }
    )
    for name in ("finding", "view", "offset", "sex", "age", "doi", "url", "licence"):
        frame[f"meta_{name}"] = table[name]
    return frame.reset_index(drop=True)


def _entries(row: dict[str, str], path: Path, number: int) -> tuple[list[dict], list[dict]]:
    """Boxes and masks of one image. Raises ManifestError where a cell is not the JSON it should be."""
    try:
        boxes = [
            {"label": name.replace("_", " ").title(), "image": 0, "xywh": box}
            for name, *box in json.loads(row["lung_boxes"] or "[]")
        ]
        lesions = json.loads(row["lesion_masks"] or "{}").items()
    except (ValueError, TypeError, AttributeError) as error:
        raise ManifestError(f"{path}, row {number}: boxes or masks are not JSON ({error}); repair the cell") from error
    masks = [{"label": "Lung", "image": 0, "path": row["lungmask_v7"]}] if row["lungmask_v7"] else []
    text = row["text_imaging"].strip()
    for name, file in lesions:
        label, words = _WORDS.get(name, (name.replace("_", " ").title(), ""))
        entry = {"label": label, "image": 0, "path": file}
        if name in ("left_lung", "right_lung"):
            entry["side"] = name.removesuffix("_lung")
        spans = [["impression", *match.span()] for match in re.finditer(words, text, re.IGNORECASE)] if words else []
        if spans:
            entry["spans"] = spans
        masks.append(entry)
    return boxes, masks
