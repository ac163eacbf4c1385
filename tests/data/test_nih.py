"""NIH ChestX-ray14: trees made here in both layouts, the owners' full tables, and the real sample where it is."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, real_folder, refusal, wheel_table, write_rows
from PIL import Image

from gloria_core.data.manifest import boxes_of
from gloria_core.data.prompts import load_prompts
from gloria_core.data.sources.nih import NIH_LABELS, read_boxes, read_entries
from gloria_core.data.splits import label_subset

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)

prepare = adapter("nih")
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def entry(patient: int, number: int, labels: str = "No Finding", age: str = "57", sex: str = "M", view: str = "PA"):
    return f"{patient:08d}_{number:03d}.png,{labels},{number},{patient},{age},{sex},{view},2500,2048,0.168,0.168"


def make_tree(root: Path, *, layout: str = "official", n_patients: int = 20, size: int = 64) -> list[str]:
    """A small dataset: `official` has images_001/images/*.png, `flat` has images/*.jpg; two images a patient."""
    rows, kinds = [], ["No Finding", "Effusion", "Mass|Hernia", "Infiltration", "Pleural_Thickening|Edema"]
    for patient in range(1, n_patients + 1):
        for number in range(2):
            labels = kinds[(patient + number) % len(kinds)]
            rows.append(entry(patient, number, labels, sex="MF"[patient % 2], view=("PA", "AP")[patient % 3 == 0]))
    for i, row in enumerate(rows):
        stem = row.partition(".png")[0]
        folder = root / (f"images_{1 + i % 3:03d}/images" if layout == "official" else "images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (size, size * 2)).save(folder / f"{stem}{'.png' if layout == 'official' else '.jpg'}")
    write_table(root, rows)
    (root / "BBox_List_2017.csv").write_text(f"{BOX_HEADER}\n00000001_000.png,Infiltrate,512.0,256.0,128.0,64.0\n")
    return rows


def write_table(root: Path, rows: list[str], header: str = HEADER, name: str = "Data_Entry_2017_v2020.csv") -> None:
    write_rows(root / name, header, rows)


# --- both layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["official", "flat"])
def test_both_layouts_give_a_good_manifest(tmp_path, layout):
    make_tree(tmp_path / "root", layout=layout)
    frame = prepared_twice(prepare, tmp_path / "root", tmp_path, seed=1)
    assert (
        len(frame) == 40 and frame["patient_id"].nunique() == 20 and set(frame["split"]) == {"train", "valid", "test"}
    )
    row = frame.set_index("study_id").loc["00000003_001"]
    assert row["images"] == (
        "images_003/images/00000003_001.png" if layout == "official" else "images/00000003_001.jpg"
    )
    assert row["views"] == "AP" and row["is_ap_view"] == 1 and row["is_male"] == 0
    assert row["meta_age"] == "57" and row["meta_sex"] == "F" and row["meta_view"] == "AP"
    assert row["meta_follow_up"] == "1" and row["patient_id"] == "3" and "meta_source" not in frame
    assert [name for name in NIH_LABELS if row[name] == 1] == ["Edema", "Pleural_Thickening"] and row["No Finding"] == 0
    assert set(np.unique(frame[list(NIH_LABELS)])) == {0.0, 1.0}


def test_boxes_are_in_pixels_of_the_file(tmp_path):
    """The original is 1024 x 1024, this file 64 wide and 128 high."""
    make_tree(tmp_path)
    row = prepare(tmp_path).set_index("study_id").loc["00000001_000"]
    assert boxes_of(row) == [{"label": "Infiltration", "image": 0, "xywh": [32.0, 32.0, 8.0, 8.0]}]


@pytest.mark.parametrize("name", ["BBox_List_2017_Official_NIH.csv", "bbox_list_2017.CSV", "BBox_List_2017.csv.gz"])
def test_the_box_table_under_its_other_names(tmp_path, name):
    make_tree(tmp_path)
    boxes, content = prepare(tmp_path)["boxes"], (tmp_path / "BBox_List_2017.csv").read_bytes()
    (tmp_path / "BBox_List_2017.csv").unlink()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert prepare(tmp_path)["boxes"].equals(boxes) and (boxes != "").any()
    (tmp_path / name).rename(tmp_path / "BBoxes_List2017.csv")
    with pytest.warns(UserWarning, match="BBoxes_List2017.csv is not read"):
        assert (prepare(tmp_path)["boxes"] == "").all()


def test_patients_with_boxes_are_moved_to_test_and_counted(tmp_path):
    make_tree(tmp_path)
    counted = [prepare(tmp_path, seed=seed).attrs["moved_to_test"] for seed in range(4)]
    (tmp_path / "BBox_List_2017.csv").unlink()
    plain = [prepare(tmp_path, seed=seed).set_index("study_id").loc["00000001_000", "split"] for seed in range(4)]
    assert counted == [int(split != "test") for split in plain] and sum(counted) > 0


def test_older_header_and_ages(tmp_path):
    """The first release ended every line with a comma and wrote ages as 058Y."""
    rows = [entry(1, 0, age="058Y"), entry(2, 0, age="018M"), entry(3, 0, age="020D"), entry(4, 0, age="7")]
    make_tree(tmp_path, n_patients=4)
    (tmp_path / "Data_Entry_2017_v2020.csv").unlink()
    write_table(tmp_path, [f"{row}," for row in rows], header=f"{HEADER},", name="Data_Entry_2017.csv")
    assert list(prepare(tmp_path)["meta_age"]) == ["58", "1", "0", "7"]


def test_extras(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "image_source.csv").write_text("image_index,source\n00000001_000.png,C\n")
    (tmp_path / "rsna_to_nih.csv").write_text("patientId,image_index,rsna_class\nx,00000001_001.png,Normal\n")
    frame = prepare(tmp_path).set_index("study_id")
    assert frame.loc["00000001_000", "meta_source"] == "C" and frame.loc["00000001_001", "meta_source"] == ""
    assert frame.loc["00000001_001", "meta_rsna_class"] == "Normal"


# --- splits and texts ------------------------------------------------------------------------------------------------


def test_published_split(tmp_path):
    rows = make_tree(tmp_path)
    images = [row.partition(",")[0] for row in rows]
    (tmp_path / "train_val_list.txt").write_text("\n".join(images[:30]))
    assert "test_list.txt: needed by split_rule" in refusal(prepare, tmp_path, split_rule="published")
    (tmp_path / "test_list.txt").write_text("\n".join(images[30:-2]))
    assert "2 bad values (row" in refusal(prepare, tmp_path, split_rule="published")
    (tmp_path / "test_list.txt").write_text("\n".join(images[30:]))
    frame = prepare(tmp_path, split_rule="published")
    assert list(frame.loc[frame["split"] == "test", "study_id"]) == [name[:-4] for name in images[30:]]
    assert (frame["split"] == "valid").sum() == 4
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()


def test_published_split_with_a_patient_in_both_lists(tmp_path):
    images = [row.partition(",")[0] for row in make_tree(tmp_path)]
    (tmp_path / "train_val_list.txt").write_text("\n".join(images[:31]))
    (tmp_path / "test_list.txt").write_text("\n".join(images[31:]))
    assert "patient in two splits" in refusal(prepare, tmp_path, split_rule="published")


def test_texts_say_the_labels_and_only_the_view(tmp_path):
    make_tree(tmp_path)
    prompts = load_prompts("nih").classes
    frame = prepare(tmp_path, n_negative=2)
    views = {1.0: prompts["is_ap_view"]["pos"], 0.0: prompts["is_ap_view"]["neg"]}
    for _, row in frame.iterrows():
        train = row["split"] == "train"
        assert row["findings"] in views[row["is_ap_view"]] if train else row["findings"] == views[row["is_ap_view"]][0]
        rest = row["impression"]
        for label in (*NIH_LABELS, "No Finding"):
            said = [s for s in prompts[label]["pos"] if s in rest]
            assert bool(said) == (row[label] == 1), (row["study_id"], label, rest)
        negatives = sum(s in rest for label in NIH_LABELS if row[label] == 0 for s in prompts[label]["neg"])
        assert negatives == 2 if train else negatives == 0


def test_training_texts_depend_on_seed_and_study_alone(tmp_path):
    rows = make_tree(tmp_path)
    first = prepare(tmp_path).set_index("study_id")
    write_table(tmp_path, rows[::-1])
    again = prepare(tmp_path).set_index("study_id").loc[first.index]
    pd.testing.assert_frame_equal(first, again)
    other = prepare(tmp_path, text_seed=1).set_index("study_id").loc[first.index]
    differs = first["impression"] != other["impression"]
    assert differs[first["split"] == "train"].mean() > 0.5 and not differs[first["split"] != "train"].any()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["Image Index", "Finding Labels", "Patient ID", "View Position", "Patient Gender"])
def test_changed_column_name(tmp_path, old):
    rows = make_tree(tmp_path)
    write_table(tmp_path, rows, header=HEADER.replace(old, f"{old}s"))
    text = refusal(prepare, tmp_path)
    assert "Data_Entry_2017_v2020.csv" in text and repr(old) in text and f"Did you mean '{old}s'" in text


BAD_ROWS = {
    "unknown_label": (entry(1, 0, labels="Effusion|Oedema"), "Finding Labels", "row 2: 'Effusion|Oedema'"),
    "no_finding_and_more": (entry(1, 0, labels="No Finding|Mass"), "Finding Labels", "must stand alone"),
    "view": (entry(1, 0, view="LL"), "View Position", "row 2: 'LL'"),
    "sex": (entry(1, 0, sex="X"), "Patient Gender", "row 2: 'X'"),
    "age": (entry(1, 0, age="old"), "Patient Age", "row 2: 'old'"),
    "twice": (entry(1, 1), "Image Index", "occurs twice"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_entries(tmp_path, case):
    rows = make_tree(tmp_path)
    write_table(tmp_path, [BAD_ROWS[case][0], *rows[1:]])
    text = refusal(prepare, tmp_path)
    assert all(word in text for word in ("Data_Entry_2017_v2020.csv", *BAD_ROWS[case][1:]))


BAD_BOXES = {
    "unknown_image": ("00000099_000.png,Mass,1,2,3,4", "row 2", "not in the table of entries"),
    "flat": ("00000001_000.png,Mass,1,2,0,4", "row 2: '0'", "w, h > 0"),
    "text": ("00000001_000.png,Mass,1,two,3,4", "row 2: 'two'", "Bbox y"),
    "label": ("00000001_000.png,Lump,1,2,3,4", "row 2: 'Lump'", "Finding Label"),
}


@pytest.mark.parametrize("case", BAD_BOXES)
def test_bad_boxes(tmp_path, case):
    make_tree(tmp_path)
    (tmp_path / "BBox_List_2017.csv").write_text(f"{BOX_HEADER}\n{BAD_BOXES[case][0]}\n")
    text = refusal(prepare, tmp_path)
    assert "BBox_List_2017.csv" in text and all(word in text for word in BAD_BOXES[case][1:])


def test_box_on_an_unreadable_image(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "images_001/images/00000001_000.png").write_bytes(b"broken")
    assert "cannot be read" in refusal(prepare, tmp_path)
    frame = prepare(tmp_path, on_error="exclude")
    assert len(frame) == 39 and "cannot be read" in frame.attrs["excluded"][0]["reason"]


def test_image_twice_table_twice_or_absent(tmp_path):
    rows = make_tree(tmp_path)
    shutil.copy(tmp_path / "images_001/images/00000001_000.png", tmp_path / "images_002/images/")
    assert "occurs twice" in refusal(prepare, tmp_path)
    write_table(tmp_path, rows, name="Data_Entry_2017.csv")
    assert "several files" in refusal(prepare, tmp_path)
    assert "not a folder" in refusal(prepare, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "lacks\n  Data_Entry_2017*.csv: the labels" in refusal(prepare, tmp_path / "empty")


# --- the owners' full tables -----------------------------------------------------------------------------------------

COUNTS = {
    "No Finding": 60361,
    "Infiltration": 19894,
    "Effusion": 13317,
    "Atelectasis": 11559,
    "Nodule": 6331,
    "Mass": 5782,
    "Pneumothorax": 5302,
    "Consolidation": 4667,
    "Pleural_Thickening": 3385,
    "Cardiomegaly": 2776,
    "Emphysema": 2516,
    "Edema": 2303,
    "Fibrosis": 1686,
    "Pneumonia": 1431,
    "Hernia": 227,
}


@pytest.fixture(scope="module")
def full_tables() -> Path:
    return wheel_table("Data_Entry_2017_v2020.csv.gz").parent


def test_full_tables_have_the_published_counts(full_tables):
    entries = read_entries(full_tables / "Data_Entry_2017_v2020.csv.gz")
    assert len(entries) == 112_120 and entries["patient_id"].nunique() == 30_805
    found = {label: int(entries["labels"].map(lambda names, label=label: label in names).sum()) for label in COUNTS}
    assert found == COUNTS
    assert (entries["view"] == "AP").sum() == 44_810 and (entries["sex"] == "M").sum() == 63_340
    boxes = read_boxes(full_tables / "BBox_List_2017.csv.gz")
    assert len(boxes) == 984 and boxes["image"].nunique() == 880 and set(boxes["image"]) <= set(entries["image"])
    assert (boxes["x"] + boxes["w"]).max() <= 1024 and (boxes["y"] + boxes["h"]).max() <= 1024
    assert (boxes["label"] == "Infiltration").sum() == 123


# --- the real sample -------------------------------------------------------------------------------------------------


def test_real_sample(tmp_path):
    frame = prepared_twice(prepare, real_folder("nih_sample"), tmp_path)
    assert len(frame) == 9168 and frame["patient_id"].nunique() == 6826
    assert frame.attrs["excluded"] == []
    assert frame["Infiltration"].sum() == 2950 and frame["No Finding"].sum() == 4171 and frame["Hernia"].sum() == 35
    assert frame["meta_source"].value_counts()["A"] == 7448 and (frame["meta_rsna_class"] != "").sum() == 8153
    boxes = [box for _, row in frame[frame["boxes"] != ""].iterrows() for box in boxes_of(row)]
    assert len(boxes) == 74 and all(b["xywh"][0] + b["xywh"][2] <= 224.01 for b in boxes)
    assert set(frame.loc[frame["boxes"] != "", "split"]) == {"test"}
    train = frame[frame["split"] == "train"]
    for label in NIH_LABELS:
        test_share = frame.loc[frame["split"] == "test", label].mean()
        # the patients with boxes, all in test, have more findings than others
        assert abs(test_share - frame[label].mean()) < 0.03
        assert (label_subset(frame, 0.01)[label] == 1).any()
        assert abs(label_subset(frame, 0.1)[label].mean() - train[label].mean()) < 0.005
