"""Raw folders of datasets with reports: MIMIC-CXR-JPG, CheXpert Plus, Open-I, PadChest, COVID pairs, CGMH."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np

from gloria_core.phantom.raw_folders import files
from gloria_core.phantom.study import PhantomStudy


def mimic_image(seed: int, i: int, one: PhantomStudy, view: str) -> tuple[str, dict]:
    """The path of an image of MIMIC-CXR-JPG, and its ids: the image's is five groups of eight hexadecimal digits."""
    digits = hashlib.sha256(repr((seed, i, view)).encode()).hexdigest()
    dicom = "-".join(digits[start : start + 8] for start in range(0, 40, 8))
    ids = {"dicom_id": dicom, "subject_id": 10_000_000 + one.patient.patient, "study_id": 50_000_000 + i}
    return f"files/p10/p{ids['subject_id']}/s{ids['study_id']}/{dicom}.jpg", ids


def mimic_cxr(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """Tables packed with gzip, JPEG by patient and study, reports in a zip of their own.

    Oddities: an image without a view position, a report without impression, one with neither section, a study that the
    labeler does not have.
    """
    reports = {}
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True)):
        for view, pixels in one.images.items():
            path, ids = mimic_image(seed, i, one, view)
            files.write_picture(root / path, pixels)
            position = one.projection if view == "frontal" else "" if i == 2 else "LATERAL"
            about = {"PerformedProcedureStepDescription": "CHEST (PA AND LAT)", "ViewPosition": position}
            about |= {"Rows": size, "Columns": size, "StudyDate": f"2180{i % 12 + 1:02d}06"}
            yield "mimic-cxr-2.0.0-metadata.csv.gz", ids | about
            split = files.split_of(one, {"train": 7, "validate": 1, "test": 2})
            yield "mimic-cxr-2.0.0-split.csv.gz", ids | {"split": split}
        values = dict(sorted(files.label_cells(one).items()))
        for labeler in ("chexpert", "negbio") if i != 3 else ():
            about = {"subject_id": ids["subject_id"], "study_id": ids["study_id"]}
            yield f"mimic-cxr-2.0.0-{labeler}.csv.gz", about | values
        wrapped = one.findings.replace(". ", ".\n ")
        sections = [f" FINDINGS:\n \n {wrapped}"] + [f" IMPRESSION:\n \n {one.impression}"] * (i != 1)
        if i == 4:
            sections = [f" {one.impression}"]
        head = " FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ with cough.\n"
        reports[str(Path(path).parent) + ".txt"] = "\n \n".join([head, *sections]) + "\n"
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in reports.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without the time of writing


def chexpert_plus(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """The table of 2024, CheXbert's labels as JSON lines, PNG in PNG/. Oddity: a report with neither section."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True)):
        for split, key, view, pixels in files.chexpert_images(one):
            files.write_picture(root / f"PNG/{key}.png", pixels)
            text = {"section_findings": one.findings, "section_impression": one.impression}
            yield "df_chexpert_plus_240401.csv", {
                "path_to_image": f"{key}.jpg", "frontal_lateral": view.title(),
                "ap_pa": one.projection if view == "frontal" else "", "report": f"NARRATIVE: {one.findings}",
                **(dict.fromkeys(text, "") if i == 1 else text),
                "age": one.patient.age, "sex": {"M": "Male", "F": "Female"}[one.patient.sex],
                "race": "Unknown", "ethnicity": "Unknown", "split": split,
            }  # fmt: skip
            values = {name: None if np.isnan(value) else value for name, value in one.labels.items()}
            yield "chexbert_labels/impression_fixed.json", json.dumps({"path_to_image": f"{key}.jpg", **values})


def openi(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """XML reports with MeSH headings, PNG, and the table of projections. Oddities: a report without text, one without
    images, one that was never indexed."""
    (root / "ecgen-radiology").mkdir()
    for number, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True), start=1):
        terms = [term for label, term in files.NAMES["openi"].items() if one.labels[label] == 1] or ["normal"]
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
            files.write_picture(root / f"NLMCXR_png/CXR{stem}.png", pixels)
            row = {"uid": number, "filename": f"{stem}.dcm.png", "projection": view.title()}
            yield "indiana_projections.csv", row


def padchest(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """The table of January 2019, 16-bit PNG in numbered folders. Oddities: leading blanks in the lists of labels, a
    projection that is to be excluded, a study without a report."""
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True)):
        labels = [name for label, name in files.NAMES["padchest"].items() if one.labels[label] == 1] or ["normal"]
        study = f"2164{seed:04d}{i:012d}"
        for view, pixels in one.images.items():
            name, folder = f"{study}_{view[0]}{i}.png", str(i % 3)
            files.write_picture(root / folder / name, pixels.astype(np.uint16) * 257)
            projection = one.projection.replace("AP", "AP_horizontal")
            if view == "lateral":
                projection = "EXCLUDE" if i == 1 else "L"
            yield "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", {
                "": 2 * i + (view == "lateral"), "ImageID": name, "ImageDir": folder, "StudyDate_DICOM": 20140101 + i,
                "StudyID": study, "PatientID": f"90{one.patient.patient:08d}",
                "PatientBirth": f"{2014 - one.patient.age}.0", "PatientSex_DICOM": one.patient.sex,
                "Projection": projection, "Pediatric": "No", "MethodLabel": "Physician" if i % 4 == 0 else "RNN_model",
                "Report": "" if i == 2 else "sin hallazg patolog .",
                "Labels": str([labels[0], *(f" {label}" for label in labels[1:])]),
            }  # fmt: skip


KINDS = ("Pneumonia/Viral/COVID-19", "Pneumonia/Bacterial", "Tuberculosis", "No Finding")


def covid_pairs(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """One index with images, lung and lesion masks beside it. Oddities: an image without a sentence about the
    radiograph, a lateral view, a finding that is still to be decided."""
    names = files.NAMES["covid_pairs"]
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, lateral=True)):
        view = "lateral" if i == 1 else "frontal"
        name = f"case{i:03d}_jpg"
        files.write_picture(root / f"images/{name}.jpg", one.images[view])
        lesions = {}
        for region in files.regions_of(one, names) if view == "frontal" else ():
            lesion = names[region.label]
            lesions[lesion] = f"lesion/{name}__{lesion}.png"
            files.write_picture(root / lesions[lesion], region.mask)
        lungs = f"lungmask_v7/{name}.png" if i % 2 else ""
        if lungs:
            files.write_picture(root / lungs, files.rough_lungs(size) | files.rough_lungs(size)[:, ::-1])
        box = ["right_lung", size // 5, size // 4, size // 5, size // 2]
        finding = "todo" if i == 2 else KINDS[i % 4]
        text = f"Person with cough. {one.impression}"
        yield "index.csv", {
            "id": name, "path": f"images/{name}.jpg", "text": text, "text_imaging": "" if i == 0 else one.impression,
            "finding": finding, "view": "L" if view == "lateral" else one.projection,
            "patient": f"covid{one.patient.patient}", "offset": i % 9, "sex": one.patient.sex, "age": one.patient.age,
            "width": size, "height": size, "lungmask_v7": lungs,
            "lung_boxes": json.dumps([box]) if lungs else "",
            "lesion_masks": json.dumps(lesions) if lesions else "", "geographic_extent": "", "opacity": "",
            "doi": "", "url": "", "licence": "CC BY",
        }  # fmt: skip


def cgmh(root: Path, *, n_studies: int, size: int, seed: int) -> files.Rows:
    """train.csv with Python lists, test.csv with a 0/1 column a label and the report; "malpositon" as the fork spells
    it. Oddity: a training study without a label."""
    names, marked = files.NAMES["cgmh"], ("Support Devices", "Pneumothorax")
    for i, one in enumerate(files.simulate(n_studies, size=size, seed=seed, half_with=marked)):
        path = f"images/{i:05d}.png"
        files.write_picture(root / path, one.images["frontal"])
        labels = [names[one.patient.patient % 9]] * (one.labels["Support Devices"] == 1)
        labels += ["Pneumothorax"] * (one.labels["Pneumothorax"] == 1)
        split, row = files.split_of(one, {"train": 7, "test": 3}), {"index": i, "image": str([path])}
        if split == "train":
            row |= {"text_label": str(labels)}
        else:
            row |= {name: int(name in labels) for name in names} | {"text": f"{one.findings} {one.impression}"}
        yield f"{split}.csv", row | {"patient_id": f"C{one.patient.patient:05d}"}
