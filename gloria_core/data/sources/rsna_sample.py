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

from pathlib import Path

import pandas as pd
from pydantic import validate_call

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import OnError
from gloria_core.data.sources.nih import TABLE, read_entries, read_extra
from gloria_core.data.sources.rsna_pneumonia import LABEL, LABELS, nih_patient, read_labels
from gloria_core.data.splits import assign_label_ranks, assign_splits

MATCHES = "rsna_to_nih.csv"


@validate_call
def prepare(root: Path, *, seed: int = 0, on_error: OnError = "raise") -> pd.DataFrame:
    """The checked manifest: label "Pneumonia" (RSNA's Target), boxes in pixels of the image files, one study an image.

    Splits of 70/10/20 % and label ranks follow `seed`, patient-disjoint and stratified by the label. Where NIH's table
    of entries is there, `is_ap_view`, `is_male` (blank for images that it lacks) and `meta_age` come from it, and the
    views are PA or AP.
    on_error="exclude" leaves out patients without a known image, or whose image is not there, and lists them in
    `attrs["excluded"]`. Where the images come from several sources (`meta_source`), the source may give the label away:
    judge within a source.
    Raises ManifestError naming file, row, column and remedy.
    """
    needs = {LABELS: "RSNA's labels; Kaggle", MATCHES: "the match of RSNA's ids to NIH's images"}
    path, matches = raw.require(root, needs, "rsna_sample").values()
    images, boxes = read_labels(path)
    columns = {
        "patientId": raw.Column("meta_rsna_patient", unique=True),
        "image_index": raw.Column("image", unique=True),
        "rsna_class": "meta_rsna_class",
    }
    known = raw.read_table(matches, columns)
    images = images.rename(columns={"study_id": "meta_rsna_patient"})
    table = images.reset_index().merge(known, on="meta_rsna_patient", how="left").set_index("index")
    rows = raw.Rows(table, source=path, cell=("patientId", "meta_rsna_patient"), key="meta_rsna_patient")
    rows.exclude_missing(table["image"].notna(), None, reason=f"no such patient in {MATCHES}")
    stem = rows.table["image"].str.rsplit(".", n=1).str[0]
    # patients are named as the nih source names them, so that leaks between the two show
    rows.table = rows.table.assign(study_id=stem, patient_id=rows.table["image"].map(nih_patient))
    rows.table["images"] = raw.locate(root, stem, ["images"], raw.PICTURES)
    # only boxes need the size of the file; whether the others can be read is asked when the images are cached
    boxed = rows.table.set_index("meta_rsna_patient")["images"]
    boxed = boxed[boxed.index.isin(boxes["study_id"]) & (boxed != "")]
    sizes = raw.file_sizes(root, boxed)
    sizes = {patient: sizes[file] for patient, file in boxed.items()}
    broken = [patient for patient, size in sizes.items() if size is None]
    there = (rows.table["images"] != "") & ~rows.table["meta_rsna_patient"].isin(broken)
    rows.exclude_missing(there, on_error, reason="its image is missing or unreadable")
    table = rows.table.assign(boxes=raw.box_cells(boxes, rows.table["meta_rsna_patient"], sizes=sizes))
    sources = read_extra(root, "image_source.csv", "source", table["image"])
    if sources is not None:
        table["meta_source"] = sources
    frame = assign_label_ranks(assign_splits(raw.manifest_frame(table, [LABEL]), seed=seed), seed=seed)
    frame = _with_entries(frame, root)
    return raw.finish(frame, source=f"manifest of {root}", seed=seed, failures=rows.failures)


def _with_entries(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The frame with what NIH's table says of each image; added after the splits, which it does not move."""
    path = raw.optional_file(root, TABLE, "rsna_sample")
    if path is None:
        return frame
    of = read_entries(path).set_index("study_id").reindex(frame["study_id"]).reset_index()
    return frame.assign(
        views=of["view"].fillna(frame["views"]),
        is_ap_view=raw.ap_view(of["view"]),
        is_male=raw.male(of["sex"]),
        meta_age=of["age"].fillna(""),
    )
