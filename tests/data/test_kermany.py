"""Kermany's paediatric radiographs: the owner's tree made here, and the re-packed folder where it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, real_folder, refusal, write_picture, write_rows
from PIL import Image

from gloria_core.data.manifest import masks_of

prepare = adapter("kermany")

HEADER = "id,image,lung_mask,label,subtype,patient,split_original,mask_matched_by"


def make_owner(root: Path) -> None:
    for i in range(1, 13):
        split = "test" if i > 9 else "train"
        write_picture(root / split / "PNEUMONIA" / f"person{i}_bacteria_{i}.jpeg")
        write_picture(root / split / "NORMAL" / f"IM-{i:04d}-0001.jpeg")
        write_picture(root / split / "NORMAL" / f"NORMAL2-IM-{i:04d}-0001-0002.jpeg")
    write_picture(root / "test/PNEUMONIA/person2_virus_77.jpeg")
    write_picture(root / "val/NORMAL/NORMAL-1049278-0001.jpeg")


def make_index(root: Path, n: int = 12) -> list[str]:
    rows = []
    for i in range(n):
        name, kind = f"a{i}", ("NORMAL", "PNEUMONIA")[i % 2]
        write_picture(root / f"images/{name}.jpg")
        write_picture(root / f"masks/{name}.png")
        split = "test" if i > 8 else "train"
        rows.append(f"{name},images/{name}.jpg,masks/{name}.png,{kind},bacteria,p{i // 2},{split},size")
    write_index(root, rows)
    return rows


def write_index(root: Path, rows: list[str], header: str = HEADER) -> None:
    write_rows(root / "index.csv", header, rows)


def test_owners_folder(tmp_path):
    make_owner(tmp_path / "root")
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path).set_index("study_id")
    assert len(frame) == 38 and frame["Pneumonia"].sum() == 13 and set(frame["split"]) == {"train", "valid", "test"}
    assert frame.loc["person2_virus_77", ["patient_id", "meta_subtype"]].tolist() == ["person2", "virus"]
    assert frame.loc["NORMAL2-IM-0003-0001-0002", "patient_id"] == "NORMAL2-IM-0003"
    assert frame.loc["NORMAL-1049278-0001", ["patient_id", "meta_subtype"]].tolist() == ["NORMAL-1049278", "normal"]


def test_published_split_counts_its_leak(tmp_path):
    make_owner(tmp_path / "root")
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path, split_rule="published")
    assert frame.attrs["leaks"]["patients in train and test"] == 1
    assert frame.attrs["leaks"]["test images whose patient is in train"] == 1
    test = frame[frame["split"] == "test"]
    assert (
        len(test) == 10
        and (test["meta_original_split"] == "test").all()
        and "person2 (test)" in set(test["patient_id"])
    )
    assert "person2 (train)" in set(frame.loc[frame["split"] != "test", "patient_id"])


def test_wrong_folders(tmp_path):
    assert "lacks" in refusal(prepare, tmp_path) and "not a folder" in refusal(prepare, tmp_path / "nowhere")
    make_owner(tmp_path / "chest_xray")
    assert "as the root" in refusal(prepare, tmp_path)
    root = tmp_path / "chest_xray"
    shutil.copy(root / "train/NORMAL/IM-0001-0001.jpeg", root / "test/NORMAL/IM-0001-0001.jpeg")
    assert "one name twice" in refusal(prepare, root)
    (root / "test/NORMAL/IM-0001-0001.jpeg").unlink()
    write_picture(root / "train/NORMAL/cat.jpeg")
    assert "cat.jpeg" in refusal(prepare, root) and "do not say their patient" in refusal(prepare, root)
    shutil.rmtree(root / "train/NORMAL")
    assert "has no image" in refusal(prepare, root)


def test_missing_files_of_an_index(tmp_path):
    make_index(tmp_path)
    (tmp_path / "masks/a3.png").unlink()
    (tmp_path / "images/a4.jpg").unlink()
    text = refusal(prepare, tmp_path)
    assert "a3" in text and "a4" in text and "2 problems" in text and "on_error='exclude'" in text
    frame = prepare(tmp_path, on_error="exclude")
    assert len(frame) == 10 and [row["study_id"] for row in frame.attrs["excluded"]] == ["a3", "a4"]


BAD = {
    "twice": ("a1,images/b.jpg,,NORMAL,,p,train,", HEADER, "twice"),
    "label": ("a0,images/a0.jpg,,normal,,p,train,", HEADER, "column 'label'"),
    "outside": ("a0,../a0.jpg,,NORMAL,,p,train,", HEADER, "escapes the root"),
    "split": ("a0,images/a0.jpg,,NORMAL,,p,dev,", HEADER, "split_original"),
    "patient": ("a0,images/a0.jpg,,NORMAL,,,train,", HEADER, "every image its patient"),
    "column": ("a0,images/a0.jpg,,NORMAL,,p,train,", HEADER.replace("patient", "patients"), "Did you mean 'patients'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_index(tmp_path, case):
    rows, (first, header, expected) = make_index(tmp_path), BAD[case]
    write_index(tmp_path, [first, *rows[1:]], header)
    assert expected in refusal(prepare, tmp_path) and "index.csv" in refusal(prepare, tmp_path)


def test_real_folder(tmp_path):
    root = real_folder("kermany_lungs")
    frame = prepared_twice(prepare, root, tmp_path)
    assert len(frame) == 2070 and frame["patient_id"].nunique() == 1507 and frame["Pneumonia"].sum() == 1422
    assert (frame["masks"] != "").all() and frame.attrs["excluded"] == [] and frame.attrs["leaks"] == {}
    leaks = prepare(root, split_rule="published").attrs["leaks"]
    assert leaks == {"patients in train and test": 34, "test images": 150, "test images whose patient is in train": 41}
    row = frame.iloc[5]
    mask = masks_of(row)[0]
    with Image.open(root / mask["path"]) as drawn, Image.open(root / row["images"]) as image:
        assert (
            mask["label"] == "Lungs" and drawn.size == image.size and 0.1 < np.asarray(drawn).astype(bool).mean() < 0.6
        )
