"""Object-CXR: rectangles, ellipses and polygons as boxes and masks, and the published split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, refusal, write_picture
from PIL import Image

from gloria_core.data.manifest import boxes_of, masks_of
from gloria_core.data.sources.object_cxr import filled

prepare = adapter("object_cxr")

SHAPES = "0 2 3 10 8;1 12 4 22 14;2 1 15 9 15 5 22"


def make(root: Path, n: int = 20, column: str = "image_path", start: str = "/path/") -> list[str]:
    rows = []
    for split, count in (("train", n), ("dev", 6)):
        part = []
        for i in range(count):
            write_picture(root / split / f"{i:05d}.jpg")
            part.append(f"{start}{i:05d}.jpg,{SHAPES if i % 2 else ''}")
        (root / f"{split}.csv").write_text("\n".join([f"{column},annotation", *part]) + "\n")
        rows += part if split == "train" else []
    return rows


@pytest.mark.parametrize(("column", "start"), [("image_path", "/path/"), ("image_name", "")])
def test_boxes_and_splits(tmp_path, column, start):
    root = tmp_path / "root"
    make(root, column=column, start=start)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert frame["split"].value_counts().to_dict() in (
        {"train": 17, "valid": 3, "test": 6},
        {"train": 18, "valid": 2, "test": 6},
    )
    row = frame.loc["train-00001"]
    assert row["images"] == "train/00001.jpg" and row["Foreign Object"] == 1 and row["masks"] == ""
    assert [box["xywh"] for box in boxes_of(row)] == [[2, 3, 8, 5], [12, 4, 10, 10], [1, 15, 8, 7]]
    assert frame.loc["dev-00000", "boxes"] == "" and frame.loc["dev-00000", "Foreign Object"] == 0


def test_masks_hold_the_shapes(tmp_path):
    root = tmp_path / "root"
    make(root, n=8)
    frame = prepared_twice(prepare, root, tmp_path, masks=True).set_index("study_id")
    assert (frame["masks"] != "").sum() == 7
    mask = np.asarray(Image.open(root / masks_of(frame.loc["dev-00001"])[0]["path"]))
    assert mask.shape == (24, 32) and mask[3:9, 2:11].all() and mask[9, 17] and not mask[4, 12] and mask[16, 5]


def test_filled_shapes_against_their_areas():
    """A rectangle's corners belong to it; an ellipse has about pi/4 of its box, a triangle half."""
    assert filled([(0, [10, 20, 29, 39])], (100, 80)).sum() == 400
    assert abs(filled([(1, [10, 10, 70, 50])], (100, 80)).sum() / (61 * 41) - np.pi / 4) < 0.01
    assert abs(filled([(2, [10, 10, 70, 10, 10, 70])], (100, 80)).sum() / (61 * 61) - 0.5) < 0.02


def test_published_split_is_a_tenth(tmp_path):
    make(tmp_path / "root", n=40)
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path, split_rule="published")
    assert frame["split"].value_counts().to_dict() == {"train": 36, "valid": 4, "test": 6}


@pytest.mark.parametrize(
    "shape", ["3 1 2 3 4", "0 1 2 3", "2 1 2 3 4", "2 1 2 3 4 5", "0 5 2 5 4", "0 a 2 5 4", "1 nan 2 5 4"]
)
def test_broken_shapes(tmp_path, shape):
    rows = make(tmp_path)
    rows[0] = f"/path/00000.jpg,{shape}"
    (tmp_path / "train.csv").write_text("\n".join(["image_path,annotation", *rows]) + "\n")
    assert all(word in refusal(prepare, tmp_path) for word in ("train.csv", "row 2", "is no shape"))


def test_refusals(tmp_path):
    rows = make(tmp_path)
    (tmp_path / "train.csv").write_text("\n".join(["image_path,annotations", *rows]) + "\n")
    assert "Did you mean 'annotations'" in refusal(prepare, tmp_path)
    for cell, expected in (("../00000.jpg,", "escapes the root"), (rows[1], "occurs twice")):
        (tmp_path / "train.csv").write_text("\n".join(["image_path,annotation", cell, *rows[1:]]) + "\n")
        assert expected in refusal(prepare, tmp_path)
    make(tmp_path)
    (tmp_path / "train/00001.jpg").write_bytes(b"broken")
    assert "cannot be read" in refusal(prepare, tmp_path, masks=True)
