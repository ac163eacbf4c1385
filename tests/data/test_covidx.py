"""COVIDx: lists of several versions, patients of sources that number them independently, and broken lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, refusal, write_picture

prepare = adapter("covidx")


KINDS = ("normal", "pneumonia", "COVID-19")


def make(
    root: Path, version: str = "_COVIDx9A", *, source: bool = True, kinds: tuple = KINDS, n: int = 24
) -> list[str]:
    lines = []
    for split, count in (("train", n), ("test", 6)):
        rows = []
        for i in range(count):
            name = f"{split} image-{i}(1).png" if i == 0 else f"{split}-{i}.png"
            write_picture(root / split / name)
            patient = f"{i // 2}" if split == "train" else f"{100 + i}"
            rows.append(f"{patient} {name} {kinds[i % len(kinds)]}" + (" cohen" if source else ""))
        (root / f"{split}{version}.txt").write_text("\n".join(rows) + "\n")
        lines += rows if split == "train" else []
    return lines


def test_version_with_sources(tmp_path):
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path) if make(tmp_path / "root") else None
    frame = frame.set_index("study_id")
    assert len(frame) == 30 and (frame["split"] == "test").sum() == 6 and 0 < (frame["split"] == "valid").sum() < 8
    row = frame.loc["train-1.png"]
    assert list(row[["patient_id", "images", "meta_source", "meta_class"]]) == [
        "cohen-0", "train/train-1.png", "cohen", "pneumonia"]  # fmt: skip
    assert list(row[["Normal", "Pneumonia", "COVID-19"]]) == [0, 1, 0]
    assert frame.loc["train image-0(1).png", "images"] == "train/train image-0(1).png"
    assert (frame[["Normal", "Pneumonia", "COVID-19"]].sum(axis=1) == 1).all()


def test_early_version_without_sources_and_binary_version(tmp_path):
    make(tmp_path / "old", "_COVIDx2", source=False)
    old = prepare(tmp_path / "old").set_index("study_id")
    assert old.loc["train-1.png", "patient_id"] == "0" and (old["meta_source"] == "").all()
    make(tmp_path / "new", "_COVIDx_CXR-3B", kinds=("negative", "positive"))
    new = prepare(tmp_path / "new", version="CXR-3B")
    assert "Normal" not in new and set(np.unique(new["COVID-19"])) == {0, 1}
    make(tmp_path / "kaggle", "")
    lines = (tmp_path / "kaggle/train.txt").read_text().splitlines()
    for line in lines[:4]:
        write_picture(tmp_path / "kaggle/val" / line[line.index("train") : line.index(".png") + 4])
    (tmp_path / "kaggle/val.txt").write_text("\n".join(lines[:4]))
    (tmp_path / "kaggle/train.txt").write_text("\n".join(lines[4:]))
    kaggle = prepare(tmp_path / "kaggle")
    assert kaggle["split"].value_counts().to_dict() == {"train": 20, "test": 6, "valid": 4}


def test_published_split_and_a_patient_on_both_sides(tmp_path):
    root = tmp_path / "root"
    make(root)
    text = (root / "test_COVIDx9A.txt").read_text()
    (root / "test_COVIDx9A.txt").write_text(text.replace("101 test-1.png", "3 test-1.png"))
    frame = prepared_twice(prepare, root, tmp_path, split_rule="published")
    assert frame["split"].value_counts().to_dict() == {"train": 19, "test": 6, "valid": 5}
    leaks = frame.attrs["leaks"]
    assert leaks["test images"] == 6 and leaks["patients in train and valid"] > 0
    clean = prepared_twice(prepare, root, tmp_path)
    assert {row["study_id"] for row in clean.attrs["excluded"]} == {"train-6.png", "train-7.png"} and len(clean) == 28


def test_refusals(tmp_path):
    make(tmp_path)
    make(tmp_path, "_COVIDx8B", kinds=("negative", "positive"))
    assert "train_COVIDx8B.txt, train_COVIDx9A.txt; keep or name one" in refusal(prepare, tmp_path)
    assert "train_COVIDx7A.txt" in refusal(prepare, tmp_path, version="7A")
    (tmp_path / "test_COVIDx8B.txt").unlink()
    assert "test_COVIDx8B.txt: the test list" in refusal(prepare, tmp_path, version="8B")


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("1 a.png flu cohen", "line 1: '1 a.png flu cohen'"),
        ("1 train-1.png normal cohen", "line 2: file 'train-1.png' is listed twice"),
        ("1 ../a.png normal cohen", "escapes the root"),
        ("", "is empty"),
    ],
)
def test_broken_lists(tmp_path, first, expected):
    lines = make(tmp_path)
    (tmp_path / "train_COVIDx9A.txt").write_text("\n".join([first, *lines[1:]] if first else []))
    assert expected in refusal(prepare, tmp_path) and "train_COVIDx9A.txt" in refusal(prepare, tmp_path)
