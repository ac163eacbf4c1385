"""Raw folders of datasets with boxes: RSNA pneumonia, its sample under NIH's names, VinDr-CXR, Object-CXR, MS-CXR."""

from __future__ import annotations

import csv
import gzip
import uuid
from pathlib import Path

from gloria_core.phantom.raw_folders import with_labels, with_reports
from gloria_core.phantom.raw_folders.files import (
    regions_of,
    simulate,
    split_of,
    write_dicom,
    write_picture,
    write_table,
    xywh,
)

OPACITIES = ("Pneumonia", "Lung Opacity", "Consolidation")
ORIGINAL_PIXELS = 1024


def _rsna_tables(studies, size: int, seed: int) -> tuple[list[str], list[dict], list[dict]]:
    """Image ids, rows of boxes in original pixels, rows of classes."""
    names, boxes, classes = [], [], []
    for i, one in enumerate(studies):
        name = str(uuid.UUID(int=(seed << 96) + (i + 1) * 0x9E3779B97F4A7C15))
        names.append(name)
        found = [xywh(region, size, ORIGINAL_PIXELS) for region in regions_of(one, OPACITIES)]
        kind = (
            "Lung Opacity" if found else "Normal" if one.labels["No Finding"] == 1 else "No Lung Opacity / Not Normal"
        )
        for box in found or [[""] * 4]:
            boxes.append({"patientId": name, **dict(zip(("x", "y", "width", "height"), box, strict=True)),
                          "Target": int(bool(found))})  # fmt: skip
            classes.append({"patientId": name, "class": kind})
    return names, boxes, classes


def rsna_pneumonia(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """Kaggle's stage 2: JPEG in DICOM, a row a box. Boxes count pixels of the 1024-pixel originals."""
    studies = simulate(n_studies, size=size, seed=seed, half_with=OPACITIES)
    names, boxes, classes = _rsna_tables(studies, size, seed)
    for name, one in zip(names, studies, strict=True):
        about = {"ViewPosition": one.projection, "PatientSex": one.patient.sex, "PatientAge": f"{one.patient.age:03d}Y"}
        write_dicom(root / f"stage_2_train_images/{name}.dcm", one.images["frontal"], **about)
    write_table(root / "stage_2_train_labels.csv", boxes)
    write_table(root / "stage_2_detailed_class_info.csv", classes)


def rsna_sample(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """RSNA's boxes beside NIH's own images and table of entries."""
    studies = simulate(n_studies, size=size, seed=seed)
    names, boxes, classes = _rsna_tables(studies, size, seed)
    with_labels.nih(root, n_studies=n_studies, size=size, seed=seed)
    (root / "images_001/images").rename(root / "images")
    (root / "images_001").rmdir()
    images = [f"{one.patient.patient + 1:08d}_{one.number - 1:03d}.png" for one in studies]
    kinds = {row["patientId"]: row["class"] for row in classes}
    matches = [{"patientId": name, "image_index": image, "rsna_class": kinds[name], "rsna_match_mse": 0.5}
               for name, image in zip(names, images, strict=True)]  # fmt: skip
    write_table(root / "stage_2_train_labels.csv", boxes)
    write_table(root / "rsna_to_nih.csv", matches)
    write_table(
        root / "image_source.csv", [{"image_index": name, "source": "AB"[i % 2]} for i, name in enumerate(images)]
    )


VINDR = {"Cardiomegaly": "Cardiomegaly", "Atelectasis": "Atelectasis", "Consolidation": "Consolidation",
         "Pleural Effusion": "Pleural effusion", "Lung Opacity": "Lung Opacity", "Pneumothorax": "Pneumothorax",
         "Lung Lesion": "Nodule/Mass"}  # fmt: skip


def vindr_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """PhysioNet's layout: 12-bit DICOM, three readers of each training image, a consensus of each test image.

    Oddities: some images are stored with white as zero; one reader in three sees one box less.
    """
    boxes, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, half_with=tuple(VINDR))):
        split, name = split_of(one, {"train": 7, "test": 3}), f"{i:032x}"
        write_dicom(root / f"{split}/{name}.dicom", one.images["frontal"], bits=12, white_is_zero=i % 4 == 0)
        regions = regions_of(one, tuple(VINDR))
        for reader in ["R8", "R9", "R10"] if split == "train" else [""]:
            seen = regions[: len(regions) - (reader == "R10" and i % 3 == 0)]
            about = {"image_id": name} | ({"rad_id": reader} if reader else {})
            present = {VINDR[region.label] for region in seen}
            values = {theirs: int(theirs in present) for theirs in VINDR.values()}
            labels[split].append({**about, **values, "No finding": int(not present)})
            for region in seen:
                x, y, w, h = xywh(region, size)
                box = {"class_name": VINDR[region.label], "x_min": x, "y_min": y, "x_max": x + w, "y_max": y + h}
                boxes[split].append({**about, **box})
            if not seen:
                blank = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), "")
                boxes[split].append({**about, "class_name": "No finding", **blank})
    for split in ("train", "test"):
        write_table(root / f"annotations/annotations_{split}.csv", boxes[split])
        write_table(root / f"annotations/image_labels_{split}.csv", labels[split])


def object_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """train.csv and dev.csv with rectangles, ellipses and polygons; paths begin with the owner's /path/."""
    rows = {"train": [], "dev": []}
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, half_with=("Support Devices",))):
        split, shapes = split_of(one, {"train": 8, "dev": 2}), []
        write_picture(root / f"{split}/{i:05d}.jpg", one.images["frontal"])
        for k, region in enumerate(regions_of(one, ("Support Devices",))):
            x, y, w, h = (int(value) for value in xywh(region, size))
            corners = [x, y, x + max(w, 2), y + max(h, 2)]
            points = [x, y, x + max(w, 2), y, x + max(w, 2), y + max(h, 2)]
            shapes.append(" ".join(map(str, [k % 3, *(points if k % 3 == 2 else corners)])))
        rows[split].append({"image_path": f"/path/{split}/{i:05d}.jpg", "annotation": ";".join(shapes)})
    for split, table in rows.items():
        write_table(root / f"{split}.csv", table)


MS_CXR = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Lung Opacity", "Pleural Effusion", "Pneumonia",
          "Pneumothorax")  # fmt: skip


def ms_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """A simulated MIMIC-CXR-JPG with phrases and boxes on its images, version 1.1.0 (with splits)."""
    with_reports.mimic_cxr(root, n_studies=n_studies, size=size, seed=seed)
    with gzip.open(root / "mimic-cxr-2.0.0-metadata.csv.gz", "rt") as file:
        images = {(row["study_id"], row["ViewPosition"] in ("PA", "AP")): row for row in csv.DictReader(file)}
    rows = []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True)):
        image = images[str(50_000_000 + i), True]
        for region in regions_of(one, MS_CXR):
            section, start, end = region.spans[0] if region.spans else ("impression", 0, len(one.impression))
            x, y, w, h = (int(value) for value in xywh(region, size))
            path = f"files/p10/p{image['subject_id']}/s{image['study_id']}/{image['dicom_id']}.jpg"
            rows.append({"category_name": region.label, "label_text": one.text((section, start, end)), "path": path,
                         "x": x, "y": y, "w": w, "h": h, "image_width": size, "image_height": size,
                         "dicom_id": image["dicom_id"],
                         "split": split_of(one, {"train": 6, "val": 2, "test": 2})})  # fmt: skip
    unique = {tuple(row.values())[:-1]: row for row in rows}  # the owner lists no box twice
    write_table(root / "MS_CXR_Local_Alignment_v1.1.0.csv", unique.values())


WRITERS = {"rsna_pneumonia": rsna_pneumonia, "rsna_sample": rsna_sample, "vindr_cxr": vindr_cxr,
           "object_cxr": object_cxr, "ms_cxr": ms_cxr}  # fmt: skip
