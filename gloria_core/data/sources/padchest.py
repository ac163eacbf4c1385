"""PadChest (Bustos et al. 2020, https://arxiv.org/abs/1901.07441): 160,861 images of 67,625 patients, 174 findings.

Reads the owner's table of January 2019 and the PNG files in their numbered folders. Reports are Spanish, with words cut
to their stems by the owner. 27 % of the reports were labelled by physicians, the others by a network.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    VIEW_RULES,
    ViewRule,
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    existing,
    finish,
    group_studies,
    patient_leaks,
    read_table,
    require,
    settle,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.splits import assign_splits

NAME = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
TABLE = f"{NAME}|{NAME}.gz"
WHERE = "from https://bimcv.cipf.es/bimcv-projects/padchest/ (request form)"
LABELS = {
    "No Finding": {"normal"},
    "Atelectasis": {
        "atelectasis",
        "laminar atelectasis",
        "lobar atelectasis",
        "round atelectasis",
        "segmental atelectasis",
        "total atelectasis",
    },
    "Cardiomegaly": {"cardiomegaly"},
    "Consolidation": {"consolidation"},
    "Edema": {"pulmonary edema"},
    "Emphysema": {"emphysema"},
    "Fibrosis": {"pulmonary fibrosis"},
    "Fracture": {"rib fracture", "callus rib fracture", "clavicle fracture", "humeral fracture", "vertebral fracture"},
    "Hernia": {"hiatal hernia"},
    "Infiltration": {"infiltrates", "interstitial pattern", "alveolar pattern", "ground glass pattern"},
    "Mass": {"mass", "pulmonary mass", "soft tissue mass", "mediastinal mass"},
    "Nodule": {"nodule", "multiple nodules"},
    "Pleural Effusion": {"pleural effusion", "loculated pleural effusion", "loculated fissural effusion"},
    "Pleural_Thickening": {"pleural thickening", "apical pleural thickening", "calcified pleural thickening"},
    "Pneumonia": {"pneumonia", "atypical pneumonia"},
    "Pneumothorax": {"pneumothorax", "hydropneumothorax"},
    "Support Devices": {
        "NSG tube",
        "central venous catheter",
        "central venous catheter via jugular vein",
        "central venous catheter via subclavian vein",
        "central venous catheter via umbilical vein",
        "reservoir central venous catheter",
        "endotracheal tube",
        "tracheostomy tube",
        "chest drain tube",
        "gastrostomy tube",
        "ventriculoperitoneal drain tube",
        "catheter",
        "pacemaker",
        "dual chamber device",
        "single chamber device",
        "electrical device",
        "dai",
    },
    "Tuberculosis": {"tuberculosis"},
}
"""Label columns, and which of the owner's findings (spaces around them are ignored) count for each."""
_COLUMNS = {
    "ImageID": "name",
    "ImageDir": "folder",
    "StudyID": "study",
    "PatientID": "patient",
    "PatientSex_DICOM": "sex",
    "Projection": "projection",
    "MethodLabel": "method",
    "Labels": "labels",
    "Report": "impression",
}
_EXTRA = {"StudyDate_DICOM": "meta_date", "PatientBirth": "meta_birth", "Pediatric": "meta_pediatric"}
_VIEWS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP", "L": "LATERAL"}
_OTHER = ("COSTAL", "EXCLUDE", "UNK", "")


def prepare(
    root: Path | str,
    *,
    labelled_by: Literal["all", "physician"] = "all",
    views: ViewRule = "frontal",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder with the table and the images (0/ ... 54/, or all in one); a row a study.

    Splits: 70/10/20 %, patient-disjoint and stratified; the owner has none. labelled_by: "physician" keeps the studies
    whose labels people gave. views: COSTAL, EXCLUDE and unknown projections are kept with "all" only, as FRONTAL.
    Labels are 1 or 0; 103 images without labels are listed as excluded. `impression` is the owner's stemmed Spanish.
    `meta_labels` has the owner's findings. Raises ManifestError naming file, row, column and remedy.
    """
    root = Path(root)
    check_option("labelled_by", labelled_by, ("all", "physician"))
    check_option("views", views, VIEW_RULES)
    check_option("on_error", on_error, ("raise", "exclude"))
    path = require(root, {TABLE: f"labels of 160,861 images, {WHERE}"}, "PadChest")[TABLE]
    table = _read(path)
    unlabelled = (table["labels"] == "nan").to_numpy()
    left = _failures(table[unlabelled], "the owner gives no labels")
    by_network = ~unlabelled & ((table["method"] != "Physician") & (labelled_by == "physician")).to_numpy()
    left += _failures(table[by_network].drop_duplicates("study"), "not labelled by a physician")
    table = table[~unlabelled & ~by_network]
    table["image"] = _places(root, table) if check_images else table["folder"] + "/" + table["name"]
    there = (table["image"] != "").to_numpy()
    gone = absent(table, there, key="study", value="name", column="ImageID", reason="listed, but no such file")
    table = table[there]
    settle(gone, source=str(path), on_error=on_error, left=len(table))
    kept = wanted_views(table["view"], views) & (table["known"].to_numpy(bool) | (views == "all"))
    left += gone + unseen_studies(table, kept, column="name", reason=f"no image of view {views!r}")
    if not kept.any():
        raise ManifestError(f"{path}: no image of view {views!r}; use views='all'")
    frame = _frame(_with_labels(table[kept], path))
    frame = assign_splits(frame, seed=seed)
    leaks = patient_leaks(frame["patient_id"], frame["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=left, leaks=leaks)


def _read(path: Path) -> pd.DataFrame:
    table = read_table(path, _COLUMNS, optional=_EXTRA)
    check_unique(path, "ImageID", table["name"])
    check_paths(path, "ImageID", table["name"])
    check_cells(path, "ImageDir", table["folder"], table["folder"].str.fullmatch(r"\d+"), "a folder is a number")
    for column in ("StudyID", "PatientID"):
        values = table[_COLUMNS[column]]
        check_cells(path, column, values, values.str.strip() != "", "give every image its study and patient")
    known = table["projection"].isin([*_VIEWS, *_OTHER])
    check_cells(path, "Projection", table["projection"], known, f"it is {', '.join(_VIEWS)} or {', '.join(_OTHER[:3])}")
    view = table["projection"].map(_VIEWS)
    table["known"], table["view"] = view.notna(), view.fillna("FRONTAL")
    table["impression"] = table["impression"].str.strip()
    return table


def _with_labels(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The rows with their label columns. The few thousand different cells are read once each."""
    found, column = {}, table["labels"]
    for index, cell in column.drop_duplicates().items():
        try:
            names = ast.literal_eval(cell)
            found[cell] = frozenset(name.strip() for name in names if name.strip())
        except (ValueError, SyntaxError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{path}, row {index + 2}, column 'Labels': {cell[:60]!r} is no list ({error})"
            ) from error
    sets = column.map(found)
    hits = {name: {cell: float(bool(terms & names)) for cell, terms in found.items()} for name, names in LABELS.items()}
    labels = {name: column.map(of).astype(float) for name, of in hits.items()}
    return table.assign(**labels, meta_labels=sets.map(lambda names: "|".join(sorted(names))))


def _places(root: Path, table: pd.DataFrame) -> pd.Series:
    """Path below the root of each image: in its numbered folder, in images/, in the root; "" where nowhere."""
    place = pd.Series("", index=table.index)
    for prefix in (table["folder"] + "/", "images/" + table["folder"] + "/", "images/", ""):
        paths = prefix + table["name"]
        if not (place == "").any():
            break
        found = paths.isin(existing(root, paths[place == ""].tolist()))
        place = place.where((place != "") | ~found, paths)
    return place


def _failures(rows: pd.DataFrame, reason: str) -> list[Failure]:
    return [
        Failure(study, int(index) + 2, "ImageID", repr(name), reason)
        for index, study, name in zip(rows.index, rows["study"], rows["name"], strict=True)
    ]


def _frame(table: pd.DataFrame) -> pd.DataFrame:
    images = table.assign(
        is_ap_view=table["view"].map({"AP": 1.0, "PA": 0.0}).astype(float),
        is_male=table["sex"].map({"M": 1.0, "F": 0.0}).astype(float),
        meta_sex=table["sex"],
        meta_labelled_by=np.where(table["method"] == "Physician", "physician", "network"),
    )
    keep = ["impression", *LABELS, "is_ap_view", "is_male", "meta_sex", "meta_labelled_by", "meta_labels"]
    return group_studies(images, keep=[*keep, *_EXTRA.values()])
