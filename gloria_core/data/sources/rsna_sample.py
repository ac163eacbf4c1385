"""RSNA pneumonia boxes on copies of the NIH images that they were drawn on (Shih et al. 2019).

Article: https://doi.org/10.1148/ryai.2019180041. RSNA's radiologists drew boxes of opacities suspicious for pneumonia
on 26,684 of the images of NIH ChestX-ray14. This source reads a folder with such images under NIH's names, and tables:
`stage_2_train_labels.csv` (patientId, x, y, width, height, Target; one row a box, in pixels of 1024 x 1024),
`rsna_to_nih.csv` (patientId, image_index, rsna_class), and if there, `image_source.csv` (image_index, source) and NIH's
`Data_Entry_2017*.csv` (projection, sex, age).
RSNA gave every image a patient of its own; here a patient is NIH's (the number before the underscore), so that images
of one person stay in one split. There are no reports: findings and impression are empty.
"""

from pathlib import Path

import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import OnError
from gloria_core.data.sources.nih import TABLE, read_entries, read_extra
from gloria_core.data.sources.rsna_pneumonia import LABEL, LABELS, nih_patient, read_labels
from gloria_core.data.splits import assign_label_ranks, assign_splits

MATCHES = "rsna_to_nih.csv"
NEEDS = {LABELS: "RSNA's labels; Kaggle", MATCHES: "the match of RSNA's ids to NIH's images"}


def prepare(root: Path, *, seed: int = 0, on_error: OnError = "raise") -> pd.DataFrame:
    """The checked manifest: label "Pneumonia" (RSNA's Target), boxes in pixels of the image files, one study an image.

    Splits of 70/10/20 % and label ranks follow `seed`, patient-disjoint and stratified by the label. Where NIH's table
    of entries is there, `is_ap_view`, `is_male` (blank for images that it lacks) and `meta_age` come from it, and the
    views are PA or AP.
    on_error="exclude" leaves out patients without a known image, or whose image is not there, and lists them in
    `attrs["excluded"]`. Where the images come from several sources (`meta_source`), the source may give the label away:
    judge within a source.
    """
    folder = raw.RawFolder(root, "rsna_sample")
    path, matches = folder.require(NEEDS)
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
    rows.table["images"] = folder.locate(stem, ["images"], raw.PICTURES)
    rows.exclude_missing(rows.table["images"] != "", on_error, cell=(f"image_index of {MATCHES}", "image"))
    rows.place_boxes(boxes, folder, on_error, key="meta_rsna_patient")
    sources = read_extra(folder, "image_source.csv", "source", rows.table["image"])
    if sources is not None:
        rows.table["meta_source"] = sources
    frame = assign_label_ranks(assign_splits(raw.manifest_frame(rows.table, [LABEL]), seed=seed), seed=seed)
    labels = [LABEL]
    # added after the splits, which it does not move
    if (entries := folder.optional(TABLE)) is not None:
        of = read_entries(entries).set_index("study_id").reindex(frame["study_id"]).reset_index()
        known = {"is_ap_view": raw.ap_view(of["view"]), "is_male": raw.male(of["sex"])}
        frame = frame.assign(views=of["view"].fillna(frame["views"]), meta_age=of["age"].fillna(""), **known)
        labels += known
    rows.table = frame
    return raw.finish(folder, rows, labels, seed=seed)
