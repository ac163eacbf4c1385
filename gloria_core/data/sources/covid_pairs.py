"""Radiographs with sentences written about them, from the COVID-19 image collection of Cohen et al.

Cohen, Morrison, Dao: "COVID-19 Image Data Collection", arXiv 2003.11597; github.com/ieee8023/covid-chestxray-dataset.
The texts are from case reports, not from hospitals, and nearly all patients have pneumonia: real words and real masks,
but no place to claim accuracy. Read is one `index.csv` (an image a row) with images, lung and lesion masks beside it.
"""

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary

# Label columns, and how they are read from the column `finding` ("Pneumonia/Viral/COVID-19")
LABELS = vocabulary("covid_pairs", "labels")
UNKNOWN = ("Unknown", "todo", "")
VIEWS = {"PA": "PA", "AP": "AP", "AP Supine": "AP", "AP Erect": "AP", "L": "LATERAL"}
# Lesion masks that a sentence may name: their label, and the words that name them
WORDS = vocabulary("covid_pairs", "lesions")
COLUMNS = {
    "id": raw.Column("study_id", filled=True, unique=True, remedy="give every image one id"),
    "path": raw.Column("images", path=True, filled=True),
    "text_imaging": raw.Column("impression", strip=True),
    "finding": "meta_finding",
    "view": raw.Column("meta_view", values=list(VIEWS)),
    "patient": raw.Column("patient_id", filled=True, remedy="give every image its patient"),
    "offset": "meta_offset",
    "sex": raw.Column("meta_sex", values=["M", "F", ""]),
    "age": "meta_age",
    "doi": "meta_doi",
    "url": "meta_url",
    "licence": "meta_licence",
    "lungmask_v7": "lungs",
    "lung_boxes": "lung_boxes",
    "lesion_masks": "lesions",
}
NEEDS = {"index.csv": "the table, beside images/"}
OPTIONAL = {"width": "width", "height": "height"}


def prepare(
    root: Path,
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
    images that are not there.
    """
    folder = raw.RawFolder(root, "covid_pairs")
    (path,) = folder.require(NEEDS)
    rows = raw.Rows(raw.read_table(path, COLUMNS, optional=OPTIONAL), source=path, cell=("id", "study_id"))
    rows.exclude_missing(folder.complete(rows.table["images"]), on_error, cell=("path", "images"))
    if not lateral:
        rows.exclude(rows.table["meta_view"] == "L", "a lateral view")
    if texts_only:
        rows.exclude(rows.table["impression"] == "", "no sentence about the radiograph")
    if deduplicate:
        words = rows.table["impression"].str.lower().str.findall(r"\w+").str.join(" ")
        rows.exclude(words.duplicated() & (words != ""), "the text of an earlier image")
    rows.check_rest("allow lateral views or images without text")
    table = rows.table
    known = ~table["meta_finding"].isin(UNKNOWN)
    for name, rule in LABELS.items():
        table[name] = np.where(known, table["meta_finding"].str.contains(rule), np.nan)
    table["views"] = table["meta_view"].map(VIEWS)
    table["is_ap_view"], table["is_male"] = raw.ap_view(table["views"]), raw.male(table["meta_sex"])
    sizes = folder.sizes(table.loc[table["lung_boxes"] != "", "images"])
    cells = [_cells(row, path, sizes.get(row["images"])) for row in table.reset_index().to_dict("records")]
    table["boxes"], table["masks"] = zip(*cells, strict=True)
    rows.table = table if split_rule == "patient" else table.assign(split="test")
    labels = [*LABELS, "is_ap_view", "is_male"]
    return raw.finish(folder, rows, labels, seed=seed, draw="all" if split_rule == "patient" else "")


def _cells(row: dict, path: Path, size: tuple[int, int] | None) -> tuple[str, str]:
    """Boxes (in pixels of a file of `size`) and masks of one image. Raises ManifestError for what is not JSON."""
    try:
        sides = json.loads(row["lung_boxes"] or "[]")
        boxes = [{"label": side.replace("_", " ").title(), "xywh": box} for side, *box in sides]
        original = [float(row[name]) for name in ("width", "height") if row[name]]
        if size and len(original) == 2 and list(size) != original:
            boxes = [{**box, "xywh": raw.scaled(box["xywh"], original, size)} for box in boxes]
        lesions = json.loads(row["lesions"] or "{}").items()
    except (ValueError, TypeError, AttributeError) as error:
        number = row["index"] + 2
        raise ManifestError(f"{path}, row {number}: boxes or masks are not JSON ({error}); repair the cell") from error
    masks = [{"label": "Lung", "path": row["lungs"]}] if row["lungs"] else []
    for name, file in lesions:
        label, words = WORDS.get(name, (name.replace("_", " ").title(), ""))
        entry = {"label": label, "path": file}
        if name in ("left_lung", "right_lung"):
            entry["side"] = name.removesuffix("_lung")
        matches = re.finditer(words, row["impression"], re.IGNORECASE) if words else ()
        if spans := [["impression", *match.span()] for match in matches]:
            entry["spans"] = spans
        masks.append(entry)
    return raw.cell(boxes), raw.cell(masks)
