"""MS-CXR: phrases, boxes and masks that agree, scaled boxes, leaks into MIMIC's training split, and bad input."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from owner_trees import adapter, prepared_twice, refusal
from PIL import Image

from gloria_core.data.manifest import boxes_of, masks_of
from gloria_core.data.sources.ms_cxr import patients_of
from gloria_core.tasks.phrases import phrases_from_masks

prepare = adapter("ms_cxr")

NAME = "MS_CXR_Local_Alignment_v1.1.0.csv"
COLUMNS = ["category_name", "label_text", "path", "x", "y", "w", "h", "dicom_id", "image_width", "image_height"]
COLUMNS += ["split"]


def image_path(i: int) -> str:
    return f"files/p1{i % 10}/p1{i % 10}00000{i}/s5000000{i}/d{i}.jpg"


def make_tree(root: Path, *, half: bool = False) -> pd.DataFrame:
    """Image 1: two boxes of one phrase and one of another; image 2: one. Files of 60 x 40 pixels, or half of it."""
    rows = [
        ["Pneumothorax", "small  left pneumothorax", image_path(1), 2, 4, 10, 6, "d1", 60, 40, "train"],
        ["Pneumothorax", "small  left pneumothorax", image_path(1), 30, 20, 8, 8, "d1", 60, 40, "train"],
        ["Lung Opacity", "Opacity at the right base.", image_path(1), 0, 0, 5, 5, "d1", 60, 40, "train"],
        ["Edema", "mild edema", image_path(2), 10, 10, 20, 20, "d2", 60, 40, "test"],
    ]
    for i in (1, 2):
        file = root / image_path(i)
        file.parent.mkdir(parents=True)
        Image.new("L", (30, 20) if half else (60, 40)).save(file)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(root / NAME, index=False)
    return table


def test_a_good_manifest(tmp_path):
    make_tree(tmp_path)
    prepare(tmp_path)
    bytes_before = [path.read_bytes() for path in sorted((tmp_path / "ms_cxr_masks").iterdir())]
    frame = prepared_twice(prepare, tmp_path, tmp_path)
    assert [path.read_bytes() for path in sorted((tmp_path / "ms_cxr_masks").iterdir())] == bytes_before
    first, second = (row for _, row in frame.iterrows())
    assert first["impression"] == "small left pneumothorax. Opacity at the right base."
    assert second["impression"] == "mild edema." and set(frame["split"]) == {"test"}
    assert first["Pneumothorax"] == 1 and np.isnan(first["Edema"]) and first["patient_id"] == "p11000001"
    assert [box["xywh"] for box in boxes_of(first)] == [[2, 4, 10, 6], [30, 20, 8, 8], [0, 0, 5, 5]]
    names = [[first["impression"][a:b] for _, a, b in mask["spans"]] for mask in masks_of(first)]
    assert names == [["small left pneumothorax"], ["Opacity at the right base."]]
    mask = np.asarray(Image.open(tmp_path / masks_of(first)[0]["path"]))
    expected = np.zeros((40, 60), bool)
    expected[4:10, 2:12] = expected[20:28, 30:38] = True
    assert (mask == expected).all()


def test_grounding_finds_the_phrases(tmp_path):
    make_tree(tmp_path)
    phrases = phrases_from_masks(prepare(tmp_path))
    assert [(phrase.label, phrase.words) for phrase in phrases] == [
        ("Pneumothorax", "small left pneumothorax"),
        ("Lung Opacity", "Opacity at the right base."),
        ("Edema", "mild edema"),
    ]


def test_boxes_follow_the_size_of_the_file(tmp_path):
    make_tree(tmp_path, half=True)
    frame = prepare(tmp_path)
    assert boxes_of(frame.iloc[0])[0]["xywh"] == [1, 2, 5, 3]
    assert np.asarray(Image.open(tmp_path / masks_of(frame.iloc[0])[0]["path"])).shape == (20, 30)
    plain = prepare(tmp_path, write_masks=False)
    assert set(plain["masks"]) == {""} and boxes_of(plain.iloc[0])[0]["spans"] == [["impression", 0, 23]]
    assert json.loads(prepare(tmp_path, check_images=False, write_masks=False)["boxes"][0])[0]["xywh"] == [2, 4, 10, 6]


def test_splits_and_leaks(tmp_path):
    make_tree(tmp_path)
    assert prepare(tmp_path, split_rule="published")["split"].tolist() == ["train", "test"]
    (tmp_path / "mimic-cxr-2.0.0-split.csv").write_text(
        "dicom_id,study_id,subject_id,split\nd1,50000001,11000001,train\nd2,50000002,12000002,test\n"
    )
    assert prepare(tmp_path).attrs["leaks"]["test patients in the official MIMIC-CXR train"] == 1
    assert patients_of(tmp_path / NAME) == {"p11000001", "p12000002"}
    assert patients_of(tmp_path / "mimic-cxr-2.0.0-split.csv") == {"p11000001", "p12000002"}


def test_bad_input(tmp_path):
    assert "physionet.org/content/ms-cxr" in refusal(prepare, tmp_path)
    table = make_tree(tmp_path)
    (tmp_path / image_path(2)).unlink()
    assert "no such image file" in refusal(prepare, tmp_path) and "row 5" in refusal(prepare, tmp_path)
    assert len(prepare(tmp_path, on_error="exclude")) == 1
    (tmp_path / image_path(2)).write_bytes(b"broken")
    assert "cannot be read" in refusal(prepare, tmp_path)

    def broken(change) -> str:
        change(table.copy()).to_csv(tmp_path / NAME, index=False)
        return refusal(prepare, tmp_path, check_images=False)

    text = broken(lambda t: t.rename(columns={"label_text": "label_txt"}))
    assert "lacks column 'label_text'. Did you mean 'label_txt'" in text
    assert "column 'w'" in broken(lambda t: t.assign(w=0))
    assert "column 'category_name'" in broken(lambda t: t.assign(category_name="Lump"))
    assert "occurs twice" in broken(lambda t: pd.concat([t, t[:1]]))
    assert "escapes the root" in broken(lambda t: t.assign(path="../" + t["path"]))
