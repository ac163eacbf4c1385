"""RSNA pneumonia: trees of DICOM files made here, the owner's full table, and what the published splits leak."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, real_folder, refusal, wheel_table, write_dicom, write_rows
from PIL import Image

from gloria_core.data.images import read_gray
from gloria_core.data.manifest import boxes_of

prepare = adapter("rsna_pneumonia")

HEADER = "patientId,x,y,width,height,Target"


def make_tree(root: Path, *, n: int = 20, suffix: str = ".dcm") -> list[str]:
    """n images, every fourth with two boxes; the rows of the table of labels."""
    (root / "stage_2_train_images").mkdir(parents=True)
    rows, classes = [], ["patientId,class"]
    for i in range(n):
        name, path = f"id-{i:02d}", root / "stage_2_train_images" / f"id-{i:02d}{suffix}"
        if suffix == ".dcm":
            write_dicom(
                path, ViewPosition=("AP", "PA")[i % 2], PatientSex="MF"[i % 3 == 0], PatientAge=f"{20 + i:03d}Y"
            )
        else:
            Image.new("L", (256, 512)).save(path)
        positive = i % 4 == 0
        rows += [f"{name},264.0,152.0,213.0,379.0,1", f"{name},562,152,256,453,1"] if positive else [f"{name},,,,,0"]
        classes += [f"{name},{'Lung Opacity' if positive else 'Normal'}"] * (1 + positive)
    write_labels(root, rows)
    (root / "stage_2_detailed_class_info.csv").write_text("\n".join(classes) + "\n")
    return rows


def write_labels(root: Path, rows: list[str], header: str = HEADER) -> None:
    write_rows(root / "stage_2_train_labels.csv", header, rows)


def test_owners_tree_becomes_a_good_manifest(tmp_path):
    root = tmp_path / "root"
    make_tree(root)
    frame = prepared_twice(prepare, root, tmp_path, headers=True)
    rows = frame.set_index("study_id")
    assert rows["Pneumonia"].sum() == 5 and set(frame["split"]) == {"train", "valid", "test"}
    assert boxes_of(rows.loc["id-00"])[0] == {"label": "Pneumonia", "image": 0, "xywh": [4.125, 2.375, 3.328, 5.922]}
    assert len(boxes_of(rows.loc["id-00"])) == 2 and rows.loc["id-01", "boxes"] == ""
    assert list(rows.loc["id-01", ["views", "is_ap_view", "is_male", "meta_age"]]) == ["PA", 0, 1, "021Y"]
    assert list(rows.loc["id-00", ["views", "is_male", "meta_rsna_class"]]) == ["AP", 0, "Lung Opacity"]
    assert read_gray(root / rows.loc["id-03", "images"]).shape == (16, 16)


def test_boxes_are_scaled_to_picture_copies(tmp_path):
    """256 x 512 pixels instead of 1024 x 1024."""
    make_tree(tmp_path, suffix=".png")
    row = prepare(tmp_path).set_index("study_id").loc["id-04"]
    assert row["images"].endswith("id-04.png") and row["views"] == "FRONTAL"
    assert boxes_of(row)[0]["xywh"] == [66.0, 76.0, 53.25, 189.5]


def test_patients_of_nih_stay_together_where_they_are_known(tmp_path):
    make_tree(tmp_path, n=40)
    pairs = [{"subset_img_id": f"id-{i:02d}", "img_id": f"{i // 2 + 1:08d}_{i % 2:03d}.png"} for i in range(40)]
    (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(pairs))
    frame = prepare(tmp_path)
    assert frame["patient_id"].nunique() == 20 and frame.attrs["leaks"] == {}
    assert frame.set_index("study_id").loc["id-03", ["patient_id", "meta_nih_image"]].tolist() == [
        "2",
        "00000002_001.png",
    ]
    frame = prepare(tmp_path, split_rule="published")
    leaks, sizes = frame.attrs["leaks"], frame["split"].value_counts()
    assert (sizes["train"], sizes["valid"], sizes["test"]) == (28, 6, 6)
    both = frame.assign(nih=frame["meta_nih_image"].str[:8]).groupby("nih")["split"].agg(set)
    assert leaks["patients in train and test"] == sum(part == {"train", "test"} for part in both) > 0
    assert leaks["images with a known patient"] == 40 and leaks["test images with a known patient"] == 6
    (tmp_path / "pneumonia-challenge-dataset-mappings_2018.json").write_text("[{}]")
    assert "subset_img_id" in refusal(prepare, tmp_path)


BAD = {
    "column": ([], HEADER.replace("width", "w"), "lacks column 'width'"),
    "target": (["id-00,1,2,3,4,2"], HEADER, "column 'Target'"),
    "flat": (["id-00,1,2,0,4,1"], HEADER, "row 2: '0'"),
    "box_of_a_negative": (["id-00,1,2,3,4,0"], HEADER, "a row with Target 0 has none"),
    "twice": (["id-01,,,,,0"], HEADER, "occurs twice"),
    "outside": (["../id-01,,,,,0"], HEADER, "escapes the root"),
    "no_rows": (None, HEADER, "no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels(tmp_path, case):
    rows = make_tree(tmp_path)
    first, header, expected = BAD[case]
    write_labels(tmp_path, [] if first is None else [*first, *rows[2:]], header)
    assert expected in refusal(prepare, tmp_path) and "stage_2_train_labels.csv" in refusal(prepare, tmp_path)


def test_wrong_folder_and_options(tmp_path):
    assert "lacks" in refusal(prepare, tmp_path) and "Kaggle" in refusal(prepare, tmp_path)
    assert "not a folder" in refusal(prepare, tmp_path / "nowhere")
    make_tree(tmp_path)
    classes = (tmp_path / "stage_2_detailed_class_info.csv").read_text()
    (tmp_path / "stage_2_detailed_class_info.csv").write_text(classes.replace("id-01,Normal", "id-01,Lung Opacity"))
    assert "id-01" in refusal(prepare, tmp_path) and "one download" in refusal(prepare, tmp_path)
    (tmp_path / "stage_2_detailed_class_info.csv").unlink()
    (tmp_path / "stage_2_train_images/id-03.dcm").write_bytes(b"broken")
    assert "id-03.dcm" in refusal(prepare, tmp_path, headers=True)
    with pytest.raises(ValueError, match="split_rule"):
        prepare(tmp_path, split_rule="random")
    make_tree(tmp_path / "small", n=2)
    assert "does not fit 2 rows" in refusal(prepare, tmp_path / "small", split_rule="published")


# --- the owner's full table ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """The full table beside empty files: no pixel is read for a manifest."""
    archive, root = wheel_table("kaggle_stage_2_train_labels.csv.zip"), tmp_path_factory.mktemp("rsna")
    (root / "stage_2_train_images").mkdir()
    shutil.copy(archive, root / "stage_2_train_labels.csv.zip")
    for name in pd.read_csv(archive)["patientId"].unique():
        (root / f"stage_2_train_images/{name}.dcm").touch()
    return root


@pytest.mark.parametrize(
    ("rule", "sizes", "positives"),
    [
        ("published", (18678, 4003, 4003), (4162, 928, 922)),
        ("published_detection", (16010, 5337, 5337), (3579, 1182, 1251)),
    ],
)
def test_published_splits_of_the_full_table(full, rule, sizes, positives):
    frame = prepare(full, split_rule=rule)
    parts = [frame[frame["split"] == name] for name in ("train", "valid", "test")]
    assert tuple(map(len, parts)) == sizes and tuple(int(part["Pneumonia"].sum()) for part in parts) == positives
    assert (
        len(frame) == 26_684
        and frame["boxes"].str.count("xywh").sum() == 9_555
        and (frame["boxes"] != "").sum() == 6_012
    )
    first = {
        "published": "f2698fda-0477-435f-b297-f1b284a731aa",
        "published_detection": "ab1131b2-d179-4087-b32b-463a3e615ba6",
    }
    assert first[rule] in set(parts[2]["study_id"])
    boxes = np.array([box["xywh"] for row in parts[2].to_dict("records") for box in boxes_of(row)])
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1024


def test_published_split_has_patients_on_both_sides(full):
    """Of the images whose NIH patient the sample tells, a third of the test images has a patient who is in train."""
    shutil.copy(real_folder("nih_sample") / "rsna_to_nih.csv", full)
    try:
        leaks = prepare(full, split_rule="published").attrs["leaks"]
        frame = prepare(full)
    finally:
        (full / "rsna_to_nih.csv").unlink()
    assert leaks["images with a known patient"] == 8153 and leaks["patients in train and test"] == 357
    assert leaks["test images with a known patient"] == 1247
    assert leaks["test images with a known patient whose patient is in train"] == 397
    known = frame[frame["meta_nih_image"] != ""]
    assert known["patient_id"].nunique() == 6210 and (known.groupby("patient_id")["split"].nunique() == 1).all()
