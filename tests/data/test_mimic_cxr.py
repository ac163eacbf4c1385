"""MIMIC-CXR-JPG: the owner's folder, the rules for report sections, the papers' filters, and bad input."""

import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal
from PIL import Image

from gloria_core.data.manifest import CHEXPERT_LABELS
from gloria_core.data.sources.mimic_cxr import mimic_sections, section_name

TABLES = {name: f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("metadata", "split", "chexpert")}
LONG = (
    " FINDINGS: \n \n The lungs are clear without\n effusion.  Heart is normal. No edema.\n \n"
    " IMPRESSION: \n \n Normal chest."
)

prepare = adapter("mimic_cxr")
REPORTS = {
    0: f" FINAL REPORT\n EXAMINATION:  CHEST\n \n{LONG}\n",
    1: " FINAL REPORT\n CHEST, TWO VIEWS: \n Small left effusion.\n \n CONCLUSION:  Stable.\n",
    2: " FINAL REPORT\n HISTORY:  ___\n \n The tubes are in place.\n Unchanged.\n",
    3: " WET READ: ___ 5:00 PM\n",
    4: " IMPRESSION:  Clear.\n",
}


def make_tree(root: Path, n: int = 20) -> None:
    """n patients with one study each: a PA and a lateral view; every fourth also an unnamed view."""
    images, labels = [], []
    archive = zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED)
    for i in range(n):
        patient, study = 10_000_000 + i, 50_000_000 + i
        split = "test" if i % 5 == 0 else "validate" if i % 5 == 1 else "train"
        for k, view in enumerate(["PA" if i % 2 else "AP", "LATERAL", ""][: 3 if i % 4 == 0 else 2]):
            images.append([f"d{i:03d}-{k}", patient, study, view, "21800506", split])
            file = root / f"files/p10/p{patient}/s{study}/d{i:03d}-{k}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(file)
        labels.append([patient, study, *[("1.0", "", "0.0", "-1.0")[(i + k) % 4] for k in range(14)]])
        archive.writestr(f"files/p10/p{patient}/s{study}.txt", REPORTS[i % 5])
    archive.close()
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "split"]
    table = pd.DataFrame(images, columns=columns)
    table.drop(columns="split").to_csv(root / TABLES["metadata"], index=False)
    table[["dicom_id", "study_id", "subject_id", "split"]].to_csv(root / TABLES["split"], index=False)
    names = ["subject_id", "study_id", *sorted(CHEXPERT_LABELS)]
    pd.DataFrame(labels, columns=names).to_csv(root / TABLES["chexpert"], index=False)


def edit(path: Path, change) -> None:
    table = change(pd.read_csv(path, dtype=str, keep_default_na=False))
    table.to_csv(path, index=False)


# --- sections --------------------------------------------------------------------------------------------------------


def test_sections_of_a_whole_report():
    assert mimic_sections(REPORTS[0]) == {
        "preamble": "FINAL REPORT",
        "examination": "CHEST",
        "findings": "The lungs are clear without effusion.  Heart is normal. No edema.",
        "impression": "Normal chest.",
    }
    assert mimic_sections(REPORTS[1])["findings"] == "Small left effusion."
    assert mimic_sections(REPORTS[1])["impression"] == "Stable."
    assert mimic_sections(REPORTS[2])["last_paragraph"] == "The tubes are in place. Unchanged."
    assert mimic_sections(" No heading at all.\n \n Then a paragraph.")["last_paragraph"] == "Then a paragraph."
    assert "last_paragraph" not in mimic_sections(REPORTS[0])


def test_the_last_section_of_a_name_counts_but_not_an_empty_one():
    text = " IMPRESSION: first.\n \n ADDENDUM: more.\n \n IMPRESSION: second.\n \n FINDINGS: a.\n FINDINGS: \n"
    assert mimic_sections(text)["impression"] == "second." and mimic_sections(text)["findings"] == "a."


def test_paragraphs_and_lists_keep_their_lines():
    text = " FINDINGS: One line\n is wrapped.\n \n New paragraph:\n - item one\n - item two\n"
    assert mimic_sections(text)["findings"] == "One line is wrapped.\n\nNew paragraph:\n- item one\n- item two"


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("IMPRESSION", "impression"),
        ("IMPRESSON", "impression"),
        ("FINIDNGS", "findings"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("PA AND LATERAL VIEWS OF THE CHEST", "findings"),
        ("PORTABLE AP CHEST RADIOGRAPH", "findings"),
        ("CLINICAL HISTORY", "history"),
        ("COMPARISON FILM", "comparison"),
        ("NOTIFICATION", "notification"),
        ("LINES AND TUBES", "lines and tubes"),
    ],
)
def test_section_names(heading, name):
    assert section_name(heading) == name


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_a_good_manifest(tmp_path):
    make_tree(tmp_path)
    frame = prepared_twice(prepare, tmp_path, tmp_path)
    assert frame["split"].value_counts().to_dict() == {"train": 8, "valid": 4, "test": 4}
    assert frame.attrs["leaks"] == {} and set(frame["views"]) == {"PA", "AP"}
    row = frame.set_index("study_id").loc["s50000006"]
    assert row["patient_id"] == "p10000006" and row["images"] == "files/p10/p10000006/s50000006/d006-0.jpg"
    assert row["findings"] == "Small left effusion." and row["impression"] == "Stable." and row["split"] == "valid"
    order = sorted(CHEXPERT_LABELS)
    given = {name: (1.0, np.nan, 0.0, -1.0)[(6 + k) % 4] for k, name in enumerate(order)}
    assert all(row[name] == value or (np.isnan(row[name]) and np.isnan(value)) for name, value in given.items())
    assert row["meta_date"] == "21800506" and row["is_ap_view"] == 1
    assert frame.set_index("study_id").loc["s50000002", "impression"] == "The tubes are in place. Unchanged."
    assert Counter(item["reason"].split(" - ")[-1] for item in frame.attrs["excluded"]) == {
        "neither findings nor impression": 4
    }


def test_views(tmp_path):
    make_tree(tmp_path)
    whole = prepare(tmp_path, views="all", text_rule="none").set_index("study_id")
    assert len(whole) == 20 and whole.loc["s50000000", "views"] == "FRONTAL;AP;LATERAL".replace(
        "FRONTAL;AP", "AP;FRONTAL"
    )
    assert set(prepare(tmp_path, views="PA")["views"]) == {"PA"}
    assert set(prepare(tmp_path, views="lateral")["views"]) == {"LATERAL"}


def test_text_rules(tmp_path):
    make_tree(tmp_path)
    kept = {
        rule: set(prepare(tmp_path, text_rule=rule)["study_id"].str[-1].astype(int) % 5) for rule in ("mgca", "prior")
    }
    assert kept == {"mgca": {0, 1}, "prior": {0}}  # one word is no sentence for the released cleaning
    frame = prepare(tmp_path, text_rule="prior")
    assert "fewer than 4 sentences" in frame.attrs["excluded"][0]["reason"]


def test_published_splits(tmp_path):
    make_tree(tmp_path)
    mgca = prepare(tmp_path, split_rule="published", paper="mgca")
    assert mgca["split"].value_counts().to_dict() == {"train": 8, "valid": 8}
    assert mgca.attrs["leaks"]["official test studies that select the model"] == 4
    prior = prepare(tmp_path, split_rule="published", paper="prior")
    assert set(prior["split"]) == {"train"} and prior.attrs["leaks"]["official test studies in train"] == 4
    assert prepare(tmp_path, split_rule="published", paper="cxr_clip")["split"].nunique() == 3


def test_hold_out(tmp_path):
    make_tree(tmp_path)
    table = tmp_path / "ms.csv"
    table.write_text("path\nfiles/p10/p10000002/s50000002/x.jpg\nfiles/p10/p10000005/s50000005/x.jpg\n")
    frame = prepare(tmp_path, hold_out=table)
    assert "p10000002" not in set(frame["patient_id"]) and "p10000005" in set(frame["patient_id"])  # 5 is in test
    assert any("held out by ms.csv" in item["reason"] for item in frame.attrs["excluded"])


@pytest.mark.parametrize(
    "place", ["mimic-cxr-reports", "reports", "other name", "", "zip", "physionet.org/files/mimic-cxr/2.0.0", "flat"]
)
def test_reports_are_found_wherever_they_were_unpacked(tmp_path, place):
    make_tree(tmp_path)
    before = prepare(tmp_path)
    if place == "zip":
        (tmp_path / "downloads").mkdir()
        shutil.move(tmp_path / "mimic-cxr-reports.zip", tmp_path / "downloads")
    else:
        shutil.unpack_archive(tmp_path / "mimic-cxr-reports.zip", tmp_path / place)
        (tmp_path / "mimic-cxr-reports.zip").unlink()
    if place == "flat":
        for report in (tmp_path / place / "files").rglob("*.txt"):
            report.rename(tmp_path / place / report.name)
        shutil.rmtree(tmp_path / place / "files")
    pd.testing.assert_frame_equal(prepare(tmp_path), before)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_wrong_folder_names_everything(tmp_path):
    text = refusal(prepare, tmp_path)
    assert all(word in text for word in ("metadata", "split", "chexpert", "physionet"))
    make_tree(tmp_path)
    (tmp_path / "mimic-cxr-reports.zip").unlink()
    text = refusal(prepare, tmp_path)
    assert "mimic-cxr-reports.zip: the reports, from https://physionet.org/content/mimic-cxr/" in text
    assert "mimic-cxr-reports/files/p10/p10000032/s50414267.txt" in text


def test_truncated_zip(tmp_path):
    make_tree(tmp_path)
    path = tmp_path / "mimic-cxr-reports.zip"
    path.write_bytes(path.read_bytes()[:-100])
    assert "mimic-cxr-reports.zip: no readable zip archive" in refusal(prepare, tmp_path)
    (tmp_path / TABLES["split"]).write_bytes((tmp_path / TABLES["split"]).read_bytes()[:40])
    assert "cannot be read as a table" in refusal(prepare, tmp_path)


def test_missing_image_and_report(tmp_path):
    make_tree(tmp_path)
    shutil.rmtree(tmp_path / "files/p10/p10000006")
    text = refusal(prepare, tmp_path)
    assert "1 problem" in text and "d006-0.jpg" in text and "metadata" in text
    assert len(prepare(tmp_path, on_error="exclude")) == 15
    with zipfile.ZipFile(tmp_path / "mimic-cxr-reports.zip", "w") as archive:
        archive.writestr("files/p10/p10000000/s50000000.txt", REPORTS[0])
        archive.writestr("files/p10/p10000001/s50000001.txt", REPORTS[1])
    assert "no report in mimic-cxr-reports" in refusal(prepare, tmp_path, check_images=False)
    assert len(prepare(tmp_path, check_images=False, on_error="exclude")) == 2


CHANGES = {
    "column": (
        "metadata",
        lambda t: t.rename(columns={"ViewPosition": "View_Position"}),
        "'View_Position'?",
    ),
    "twice": ("metadata", lambda t: pd.concat([t, t[:1]]), "occurs twice"),
    "dots": ("metadata", lambda t: t.assign(dicom_id=["../x", *t["dicom_id"][1:]]), "column 'dicom_id'"),
    "patient": ("metadata", lambda t: t.assign(subject_id="7"), "column 'subject_id'"),
    "split": ("split", lambda t: t.assign(split="dev"), "train, validate or test"),
    "gone": ("split", lambda t: t[5:], "it is not in mimic-cxr-2.0.0-split.csv.gz"),
    "label": ("chexpert", lambda t: t.assign(Edema="2"), "column 'Edema'"),
    "study": ("chexpert", lambda t: pd.concat([t, t[:1]]), "occurs twice"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_bad_tables(tmp_path, case):
    make_tree(tmp_path, 6)
    name, change, words = CHANGES[case]
    edit(tmp_path / TABLES[name], change)
    text = refusal(prepare, tmp_path)
    assert TABLES[name].split(".csv")[0] in text and words in text and len(text.splitlines()) == 1
