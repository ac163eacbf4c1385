"""PadChest (Bustos et al. 2020, https://arxiv.org/abs/1901.07441): 160,861 images of 67,625 patients, 174 findings.

Reads the owner's table of January 2019 and the PNG files in their numbered folders. Reports are Spanish, with words cut
to their stems by the owner. 27 % of the reports were labelled by physicians, the others by a network.
"""

import ast
from pathlib import Path
from typing import Literal

import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary

NAME = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
WHERE = "from https://bimcv.cipf.es/bimcv-projects/padchest/ (request form)"
NEEDS = {NAME: f"labels of 160,861 images, {WHERE}"}
# Label columns, and the owner's findings (blanks around them are ignored) that count for each
LABELS = vocabulary("padchest", "labels")
VIEWS = {"PA": "PA", "AP": "AP", "AP_horizontal": "AP", "L": "LATERAL"}
FILLED = {"filled": True, "remedy": "give every image its study and patient"}
COLUMNS = {
    "ImageID": raw.Column("name", unique=True, path=True, filled=True),
    "ImageDir": raw.Column("folder", pattern=r"\d+", remedy="a folder is a number"),
    "StudyID": raw.Column("study_id", **FILLED),
    "PatientID": raw.Column("patient_id", **FILLED),
    "PatientSex_DICOM": "meta_sex",
    "Projection": raw.Column("projection", values=[*VIEWS, "COSTAL", "EXCLUDE", "UNK", ""]),
    "MethodLabel": "method",
    "Labels": "labels",
    "Report": "impression",
}
OPTIONAL = {"StudyDate_DICOM": "meta_date", "PatientBirth": "meta_birth", "Pediatric": "meta_pediatric"}


def prepare(
    root: Path,
    *,
    labelled_by: Literal["all", "physician"] = "all",
    views: raw.ViewRule = "frontal",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder with the table and the images (0/ ... 54/, or all in one); a row a study.

    Splits: 70/10/20 %, patient-disjoint and stratified; the owner has none. labelled_by: "physician" keeps the studies
    whose labels people gave. views: COSTAL, EXCLUDE and unknown projections are kept with "all" only, as FRONTAL.
    Labels are 1 or 0; 103 images without labels are listed as excluded. `impression` is the owner's stemmed Spanish.
    `meta_labels` has the owner's findings.
    """
    folder = raw.RawFolder(root, "PadChest")
    (path,) = folder.require(NEEDS)
    rows = raw.Rows(raw.read_table(path, COLUMNS, optional=OPTIONAL), source=path, cell=("ImageID", "name"))
    table = rows.table
    place = table["folder"] + "/" + table["name"]
    if check_images:
        # in its numbered folder, in images/, in the root
        place = folder.first_existing([place, "images/" + place, "images/" + table["name"], table["name"]])
    view = table["projection"].map(VIEWS)
    rows.table = table.assign(images=place, known=view.notna(), view=view.fillna("FRONTAL"))
    rows.exclude(rows.table["labels"] == "nan", "the owner gives no labels")
    if labelled_by == "physician":
        rows.exclude(rows.table["method"] != "Physician", "not labelled by a physician", by_study=True)
    rows.exclude_missing(rows.table["images"] != "", on_error, reason="listed, but no such file")
    rows.keep_views(views, known="known")
    rows.check_rest("use views='all'")
    table = _with_labels(rows.table, path)
    method = table["method"].eq("Physician").map({True: "physician", False: "network"})
    optional = {name: table.pop(name) for name in OPTIONAL.values()}
    rows.table = table.assign(
        impression=table["impression"].str.strip(),
        is_ap_view=raw.ap_view(table["view"]),
        is_male=raw.male(table["meta_sex"]),
        meta_labelled_by=method,
        meta_labels=table.pop("meta_labels"),
        **optional,
    )
    rows.table = raw.group_studies(rows.table)
    return raw.finish(folder, rows, [*LABELS, "is_ap_view", "is_male"], seed=seed, draw="all")


def _with_labels(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The rows with their label columns and `meta_labels`. The few thousand different cells are read once each."""
    names, column = {}, table["labels"]
    for index, text in column.drop_duplicates().items():
        try:
            names[text] = frozenset(name.strip() for name in ast.literal_eval(text) if name.strip())
        except (ValueError, SyntaxError, TypeError, AttributeError) as error:
            raise ManifestError(
                f"{path}, row {index + 2}, column 'Labels': {text[:60]!r} is no list ({error}); get the table again"
            ) from error
    labels = {}
    for label, findings in LABELS.items():
        labels[label] = column.map({text: float(not found.isdisjoint(findings)) for text, found in names.items()})
    joined = {text: "|".join(sorted(found)) for text, found in names.items()}
    return table.assign(**labels, meta_labels=column.map(joined))
