"""Raw folders of datasets with reports: MIMIC-CXR-JPG, CheXpert Plus, Open-I, PadChest, COVID pairs, CGMH."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from gloria_core.phantom.disease import LABELS
from gloria_core.phantom.raw_folders.files import cell, regions_of, simulate, split_of, write_picture, write_table

OFFICIAL = {"train": 7, "validate": 1, "test": 2}


def _dicom_id(*parts: object) -> str:
    """Five groups of eight hexadecimal digits, as MIMIC-CXR names its images."""
    digits = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
    return "-".join(digits[i : i + 8] for i in range(0, 40, 8))


def mimic_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """Tables packed with gzip, JPEG by patient and study, reports in a zip of their own.

    Oddities: an image without a view position, a report without impression, one with neither section, a study that the
    labeler does not have.
    """
    images, splits, labels, reports = [], [], [], {}
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True)):
        subject, number = 10_000_000 + one.patient.patient, 50_000_000 + i
        folder = f"files/p10/p{subject}/s{number}"
        for view, pixels in one.images.items():
            dicom = _dicom_id(seed, i, view)
            write_picture(root / f"{folder}/{dicom}.jpg", pixels)
            position = one.projection if view == "frontal" else "" if i == 2 else "LATERAL"
            about = {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "ViewPosition": position}
            images.append({"dicom_id": dicom, "subject_id": subject, "study_id": number, **about,
                           "Rows": size, "Columns": size, "StudyDate": f"2180{i % 12 + 1:02d}06"})  # fmt: skip
            splits.append({"dicom_id": dicom, "study_id": number, "subject_id": subject,
                           "split": split_of(one, OFFICIAL)})  # fmt: skip
        if i != 3:
            values = {name: cell(one.labels[name]) for name in LABELS}
            labels.append({"subject_id": subject, "study_id": number, **dict(sorted(values.items()))})
        wrapped = one.findings.replace(". ", ".\n ")
        sections = [f" FINDINGS:\n \n {wrapped}"] + [f" IMPRESSION:\n \n {one.impression}"] * (i != 1)
        if i == 4:
            sections = [f" {one.impression}"]
        head = " FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ with cough.\n"
        reports[f"files/p10/p{subject}/s{number}.txt"] = "\n \n".join([head, *sections]) + "\n"
    for name, rows in (("metadata", images), ("split", splits), ("chexpert", labels), ("negbio", labels)):
        write_table(root / f"mimic-cxr-2.0.0-{name}.csv.gz", rows)
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in reports.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without the time of writing


def chexpert_plus(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """The table of 2024, CheXbert's labels as JSON lines, PNG in PNG/. Oddity: a report with neither section."""
    rows, labels = [], []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True)):
        split = split_of(one, {"train": 8, "valid": 2})
        for k, (view, pixels) in enumerate(one.images.items(), start=1):
            key = f"{split}/patient{one.patient.patient + 1:05d}/study{one.number}/view{k}_{view}"
            write_picture(root / f"PNG/{key}.png", pixels)
            text = {"section_findings": one.findings, "section_impression": one.impression}
            rows.append({
                "path_to_image": f"{key}.jpg", "frontal_lateral": view.title(),
                "ap_pa": one.projection if view == "frontal" else "", "report": f"NARRATIVE: {one.findings}",
                **(dict.fromkeys(text, "") if i == 1 else text),
                "age": one.patient.age, "sex": {"M": "Male", "F": "Female"}[one.patient.sex],
                "race": "Unknown", "ethnicity": "Unknown", "split": split,
            })  # fmt: skip
            values = {name: None if (value := one.labels[name]) != value else value for name in LABELS}
            labels.append({"path_to_image": f"{key}.jpg", **values})
    write_table(root / "df_chexpert_plus_240401.csv", rows)
    (root / "chexbert_labels").mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in labels)
    (root / "chexbert_labels/impression_fixed.json").write_text(lines)


MESH = {"Atelectasis": "Pulmonary Atelectasis/base", "Cardiomegaly": "Cardiomegaly/mild", "Edema": "Pulmonary Edema",
        "Consolidation": "Consolidation/lung", "Pleural Effusion": "Pleural Effusion/left",
        "Lung Opacity": "Opacity/lung/base", "Lung Lesion": "Nodule/lung", "Pneumothorax": "Pneumothorax/right",
        "Pneumonia": "Pneumonia", "Fracture": "Fractures, Bone/ribs"}  # fmt: skip


def openi(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """XML reports with MeSH headings, PNG, and the table of projections. Oddities: a report without text, one without
    images, one that was never indexed."""
    rows = []
    (root / "ecgen-radiology").mkdir()
    for number, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True), start=1):
        terms = [term for label, term in MESH.items() if one.labels[label] == 1] or ["normal"]
        terms = ["No Indexing"] if number == 3 else terms
        stems = [] if number == 2 else [f"{number}_IM-{number:04d}-{k}001" for k in (1, 2)]
        texts = {"COMPARISON": "None.", "INDICATION": "XXXX-year-old with cough.",
                 "FINDINGS": one.findings * (number > 1), "IMPRESSION": one.impression * (number > 1)}  # fmt: skip
        body = "".join(f'<AbstractText Label="{name}">{text}</AbstractText>' for name, text in texts.items())
        body = f"<Abstract>{body}</Abstract><MeSH>{''.join(f'<major>{term}</major>' for term in terms)}</MeSH>"
        body += "".join(f'<parentImage id="CXR{stem}"/>' for stem in stems)
        licence = "<licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>"
        text = f'<eCitation><uId id="CXR{number}"/>{licence}{body}</eCitation>'
        (root / f"ecgen-radiology/{number}.xml").write_text(text)
        for stem, (view, pixels) in zip(stems, one.images.items(), strict=False):
            write_picture(root / f"NLMCXR_png/CXR{stem}.png", pixels)
            rows.append({"uid": number, "filename": f"{stem}.dcm.png", "projection": view.title()})
    write_table(root / "indiana_projections.csv", rows)


FINDINGS = {"Atelectasis": "laminar atelectasis", "Cardiomegaly": "cardiomegaly", "Consolidation": "consolidation",
            "Edema": "pulmonary edema", "Pleural Effusion": "pleural effusion", "Pneumonia": "pneumonia",
            "Pneumothorax": "pneumothorax", "Lung Lesion": "nodule", "Lung Opacity": "infiltrates",
            "Fracture": "rib fracture", "Support Devices": "NSG tube"}  # fmt: skip


def padchest(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """The table of January 2019, 16-bit PNG in numbered folders. Oddities: leading blanks in the lists of labels, a
    projection that is to be excluded, a study without a report."""
    rows = []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True)):
        labels = [name for label, name in FINDINGS.items() if one.labels[label] == 1] or ["normal"]
        study = f"2164{seed:04d}{i:012d}"
        for view, pixels in one.images.items():
            name, folder = f"{study}_{view[0]}{i}.png", str(i % 3)
            write_picture(root / folder / name, pixels.astype(np.uint16) * 257)
            projection = {"AP": "AP_horizontal", "PA": "PA"}[one.projection] if view == "frontal" else "L"
            projection = "EXCLUDE" if i == 1 and view == "lateral" else projection
            rows.append({
                "": len(rows), "ImageID": name, "ImageDir": folder, "StudyDate_DICOM": 20140101 + i, "StudyID": study,
                "PatientID": f"90{one.patient.patient:08d}", "PatientBirth": f"{2014 - one.patient.age}.0",
                "PatientSex_DICOM": one.patient.sex, "Projection": projection,
                "Pediatric": "No", "MethodLabel": "Physician" if i % 4 == 0 else "RNN_model",
                "Report": "" if i == 2 else "sin hallazg patolog .",
                "Labels": str([labels[0], *(f" {label}" for label in labels[1:])]),
            })  # fmt: skip
    write_table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", rows)


KINDS = ("Pneumonia/Viral/COVID-19", "Pneumonia/Bacterial", "Tuberculosis", "No Finding")
LESIONS = {"Consolidation": "consolidation", "Pleural Effusion": "pleural_effusion", "Pneumothorax": "pneumothorax"}


def covid_pairs(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """One index with images, lung and lesion masks beside it. Oddities: an image without a sentence about the
    radiograph, a lateral view, a finding that is still to be decided."""
    rows = []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, lateral=True)):
        view = "lateral" if i == 1 else "frontal"
        name = f"case{i:03d}_jpg"
        write_picture(root / f"images/{name}.jpg", one.images[view])
        lesions = {}
        for region in regions_of(one, tuple(LESIONS)) if view == "frontal" else ():
            lesions[LESIONS[region.label]] = f"lesion/{name}__{LESIONS[region.label]}.png"
            write_picture(root / lesions[LESIONS[region.label]], region.mask)
        lungs = f"lungmask_v7/{name}.png" if i % 2 else ""
        if lungs:
            mask = np.zeros((size, size), bool)
            mask[size // 4 : 3 * size // 4, size // 5 : 2 * size // 5] = True
            write_picture(root / lungs, mask | mask[:, ::-1])
        half = [size // 5, size // 4, size // 5, size // 2]
        finding = "todo" if i == 2 else KINDS[i % 4]
        text = f"Person with cough. {one.impression}"
        rows.append({
            "id": name, "path": f"images/{name}.jpg", "text": text, "text_imaging": "" if i == 0 else one.impression,
            "finding": finding, "view": "L" if view == "lateral" else one.projection,
            "patient": f"covid{one.patient.patient}", "offset": i % 9, "sex": one.patient.sex, "age": one.patient.age,
            "width": size, "height": size, "lungmask_v7": lungs,
            "lung_boxes": json.dumps([["right_lung", *half]]) if lungs else "",
            "lesion_masks": json.dumps(lesions) if lesions else "", "geographic_extent": "", "opacity": "",
            "doi": "", "url": "", "licence": "CC BY",
        })  # fmt: skip
    write_table(root / "index.csv", rows)


DEVICES = ("Endotracheal tube in place", "Endotracheal tube malposition", "Pigtail in place", "Pigtail malpositon",
           "Chest tube in place", "Chest tube malposition", "NG tube in place", "NG tube malposition",
           "Central venous catheter in place", "Pneumothorax", "Subcutaneous emphysema", "Pneumomediastinum",
           "Foreign body")  # fmt: skip


def cgmh(root: Path, *, n_studies: int, size: int, seed: int) -> None:
    """train.csv with Python lists, test.csv with a 0/1 column a label and the report; "malpositon" as the fork spells
    it. Oddity: a training study without a label."""
    train, test = [], []
    for i, one in enumerate(simulate(n_studies, size=size, seed=seed, half_with=("Support Devices", "Pneumothorax"))):
        path = f"images/{i:05d}.png"
        write_picture(root / path, one.images["frontal"])
        labels = [DEVICES[one.patient.patient % 9]] * (one.labels["Support Devices"] == 1)
        labels += ["Pneumothorax"] * (one.labels["Pneumothorax"] == 1)
        patient = f"C{one.patient.patient:05d}"
        if split_of(one, {"train": 7, "test": 3}) == "train":
            train.append({"index": i, "image": str([path]), "text_label": str(labels), "patient_id": patient})
        else:
            values = {name: int(name in labels) for name in DEVICES}
            text = f"{one.findings} {one.impression}"
            test.append({"index": i, "image": str([path]), **values, "text": text, "patient_id": patient})
    write_table(root / "train.csv", train)
    write_table(root / "test.csv", test)


WRITERS = {"mimic_cxr": mimic_cxr, "chexpert_plus": chexpert_plus, "openi": openi, "padchest": padchest,
           "covid_pairs": covid_pairs, "cgmh": cgmh}  # fmt: skip
