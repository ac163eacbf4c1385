"""CheXpert and its 5x200 set: trees in the owner's three layouts, bad input, and the real training table."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal, wheel_table, write_rows
from PIL import Image

from gloria_core.data.manifest import CHEXPERT_LABELS, COMPETITION_LABELS, write_manifest
from gloria_core.data.raw_folder import Rows
from gloria_core.data.sources import prepare as prepare_by_name
from gloria_core.data.sources.chexpert import published_parts, read_images, ruled_5x200

prepare = adapter("chexpert")
prepare_5x200 = adapter("chexpert_5x200")

HEADER = ",".join(["Path,Sex,Age,Frontal/Lateral,AP/PA", *CHEXPERT_LABELS])


def row(path: str, *, side="Frontal", projection="AP", sex="Male", labels=None) -> str:
    cells = [str((labels or {}).get(name, "")) for name in CHEXPERT_LABELS]
    return ",".join([path, sex, "50", side, projection, *cells])


def training_rows(prefix: str = "CheXpert-v1.0-small", n_patients: int = 60) -> list[str]:
    """Two studies a patient, the first with a lateral view, too; one competition finding alone in each study."""
    rows = []
    for patient in range(1, n_patients + 1):
        for study in (1, 2):
            labels = {COMPETITION_LABELS[(patient + study) % 5]: "1.0", "Fracture": "0.0", "Support Devices": ""}
            if patient % 10 == 0:
                labels["Pneumonia"] = "-1.0"
            stem = f"{prefix}/train/patient{patient:05d}/study{study}"
            rows.append(row(f"{stem}/view1_frontal.jpg", projection=("AP", "PA")[patient % 2], labels=labels))
            if study == 1:
                rows.append(row(f"{stem}/view2_lateral.jpg", side="Lateral", projection="", labels=labels))
    return rows


def make_tree(root: Path, *, layout: str = "small", n_patients: int = 60) -> list[str]:
    """small: root/train.csv; original: root/CheXpert-v1.0/train.csv; batches: the four unpacked folders."""
    prefix = {"small": "CheXpert-v1.0-small"}.get(layout, "CheXpert-v1.0")
    rows = training_rows(prefix, n_patients)
    valid = [row(f"{prefix}/valid/patient{64541 + i}/study1/view1_frontal.jpg", projection="PA") for i in range(5)]
    base = {
        "small": root,
        "original": root / "CheXpert-v1.0",
        "batches": root / "CheXpert-v1.0 batch 1 (validate & csv)",
    }[layout]
    base.mkdir(parents=True, exist_ok=True)
    write_table(base / "train.csv", rows)
    write_table(base / "valid.csv", valid)
    for text in (*rows, *valid):
        parts = text.split(",")[0].split("/")[1:]
        home = base
        if layout == "batches" and parts[0] == "train":
            number = 1 + int(parts[1][-2:]) % 3
            home, parts = root / f"CheXpert-v1.0 batch {number + 1} (train {number})", parts[1:]
        file = home.joinpath(*parts)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(file)
    return rows


def write_table(path: Path, rows: list[str], header: str = HEADER) -> None:
    write_rows(path, header, rows)


@pytest.mark.parametrize("layout", ["small", "original", "batches"])
def test_each_layout_gives_a_good_manifest(tmp_path, layout):
    make_tree(tmp_path / "root", layout=layout)
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path, hold_out="", views="all")
    assert len(frame) == 125 and frame["patient_id"].nunique() == 65
    assert frame["split"].value_counts()["test"] == 5 and set(frame["split"]) == {"train", "valid", "test"}
    study = frame.set_index("study_id").loc["patient00010_study1"]
    assert study["views"] == "AP;LATERAL" and study["Pneumonia"] == -1 and np.isnan(study["Support Devices"])
    assert study["Fracture"] == 0 and study["is_male"] == 1 and study["is_ap_view"] == 1 and study["meta_age"] == "50"
    assert frame.attrs["excluded"] == [] and frame.attrs["leaks"] == {}


def test_views_and_units(tmp_path):
    make_tree(tmp_path)
    assert len(prepare(tmp_path, hold_out="", views="all", unit="image")) == 185
    frontal = prepare(tmp_path, hold_out="")
    assert len(frontal) == 125 and not frontal["views"].str.contains("LATERAL").any()
    lateral = prepare(tmp_path, hold_out="", views="lateral")
    assert len(lateral) == 60 and "no image of view 'lateral'" in lateral.attrs["excluded"][0]["reason"]
    assert set(prepare(tmp_path, hold_out="", views="PA")["views"]) == {"PA"}


def test_patients_of_a_list_are_held_out(tmp_path):
    make_tree(tmp_path)
    given = tmp_path / "list.csv"
    given.write_text("Path\nCheXpert-v1.0/train/patient00007/study2/view1_frontal.jpg\n")
    frame = prepare(tmp_path, hold_out=given)
    assert "patient00007" not in set(frame["patient_id"]) and frame["patient_id"].nunique() == 64
    assert {item["study_id"] for item in frame.attrs["excluded"]} == {
        "patient00007_study1_view1_frontal",
        "patient00007_study1_view2_lateral",
        "patient00007_study2_view1_frontal",
    }
    assert "200 are needed" in refusal(prepare, tmp_path)
    assert "the 5x200 set needs 200" in refusal(prepare, tmp_path, split_rule="published")


# --- 5x200 -----------------------------------------------------------------------------------------------------------


def test_5x200_by_seed(tmp_path):
    make_tree(tmp_path)
    frame = prepare_5x200(tmp_path, per_class=10, seed=3)
    assert len(frame) == 50 and set(frame["split"]) == {"test"} and not frame["study_id"].str.contains("lateral").any()
    assert (frame[list(COMPETITION_LABELS)] == 1).sum().tolist() == [10] * 5
    assert not (frame["Pneumonia"] == -1).any()
    rows = (tmp_path / "train.csv").read_text().splitlines()
    write_table(tmp_path / "train.csv", rows[:0:-1])
    again = prepare_5x200(tmp_path, per_class=10, seed=3)
    assert write_manifest(frame, tmp_path / "a.csv") == write_manifest(again, tmp_path / "b.csv")
    assert set(prepare_5x200(tmp_path, per_class=10, seed=4)["study_id"]) != set(frame["study_id"])


def test_5x200_from_lists(tmp_path):
    make_tree(tmp_path)
    paths = [f"CheXpert-v1.0/train/patient{n:05d}/study1/view1_frontal.jpg" for n in (3, 1)]
    hot = [[float((n + 1) % 5 == k) for k in range(5)] for n in (3, 1)]
    listed = tmp_path / "prior.json"
    listed.write_text(
        json.dumps({str(i): {"image_path": p, "label": h} for i, (p, h) in enumerate(zip(paths, hot, strict=True))})
    )
    frame = prepare_5x200(tmp_path, given=listed)
    assert frame["study_id"].tolist() == ["patient00003_study1_view1_frontal", "patient00001_study1_view1_frontal"]
    table = tmp_path / "gloria.csv"
    head = ["Path", "Report Impression", *COMPETITION_LABELS]
    pd.DataFrame([[p, "Edema.", *h] for p, h in zip(paths, hot, strict=True)], columns=head).to_csv(table, index=False)
    assert prepare_5x200(tmp_path, given=table)["impression"].tolist() == ["Edema.", "Edema."]
    wrong = pd.read_csv(table)
    wrong.loc[1, "Edema"] = 1 - wrong.loc[1, "Edema"]
    wrong.to_csv(table, index=False)
    assert "row 3, column 'Edema'" in refusal(prepare_5x200, tmp_path, given=table)
    (tmp_path / "train.csv").unlink()
    alone = prepare_5x200(tmp_path, given=listed)
    assert (
        len(alone) == 2 and alone["Pneumonia"].isna().all() and (alone[list(COMPETITION_LABELS)] == 1).sum().sum() == 2
    )
    listed.write_text("[1, 2]")
    assert "not PRIOR's list" in refusal(prepare_5x200, tmp_path, given=listed)
    assert "no such list" in refusal(prepare_5x200, tmp_path, given=tmp_path / "nowhere.csv")


def test_5x200_with_reports(tmp_path):
    make_tree(tmp_path)
    plus = tmp_path / "df_chexpert_plus_240401.csv"
    plus.write_text(
        'path_to_image,section_impression\ntrain/patient00003/study1/view1_frontal.jpg,"1. Edema.\n2. No change."\n'
    )
    given = tmp_path / "list.csv"
    given.write_text("Path\n" + "".join(f"x/train/patient{n:05d}/study1/view1_frontal.jpg\n" for n in (3, 4)))
    assert "patient00004" in refusal(prepare_5x200, tmp_path, given=given, reports=plus)
    frame = prepare_5x200(tmp_path, given=given, reports=plus, on_error="exclude")
    assert frame["impression"].tolist() == ["1. Edema.\n2. No change."]
    assert "no impression" in frame.attrs["excluded"][0]["reason"]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_images(tmp_path):
    make_tree(tmp_path)
    shutil.rmtree(tmp_path / "train/patient00001/study2")
    text = refusal(prepare, tmp_path, hold_out="")
    assert "1 problem" in text and "row 4" in text and "patient00001/study2" in text and "exclude" in text
    frame = prepare(tmp_path, hold_out="", on_error="exclude")
    assert len(frame) == 124 and [item["row"] for item in frame.attrs["excluded"]] == [4]
    shutil.rmtree(tmp_path / "train")
    assert "nothing is left" in refusal(prepare, tmp_path, hold_out="", on_error="exclude")
    assert len(prepare(tmp_path, hold_out="", check_images=False)) == 125


@pytest.mark.parametrize("old", ["Path", "Frontal/Lateral", "AP/PA", "Edema"])
def test_changed_column(tmp_path, old):
    rows = make_tree(tmp_path, n_patients=3)
    write_table(tmp_path / "train.csv", rows, HEADER.replace(old, f"{old}s", 1))
    text = refusal(prepare, tmp_path)
    assert "train.csv" in text and repr(old) in text and f"Did you mean '{old}s'" in text


PATH = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg"
BAD = {
    "twice": (row(PATH.replace("00001", "00002")), "occurs twice"),
    "dots": (row("CheXpert-v1.0-small/train/../train/patient00001/study1/view1_frontal.jpg"), "column 'Path'"),
    "path": (row("somewhere/else.jpg"), "column 'Path'"),
    "label": (row(PATH, labels={"Edema": "yes"}), "column 'Edema'"),
    "side": (row(PATH, side="Oblique"), "column 'Frontal/Lateral'"),
    "projection": (row(PATH, projection="UP"), "column 'AP/PA'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(tmp_path, case):
    rows = make_tree(tmp_path, n_patients=3)
    write_table(tmp_path / "train.csv", [BAD[case][0], *rows[1:]])
    text = refusal(prepare, tmp_path)
    assert "train.csv" in text and BAD[case][1] in text and "row " in text and len(text.splitlines()) == 1


def test_unknown_options(tmp_path):
    for options in ({"split_rule": "random"}, {"views": "side"}, {"unit": "patient"}, {"paper": "x"}, {"on_error": ""}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}\n  Input should be"):
            prepare(tmp_path, **options)
    with pytest.raises(TypeError, match="no option 'splits'"):
        prepare_by_name("chexpert", tmp_path, {"splits": 1})


# --- the real table --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    table = wheel_table("chexpert_train.csv.gz")
    root = tmp_path_factory.mktemp("real")
    shutil.copy(table, root / "train.csv.gz")
    write_table(root / "valid.csv", [row(f"x/valid/patient{64541 + i}/study1/view1_frontal.jpg") for i in range(200)])
    return root


@pytest.fixture(scope="module")
def real_table(real) -> pd.DataFrame:
    return read_images(real / "train.csv.gz")


def rows_of(table: pd.DataFrame) -> Rows:
    return Rows(table, source="train.csv", cell=("Path", "path"), key="image_id")


def test_the_real_table(real_table):
    table = real_table
    assert (len(table), table["patient_id"].nunique(), table["study_id"].nunique()) == (223_414, 64_540, 187_641)
    assert table["view"].value_counts().to_dict() == {"AP": 161_590, "LATERAL": 32_387, "PA": 29_420, "FRONTAL": 17}
    counts = {name: tuple(int((table[name] == value).sum()) for value in (1, 0, -1)) for name in COMPETITION_LABELS}
    assert counts == {
        "Atelectasis": (33_376, 1_328, 33_739),
        "Cardiomegaly": (27_000, 11_116, 8_087),
        "Consolidation": (14_783, 28_097, 27_742),
        "Edema": (52_246, 20_726, 12_984),
        "Pleural Effusion": (86_187, 35_396, 11_628),
    }


def test_the_real_default_keeps_the_5x200_patients_apart(real, real_table):
    held = ruled_5x200(real_table, seed=0)
    assert len(held) == 1000 and (held[list(COMPETITION_LABELS)] == 1).sum().tolist() == [200] * 5
    findings = [name for name in CHEXPERT_LABELS if name != "No Finding"]
    assert ((held[findings] == 1).sum(axis=1) == 1).all() and not (held[findings] == -1).any(axis=None)
    assert "LATERAL" not in set(held["view"]) and held["study_id"].is_unique
    frame = prepare(real, check_images=False)
    assert not set(held["patient_id"]) & set(frame["patient_id"])
    assert frame["split"].value_counts().to_dict() == {"train": 177_869, "valid": 3_633, "test": 200}
    assert frame.attrs["leaks"] == {}
    reasons = Counter(item["reason"].split(" - ")[-1] for item in frame.attrs["excluded"])
    assert reasons == {"its patient is held out for the 5x200 test set": 7395, "no image of view 'frontal'": 15}


@pytest.mark.parametrize(
    ("paper", "both", "mixed"), [("gloria", 4062, 4896), ("mgca", 4080, 4907)], ids=["gloria", "mgca"]
)
def test_the_real_published_split_counts_its_leak(real_table, paper, both, mixed):
    """5,000 validation images without the released code's mix-up, and how bad that would have been."""
    parts, leaks = published_parts(rows_of(real_table), rows_of(real_table[:0]), paper, "5x200")
    train, valid = parts["train"].table, parts["valid"].table
    assert (len(train), len(valid), len(parts["train"].failures)) == (217_414, 5_000, 1_000)
    assert not set(train["path"]) & set(valid["path"])
    assert len(set(train["patient_id"]) & set(valid["patient_id"])) == both
    assert leaks["validation images still in train, released code (not rebuilt)"] == mixed
    assert leaks["patients of the 5x200 set in train"] == 799


def test_the_real_split_of_cxr_clip(real_table):
    parts, _ = published_parts(rows_of(real_table), rows_of(real_table[:0]), "cxr_clip", "5x200")
    train, test = parts["train"].table, parts["test"].table
    assert (len(train), len(test), len(parts["train"].failures)) == (216_389, 1_000, 6_025)
    assert not set(train["patient_id"]) & set(test["patient_id"])


def test_published_split_of_a_small_table(tmp_path):
    """The whole way, with a set from a list and fewer validation images."""
    make_tree(tmp_path)
    given = tmp_path / "list.csv"
    given.write_text("Path\nCheXpert-v1.0/train/patient00007/study2/view1_frontal.jpg\n")
    assert "draws 5000" in refusal(prepare, tmp_path, split_rule="published", hold_out=given)
    frame = prepare(tmp_path, split_rule="published", paper="cxr_clip", hold_out=given, views="all")
    assert frame["split"].value_counts().to_dict() == {"train": 177, "valid": 5, "test": 1}
    assert len(frame.attrs["excluded"]) == 2


def test_published_leaks_reach_the_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr("gloria_core.data.sources.chexpert.PUBLISHED_VALID", 40)
    make_tree(tmp_path)
    given = tmp_path / "list.csv"
    given.write_text("Path\nCheXpert-v1.0/train/patient00007/study2/view1_frontal.jpg\n")
    frame = prepare(tmp_path, split_rule="published", hold_out=given, views="all")
    assert frame["split"].value_counts().to_dict() == {"train": 139, "valid": 40, "test": 5}
    of = frame.groupby("meta_patient")["split"].agg(set)
    both = int(of.map(lambda names: {"train", "valid"} <= names).sum())
    assert frame.attrs["leaks"]["patients in train and valid"] == both > 10
    assert (frame["patient_id"] == frame["study_id"]).all()
