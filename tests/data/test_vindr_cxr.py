"""VinDr-CXR: PhysioNet's and Kaggle's trees made here, and the contest's full table."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal, wheel_table, write_dicom, write_rows

from gloria_core.data.manifest import boxes_of
from gloria_core.data.sources.vindr_cxr import labels_of_boxes, read_boxes

prepare = adapter("vindr_cxr")

BOXES, LABELS = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max", "image_id,rad_id,Cardiomegaly,Nodule/Mass,COPD"
TEST_BOXES, TEST_LABELS = "image_id,class_name,x_min,y_min,x_max,y_max", "image_id,Cardiomegaly,Nodule/Mass,COPD"


def make_physionet(root: Path, n: int = 16) -> None:
    """Three readers; every other image has a heart that two of them mark, every fourth a nodule that one marks."""
    boxes, labels = [], []
    for i in range(n):
        write_dicom(root / f"train/t{i:02d}.dicom")
        for r, reader in enumerate(("R1", "R2", "R3")):
            heart, nodule = i % 2 == 0 and r < 2, i % 4 == 0 and r == 2
            labels.append(f"t{i:02d},{reader},{int(heart)},{int(nodule)},0,{int(not (heart or nodule))}")
            boxes += [f"t{i:02d},{reader},Cardiomegaly,{100 + 10 * r},200,300,400"] * heart
            boxes += [f"t{i:02d},{reader},Nodule/Mass,10,10,20.5,20"] * nodule
            boxes += [f"t{i:02d},{reader},No finding,,,,"] * (not (heart or nodule))
    write_rows(root / "annotations/annotations_train.csv", BOXES, boxes)
    write_rows(root / "annotations/image_labels_train.csv", f"{LABELS},No finding", labels)
    for i in range(4):
        write_dicom(root / f"test/e{i}.dicom")
    write_rows(
        root / "annotations/annotations_test.csv", TEST_BOXES, ["e0,Cardiomegaly,1,2,30,40", "e1,No finding,,,,"]
    )
    rows = ["e0,1,0,0,0", "e1,0,0,0,1", "e2,0,0,1,0", "e3,0,0,0,1"]
    write_rows(root / "annotations/image_labels_test.csv", f"{TEST_LABELS},No finding", rows)


def test_physionet_union_and_majority(tmp_path):
    root = tmp_path / "root"
    make_physionet(root)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert frame["split"].value_counts().to_dict() == {"train": 14, "test": 4, "valid": 2}
    first = frame.loc["t00"]
    assert list(first[["Cardiomegaly", "Nodule/Mass", "COPD", "No Finding"]]) == [1, 1, 0, 0]
    assert boxes_of(first) == [
        {"label": "Cardiomegaly", "image": 0, "xywh": [105.0, 200.0, 195.0, 200.0]},
        {"label": "Nodule/Mass", "image": 0, "xywh": [10.0, 10.0, 10.5, 10.0]},
    ]
    assert list(frame.loc["t01", ["No Finding", "boxes", "images"]]) == [1, "", "train/t01.dicom"]
    assert boxes_of(frame.loc["e0"])[0]["xywh"] == [1.0, 2.0, 29.0, 38.0] and frame.loc["e2", "COPD"] == 1
    strict = prepare(root, readers="majority").set_index("study_id").loc["t00"]
    assert list(strict[["Cardiomegaly", "Nodule/Mass"]]) == [1, 0] and len(boxes_of(strict)) == 1
    apart = prepare(root, overlap=0.99).set_index("study_id").loc["t00"]
    assert len(boxes_of(apart)) == 3


def test_published_split_and_labels_of_cxr_clip(tmp_path):
    make_physionet(tmp_path / "root")
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path, split_rule="published", labels="cxr_clip")
    assert frame["split"].value_counts().to_dict() == {"train": 12, "valid": 4, "test": 4}
    assert "COPD" not in frame and "No Finding" not in frame and "Cardiomegaly" in frame


def test_kaggle_layout(tmp_path):
    root, rows = tmp_path / "root", []
    for i in range(12):
        write_dicom(root / f"train/k{i:02d}.dicom")
        rows += [f"k{i:02d},{'ILD' if i % 3 == 0 and r else 'No finding'},{5 if i % 3 == 0 and r else 14},R{r},"
                 + ("10,10,50,50" if i % 3 == 0 and r else ",,,") for r in range(3)]  # fmt: skip
    write_rows(root / "train.csv", "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", rows)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert (
        frame["ILD"].sum() == 4 and frame["No Finding"].sum() == 8 and set(frame["split"]) == {"train", "valid", "test"}
    )
    assert len(boxes_of(frame.loc["k00"])) == 1
    assert set(prepare(root, split_rule="published")["split"]) == {"train", "valid"}


BAD = {
    "annotations_train.csv": [
        (BOXES.replace("class_name", "class"), "t00,R1,ILD,1,2,3,4", "Did you mean 'class'"),
        (BOXES, "t00,R1,ILD,5,2,3,4", "0 <= min < max"),
        (BOXES, "t00,R1,ILD,1,2,,4", "0 <= min < max"),
        (BOXES, "t00,R1,No finding,1,2,3,4", "has no box"),
        (BOXES, "../t00,R1,ILD,1,2,3,4", "escapes the root"),
    ],
    "image_labels_train.csv": [
        (LABELS, "t00,R1,2,0,0", "a label is 0 or 1"),
        (LABELS, "t00,R1,0,0,0\nt00,R1,0,0,0", "reading occurs twice"),
    ],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in BAD.items() for case in cases])
def test_bad_tables(tmp_path, name, case):
    make_physionet(tmp_path)
    header, row, expected = case
    write_rows(tmp_path / "annotations" / name, header, [row])
    assert expected in refusal(prepare, tmp_path) and name in refusal(prepare, tmp_path)


def test_missing_files(tmp_path):
    make_physionet(tmp_path)
    (tmp_path / "annotations/image_labels_test.csv").unlink()
    assert "image_labels_test.csv" in refusal(prepare, tmp_path)
    with pytest.raises(ValueError, match="'union' or 'majority'"):
        prepare(tmp_path, readers="first")


def test_the_contests_full_table(tmp_path):
    (tmp_path / "train").mkdir()
    source = shutil.copy(wheel_table("vinbigdata-train.csv.gz"), tmp_path / "train.csv.gz")
    table = pd.read_csv(source)
    for name in table["image_id"].unique():
        (tmp_path / f"train/{name}.dicom").touch()
    frame = prepare(tmp_path, split_rule="published", overlap=1.0)
    assert frame["split"].value_counts().to_dict() == {"train": 12_000, "valid": 3_000}
    marked = table[table["class_name"] != "No finding"]
    seen = marked.groupby("class_name")["image_id"].nunique()
    assert len(seen) == 14 and all(frame[name].sum() == count for name, count in seen.items())
    assert frame["No Finding"].sum() == 15_000 - marked["image_id"].nunique() == 10_606
    strict = labels_of_boxes(read_boxes(tmp_path / "train.csv.gz"), "majority")
    assert len(strict) == 15_000 and 0 < strict["Cardiomegaly"].sum() < frame["Cardiomegaly"].sum()
