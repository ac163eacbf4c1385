import numpy as np
import pandas as pd
import pytest
from owner_trees import real_folder
from PIL import Image

from gloria_core.data.manifest import ManifestError, boxes_of, finding_columns
from gloria_core.data.sources import available, prepare


@pytest.fixture
def root(tmp_path):
    """Twelve images of nine people; every third has pneumonia, one of them twice."""
    (tmp_path / "images").mkdir()
    labels, matches = ["patientId,x,y,width,height,Target"], ["patientId,image_index,rsna_class,rsna_match_mse"]
    for n in range(12):
        stem = f"{n // 2 if n < 6 else n:08d}_{n % 2:03d}"
        Image.fromarray(np.full((256, 128), n, np.uint8)).save(tmp_path / f"images/{stem}.jpg")
        matches.append(f"rsna-{n},{stem}.png,{'Lung Opacity' if n % 3 == 0 else 'Normal'},0.5")
        labels += [f"rsna-{n},512.0,256.0,256.0,128.0,1"] * (n % 3 == 0) + [f"rsna-{n},,,,,0"] * (n % 3 > 0)
    labels.append("rsna-3,0.0,0.0,100.0,200.0,1")
    (tmp_path / "stage_2_train_labels.csv").write_text("\n".join(labels) + "\n")
    (tmp_path / "rsna_to_nih.csv").write_text("\n".join(matches) + "\n")
    return tmp_path


def _replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_boxes_are_in_pixels_of_the_files(root):
    frame = prepare("rsna_sample", root).set_index("meta_rsna_patient")
    assert "rsna_sample" in available() and len(frame) == 12 and frame["Pneumonia"].sum() == 4
    first = boxes_of(frame.loc["rsna-0"])
    # half of 1024 is half of the 128 wide file; the file is 256 high
    assert first == [{"label": "Pneumonia", "image": 0, "xywh": [64.0, 64.0, 32.0, 32.0]}]
    assert [box["xywh"] for box in boxes_of(frame.loc["rsna-3"])] == [[64, 64, 32, 32], [0, 0, 12.5, 50]]
    assert boxes_of(frame.loc["rsna-1"]) == [] and frame.loc["rsna-1", "meta_rsna_class"] == "Normal"
    assert frame.loc["rsna-1", "images"] == "images/00000000_001.jpg"


def test_people_stay_in_one_split_and_the_seed_decides(root):
    frame = prepare("rsna_sample", root)
    assert frame["patient_id"].nunique() == 9
    assert (frame.groupby("patient_id")[["split", "label_rank"]].nunique() == 1).all(axis=None)
    pd.testing.assert_frame_equal(frame, prepare("rsna_sample", root))
    others = [prepare("rsna_sample", root, {"seed": seed})["split"].tolist() for seed in range(1, 5)]
    assert any(split != frame["split"].tolist() for split in others)


def test_the_source_is_kept(root):
    (root / "image_source.csv").write_text("image_index,source\n00000000_000.png,A\n")
    frame = prepare("rsna_sample", root).set_index("study_id")
    assert frame.loc["00000000_000", "meta_source"] == "A" and frame.loc["00000000_001", "meta_source"] == ""


def test_projection_sex_and_age_come_from_the_table_of_entries_and_move_no_split(root):
    before = prepare("rsna_sample", root)
    assert "is_male" not in before and set(before["views"]) == {"FRONTAL"}
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = ["00000000_000.png,No Finding,0,0,058Y,M,AP", "00000000_001.png,Mass,1,0,59,F,PA"]
    table = root / "Data_Entry_2017_v2020.csv"
    table.write_text("\n".join([header, *rows, "00000099_000.png,Mass,0,99,20,F,PA"]) + "\n")
    frame = prepare("rsna_sample", root)
    pd.testing.assert_frame_equal(frame[before.columns].assign(views="FRONTAL"), before)
    assert finding_columns(frame) == ["Pneumonia"]
    frame = frame.set_index("study_id")
    found = frame.loc[["00000000_000", "00000000_001"], ["views", "is_ap_view", "is_male", "meta_age"]]
    assert found.to_numpy().tolist() == [["AP", 1.0, 1.0, "58"], ["PA", 0.0, 0.0, "59"]]
    others = frame.drop(found.index)  # not in that table: unknown, not absent
    assert others[["is_ap_view", "is_male"]].isna().all(axis=None) and set(others["views"]) == {"FRONTAL"}
    assert (others["meta_age"] == "").all() and len(others) == 10
    _replace(table, ",M,AP", ",X,AP")
    with pytest.raises(ManifestError, match="Patient Gender"):
        prepare("rsna_sample", root)
    (root / "Data_Entry_2017.csv").write_text(header)
    with pytest.raises(ManifestError, match="several files"):
        prepare("rsna_sample", root)


def test_missing_images_are_named_or_left_out(root):
    (root / "images/00000007_001.jpg").unlink()
    _replace(root / "rsna_to_nih.csv", "rsna-8,", "rsna-x,")
    with pytest.raises(ManifestError, match="rsna-7"):
        prepare("rsna_sample", root)
    frame = prepare("rsna_sample", root, {"on_error": "exclude"})
    assert len(frame) == 10
    assert [item["study_id"] for item in frame.attrs["excluded"]] == ["rsna-7", "rsna-8"]
    assert frame.attrs["excluded"][0]["row"] == 9


@pytest.mark.parametrize(
    ("table", "old", "new", "word"),
    [
        ("stage_2_train_labels.csv", "rsna-1,,,,,0", "rsna-1,,,,,2", "Target"),
        ("stage_2_train_labels.csv", "rsna-1,,,,,0", "rsna-1,1,1,1,1,0", "Target 0 has none"),
        ("stage_2_train_labels.csv", "rsna-0,512.0,256.0,256.0", "rsna-0,512.0,256.0,0", "width"),
        ("stage_2_train_labels.csv", "rsna-0,512.0", "rsna-0,", "row 2"),
        ("stage_2_train_labels.csv", "rsna-1,,,,,0", "rsna-0,,,,,0", "occurs twice"),
        ("rsna_to_nih.csv", "rsna-1,", "rsna-0,", "occurs twice"),
        ("rsna_to_nih.csv", "image_index", "image", "image_index"),
    ],
)
def test_bad_tables_are_named(root, table, old, new, word):
    _replace(root / table, old, new)
    with pytest.raises(ManifestError, match=word) as caught:
        prepare("rsna_sample", root)
    assert table in str(caught.value)


def test_absent_tables_and_options(root):
    with pytest.raises(ValueError, match="on_error"):
        prepare("rsna_sample", root, {"on_error": "ignore"})
    (root / "rsna_to_nih.csv").unlink()
    with pytest.raises(ManifestError, match=r"lacks\n  rsna_to_nih.csv"):
        prepare("rsna_sample", root)


def test_the_real_subset():
    frame = prepare("rsna_sample", real_folder("nih_sample"))
    boxes = [box for row in frame.to_dict("records") for box in boxes_of(row)]
    assert len(frame) == 8153 and len(boxes) == 397
    assert all(b["xywh"][0] >= 0 and b["xywh"][0] + b["xywh"][2] <= 224.01 for b in boxes)
    assert ((frame["boxes"] != "") == (frame["Pneumonia"] == 1)).all()
    assert frame["split"].value_counts().to_dict() == {"train": 5707, "test": 1631, "valid": 815}
    assert frame[["is_ap_view", "is_male"]].notna().all(axis=None)
    assert ((frame["views"] == "AP") == (frame["is_ap_view"] == 1)).all()
