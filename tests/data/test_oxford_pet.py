"""Oxford-IIIT Pet: the owner's tree made here; trimaps become masks of the pet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, refusal, write_picture
from PIL import Image

from gloria_core.data.manifest import masks_of

prepare = adapter("oxford_pet")


def make(root: Path, n: int = 16) -> None:
    trimap = np.full((24, 32), 2, np.uint8)
    trimap[4:20, 4:20], trimap[6:18, 6:18] = 3, 1
    (root / "annotations/trimaps").mkdir(parents=True)
    for split, count in (("trainval", n), ("test", 5)):
        names = [f"{split}_Breed_{i}" for i in range(count)]
        for name in names:
            write_picture(root / f"images/{name}.jpg")
            Image.fromarray(trimap).save(root / f"annotations/trimaps/{name}.png")
        lines = [f"{name} 1 {1 + i % 2} 1" for i, name in enumerate(names)]
        (root / f"annotations/{split}.txt").write_text("\n".join(lines) + "\n")


def test_masks_and_splits(tmp_path):
    root = tmp_path / "root"
    make(root)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert frame["split"].value_counts().to_dict() == {"train": 14, "test": 5, "valid": 2}
    row = frame.loc["test_Breed_1"]
    assert list(row[["split", "Cat", "Dog", "images"]]) == ["test", 0, 1, "images/test_Breed_1.jpg"]
    mask = np.asarray(Image.open(root / masks_of(row)[0]["path"]))
    assert mask.sum() == 16 * 16 and mask[4:20, 4:20].all()
    inner = masks_of(prepare(root, border=False).iloc[0])[0]["path"]
    assert np.asarray(Image.open(root / inner)).sum() == 12 * 12
    assert len(prepare(root, limit=8)) == 13


def test_refusals(tmp_path):
    make(tmp_path)
    for line, expected in (("a 1 1", "lines are"), ("a 1 3 1", "1 is a cat"), ("../a 1 1 1", "escapes the root")):
        (tmp_path / "annotations/test.txt").write_text(line + "\n")
        assert expected in refusal(prepare, tmp_path) and "test.txt" in refusal(prepare, tmp_path)
    (tmp_path / "annotations/test.txt").write_text("test_Breed_1 1 1 1\ntest_Breed_1 1 1 1\n")
    assert "occurs twice" in refusal(prepare, tmp_path)
    with pytest.raises(ValueError, match="limit"):
        prepare(tmp_path, limit=-1)


def test_a_trimap_of_other_values(tmp_path):
    make(tmp_path)
    write_picture(tmp_path / "annotations/trimaps/trainval_Breed_0.png")
    assert "values 1, 2 and 3" in refusal(prepare, tmp_path)
