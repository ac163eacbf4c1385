"""Montgomery and Shenzhen: the owners' trees made here, masks of both kinds, clinical readings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, refusal, write_picture

from gloria_core.data.manifest import masks_of

prepare = adapter("montgomery_shenzhen")


def make(root: Path, n: int = 10) -> None:
    for i in range(1, n + 1):
        name = f"MCUCXR_{i:04d}_{i % 2}"
        write_picture(root / f"MontgomerySet/CXR_png/{name}.png")
        for side in ("left", "right"):
            write_picture(root / f"MontgomerySet/ManualMask/{side}Mask/{name}.png")
        text = root / f"MontgomerySet/ClinicalReadings/{name}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text(f"Patient's Sex: F\nPatient's Age: 0{20 + i}Y\nscattered calcified granulomas\n")
        name = f"CHNCXR_{i:04d}_{i % 2}"
        write_picture(root / f"ChinaSet_AllFiles/CXR_png/{name}.png")
        text = root / f"ChinaSet_AllFiles/ClinicalReadings/{name}.txt"
        text.parent.mkdir(exist_ok=True)
        text.write_text("male 45yrs\nnormal\n")
        if i % 3:
            write_picture(root / f"mask/{name}_mask.png")


def test_both_sets(tmp_path):
    root = tmp_path / "root"
    make(root)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert len(frame) == 20 and frame["Tuberculosis"].sum() == 10 and set(frame["split"]) == {"train", "valid", "test"}
    row = frame.loc["MCUCXR_0003_1"]
    assert list(row[["is_male", "meta_age", "meta_reading", "views"]]) == [
        0,
        "23",
        "scattered calcified granulomas",
        "PA",
    ]
    assert [(mask["label"], mask["side"]) for mask in masks_of(row)] == [("Lungs", "left"), ("Lungs", "right")]
    row = frame.loc["CHNCXR_0002_0"]
    assert list(row[["is_male", "meta_age", "meta_reading", "meta_source"]]) == [1, "45", "normal", "shenzhen"]
    assert masks_of(row) == [{"label": "Lungs", "image": 0, "path": "mask/CHNCXR_0002_0_mask.png"}]
    assert frame.loc["CHNCXR_0003_1", "masks"] == ""


def test_options(tmp_path):
    make(tmp_path)
    one = prepare(tmp_path, sets=["shenzhen"], masked_only=True, split_rule="test")
    assert len(one) == 7 and set(one["split"]) == {"test"} and len(one.attrs["excluded"]) == 3
    (tmp_path / "MontgomerySet/ClinicalReadings/MCUCXR_0001_1.txt").unlink()
    assert np.isnan(prepare(tmp_path).set_index("study_id").loc["MCUCXR_0001_1", "is_male"])
    with pytest.raises(ValueError, match="'montgomery' or 'shenzhen'"):
        prepare(tmp_path, sets=["jsrt"])


def test_refusals(tmp_path):
    assert "MontgomerySet/CXR_png/: the images of montgomery" in refusal(prepare, tmp_path)
    assert "is not a folder" in refusal(prepare, tmp_path / "nowhere")
    make(tmp_path)
    (tmp_path / "MontgomerySet/ManualMask/leftMask/MCUCXR_0002_0.png").unlink()
    assert "MCUCXR_0002_0" in refusal(prepare, tmp_path) and "a side's mask is missing" in refusal(prepare, tmp_path)
    frame = prepare(tmp_path, on_error="exclude")
    assert len(frame) == 19 and frame.attrs["excluded"][0]["study_id"] == "MCUCXR_0002_0"
    write_picture(tmp_path / "masks/CHNCXR_0001_1_mask.png")
    assert "occurs twice" in refusal(prepare, tmp_path)
    write_picture(tmp_path / "ChinaSet_AllFiles/CXR_png/other.png")
    assert "other.png" in refusal(prepare, tmp_path, sets=["shenzhen"])
