"""Raw folders of datasets with labels and no reports: CheXpert, its 5x200, ChestX-ray14, COVIDx, Kermany, own CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gloria_core.phantom.disease import COMPETITION, LABELS
from gloria_core.phantom.raw_folders.files import cell, simulate, split_of, write_picture, write_table, xywh
from gloria_core.phantom.study import PhantomStudy

ORIGINAL_PIXELS = 1024
"""Side of NIH's original PNG files, whose pixels its boxes count."""


def chexpert(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """The small release: train.csv, valid.csv and JPEG. Oddity: paths begin with the folder's own name."""
    _chexpert(root, simulate(n_studies, size=size, seed=seed, lateral=True))


def chexpert_5x200(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """The same folder, of studies that have one finding alone: those that the 5x200 set is drawn from."""
    findings = [name for name in LABELS if name != "No Finding"]
    alone = [
        one
        for one in simulate(4 * n_studies, size=size, seed=seed)
        if (values := [one.labels[name] for name in findings]).count(1) == 1
        and -1 not in values
        and findings[values.index(1)] in COMPETITION
    ]
    _chexpert(root, alone[:n_studies])


def _chexpert(root: Path, studies: Sequence[PhantomStudy]) -> None:
    rows = {"train": [], "valid": []}
    for one in studies:
        split = split_of(one, {"train": 8, "valid": 2})
        for k, (view, pixels) in enumerate(one.images.items(), start=1):
            key = f"{split}/patient{one.patient.patient + 1:05d}/study{one.number}/view{k}_{view}.jpg"
            write_picture(root / key, pixels)
            rows[split].append({
                "Path": f"CheXpert-v1.0-small/{key}", "Sex": {"M": "Male", "F": "Female"}[one.patient.sex],
                "Age": one.patient.age, "Frontal/Lateral": view.title(),
                "AP/PA": one.projection if view == "frontal" else "",
                **{name: cell(one.labels[name]) for name in LABELS},
            })  # fmt: skip
    for split, table in rows.items():
        write_table(root / f"{split}.csv", table)


NIH = {"Atelectasis": "Atelectasis", "Cardiomegaly": "Cardiomegaly", "Pleural Effusion": "Effusion",
       "Lung Opacity": "Infiltration", "Lung Lesion": "Nodule", "Pneumonia": "Pneumonia",
       "Pneumothorax": "Pneumothorax", "Consolidation": "Consolidation", "Edema": "Edema",
       "Pleural Other": "Pleural_Thickening"}  # fmt: skip


def nih(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """Tables and lists of the 2017 release, PNG in images_001/images/. Oddity: "Infiltrate" in the table of boxes."""
    entries, boxes, lists = [], [], {"train_val": [], "test": []}
    for one in simulate(n_studies, size=size, seed=seed):
        patient = one.patient.patient + 1
        name = f"{patient:08d}_{one.number - 1:03d}.png"
        write_picture(root / f"images_001/images/{name}", one.images["frontal"])
        labels = [theirs for ours, theirs in NIH.items() if one.labels[ours] == 1] or ["No Finding"]
        entries.append({
            "Image Index": name, "Finding Labels": "|".join(labels),
            "Follow-up #": one.number - 1, "Patient ID": patient,
            "Patient Age": one.patient.age, "Patient Gender": one.patient.sex, "View Position": one.projection,
            "OriginalImage[Width": 2500, "Height]": 2048, "OriginalImagePixelSpacing[x": 0.168, "y]": 0.168,
        })  # fmt: skip
        lists[split_of(one, {"train_val": 8, "test": 2})].append(name)
        for region in one.regions if patient % 5 == 0 else ():
            if region.label in NIH and NIH[region.label] in labels:
                label = {"Infiltration": "Infiltrate"}.get(NIH[region.label], NIH[region.label])
                box = xywh(region, size, ORIGINAL_PIXELS)
                boxes.append(dict(enumerate([name, label, *box, "", "", ""])))
    write_table(root / "Data_Entry_2017.csv", entries)
    header = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", ""]
    write_table(root / "BBox_List_2017.csv", boxes, header=header)
    for name, images in lists.items():
        (root / f"{name}_list.txt").write_text("\n".join(images) + "\n")


def covidx(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """Version 9A: lists with blanks between patient, file, class and source. Oddity: files of several formats."""
    lines = {"train": [], "test": []}
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed)):
        split = split_of(one, {"train": 8, "test": 2})
        name = f"img{i:04d}.{('png', 'jpg')[i % 2]}"
        write_picture(root / split / name, one.images["frontal"])
        kind = "normal" if one.labels["No Finding"] == 1 else ("pneumonia", "COVID-19")[one.patient.patient % 2]
        lines[split].append(f"{one.patient.patient} {name} {kind} {('rsna', 'cohen')[one.patient.patient % 2]}")
    for split, rows in lines.items():
        (root / f"{split}_COVIDx9A.txt").write_text("\n".join(rows) + "\n")


def kermany(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """train/, test/ and val/ with a folder a class; patients are in the names of the files."""
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, half_with=("Lung Opacity", "Consolidation"))):
        sick = one.labels["Lung Opacity"] == 1 or one.labels["Consolidation"] == 1
        kind, person = "PNEUMONIA" if sick else "NORMAL", one.patient.patient
        name = f"person{person}_{('bacteria', 'virus')[i % 2]}_{i}" if sick else f"IM-{person:04d}-{i:04d}"
        split = split_of(one, {"train": 7, "val": 1, "test": 2})
        write_picture(root / split / kind / f"{name}.jpeg", one.images["frontal"])


def own_csv(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """A table of one's own: image, patient, report and one label in words."""
    rows = []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, half_with=("Pleural Effusion",))):
        write_picture(root / f"scans/{i:04d}.png", one.images["frontal"])
        effusion = {1.0: "yes", 0.0: "no", -1.0: "uncertain"}.get(one.labels["Pleural Effusion"], "")
        rows.append({"image": f"scans/{i:04d}.png", "patient": f"P{one.patient.patient}", "view": one.projection,
                     "impression": one.impression, "Effusion": effusion})  # fmt: skip
    write_table(root / "studies.csv", rows)


WRITERS = {"chexpert": chexpert, "chexpert_5x200": chexpert_5x200, "nih": nih, "covidx": covidx, "kermany": kermany,
           "own_csv": own_csv}  # fmt: skip
