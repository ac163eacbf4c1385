"""SIIM-ACR pneumothorax: stage 1, stage 2 and PNG trees made here, and the owner's full table of runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal, wheel_table, write_dicom, write_picture, write_rows
from PIL import Image

from gloria_core.data.annotations import decode_rle
from gloria_core.data.manifest import masks_of
from gloria_core.data.splits import random_split

prepare = adapter("siim_pneumothorax")

RUNS = ("1024 3 1021 2", "20 5", "300000 10 1014 10")


def rows_of(n: int, prefix: str = "1.2.3.") -> list[str]:
    """Every third image is positive, of these every other in two rows."""
    rows = []
    for i in range(n):
        name = f"{prefix}{i}"
        if i % 3:
            rows.append(f"{name}, -1")
        else:
            rows += [f"{name},{RUNS[0]}"] + ([f"{name}, {RUNS[2]}"] if i % 2 else [])
    return rows


def make_stage1(root: Path, n: int = 24) -> list[str]:
    for i in range(n):
        write_dicom(root / f"dicom-images-train/study{i}/series{i}/1.2.3.{i}.dcm", size=1024)
    rows = rows_of(n)
    write_table(root, rows)
    return rows


def write_table(
    root: Path, rows: list[str], header: str = "ImageId, EncodedPixels", name: str = "train-rle.csv"
) -> None:
    write_rows(root / name, header, rows)


def test_stage_1_with_its_odd_header(tmp_path):
    root = tmp_path / "root"
    make_stage1(root)
    frame = prepared_twice(prepare, root, tmp_path).set_index("study_id")
    assert len(frame) == 24 and frame["Pneumothorax"].sum() == 8 and (frame["masks"] != "").sum() == 8
    assert frame.loc["1.2.3.3", "images"] == "dicom-images-train/study3/series3/1.2.3.3.dcm"
    mask = np.asarray(Image.open(root / masks_of(frame.loc["1.2.3.3"])[0]["path"]))
    union = [decode_rle(RUNS[k], 1024, 1024) for k in (0, 2)]
    assert (mask == (union[0] | union[1])).all() and mask.sum() == 25
    # the runs go down the columns: 1024 pixels are one column
    assert mask[:3, 1].all() and not mask[3, 1] and mask[0:2, 2].all()


def test_stage_2_and_masks_that_are_there(tmp_path):
    root = tmp_path / "root"
    for i in range(12):
        write_dicom(root / f"stage_2_images/ID_{i}.dcm", size=1024)
    write_table(root, rows_of(12, "ID_"), "ImageId,EncodedPixels", "stage_2_train.csv")
    frame = prepared_twice(prepare, root, tmp_path)
    assert set(frame["images"].str.split("/").str[0]) == {"stage_2_images"}
    assert (prepare(root, masks=False)["masks"] == "").all()
    mask = root / "masks_siim_pneumothorax/ID_0.png"
    drawn, time = mask.read_bytes(), mask.stat().st_mtime_ns
    prepare(root)
    assert mask.stat().st_mtime_ns == time  # what is right is left alone
    mask.write_bytes(b"of an older table")
    prepare(root)
    assert mask.read_bytes() == drawn


def test_png_version(tmp_path):
    root, header = tmp_path / "root", "new_filename,ImageId,has_pneumo"
    for split in ("train", "test"):
        rows = []
        for i in range(16 if split == "train" else 6):
            file = f"{i}_{split}_{i % 2}_.png"
            write_picture(root / "png_images" / file)
            write_picture(root / "png_masks" / file, gray=255 * (i % 2))
            rows.append(f"{file},1.{split}.{i},{i % 2}")
        write_table(root, rows, header, f"stage_1_{split}_images.csv")
    frame = prepared_twice(prepare, root, tmp_path, split_rule="published")
    assert frame["split"].value_counts().to_dict() == {"train": 14, "test": 6, "valid": 2}
    row = frame.set_index("study_id").loc["1.train.3"]
    assert row["images"] == "png_images/3_train_1_.png" and masks_of(row)[0]["path"] == "png_masks/3_train_1_.png"
    assert (frame["masks"] != "").sum() == 11 and not (root / "masks_siim_pneumothorax").exists()
    write_table(root, ["0_train_0_.png,1.train.0,0"], header, "stage_1_test_images.csv")
    assert "is in both" in refusal(prepare, root)


def test_the_published_draw_tears_images_and_their_masks_apart(tmp_path):
    root = tmp_path / "root"
    rows = make_stage1(root, n=60)
    whole = prepare(root).set_index("study_id")
    frame = prepared_twice(prepare, root, tmp_path, split_rule="published")
    drawn = pd.DataFrame([row.replace(", ", ",").split(",") for row in rows], columns=["name", "runs"])
    drawn["split"] = random_split(len(drawn), held_out=0.3, test=True)
    torn = drawn.groupby("name")["split"].nunique()
    torn = set(torn.index[torn > 1])
    leaks = frame.attrs["leaks"]
    assert len(torn) > 1 and leaks["images in train and test"] > 0
    assert leaks["test rows"] == 10 and leaks["test rows whose image is in train"] >= leaks["images in train and test"]
    # a study of each image and split, which holds the rows of that split
    expected = {
        f"{name} ({split})" if name in torn else name: part for (name, split), part in drawn.groupby(["name", "split"])
    }
    assert set(frame["study_id"]) == set(expected) and (frame["study_id"] == frame["patient_id"]).all()
    assert len(frame) == 60 + len(torn)
    for row in frame.to_dict("records"):
        part = expected[row["study_id"]]
        assert row["split"] == part["split"].iloc[0] and row["images"] == whole.loc[part["name"].iloc[0], "images"]
        runs = [text for text in part["runs"] if text != "-1"]
        assert row["Pneumothorax"] == bool(runs) and len(masks_of(row)) == bool(runs)
        if runs:
            mask = np.asarray(Image.open(root / masks_of(row)[0]["path"]))
            assert (mask == np.logical_or.reduce([decode_rle(text, 1024, 1024) for text in runs])).all()


def test_a_part_of_another_draw_is_not_taken_for_this_one(tmp_path):
    """A torn image's file is named by its rows: a table with one row less draws other parts."""
    rows = make_stage1(tmp_path, n=60)
    first = prepare(tmp_path, split_rule="published")
    write_table(tmp_path, rows[1:])
    second = prepare(tmp_path, split_rule="published")
    assert set(first["study_id"]) != set(second["study_id"])
    for row in second[second["study_id"].str.contains("(", regex=False)].to_dict("records"):
        mask = np.asarray(Image.open(tmp_path / masks_of(row)[0]["path"]))
        assert any((mask == decode_rle(RUNS[k], 1024, 1024)).all() for k in (0, 2))


def test_without_masks_and_with_missing_torn_images(tmp_path):
    make_stage1(tmp_path, n=60)
    frame = prepare(tmp_path, split_rule="published", masks=False)
    assert (frame["masks"] == "").all() and not (tmp_path / "masks_siim_pneumothorax").exists()
    torn = frame[frame["study_id"].str.contains("(", regex=False)]
    (tmp_path / torn["images"].iloc[0]).unlink()
    rest = prepare(tmp_path, split_rule="published", masks=False, on_error="exclude")
    name = torn["study_id"].iloc[0].split(" (")[0]
    assert [item["study_id"].split(" (")[0] for item in rest.attrs["excluded"]] == [name, name]
    assert len(rest) == len(frame) - 2


BAD = {
    "words": ("1.2.3.0,five 5", "pairs of whole numbers"),
    "odd": ("1.2.3.0,1 2 3", "pairs of whole numbers"),
    "negative": ("1.2.3.0,1 -2", "pairs of whole numbers"),
    "blank": ("1.2.3.0,", "pairs of whole numbers"),
    "past_the_end": ("1.2.3.0,1048570 20", "row 2, column 'EncodedPixels', image '1.2.3.0': a run ends at pixel"),
    "length_0": ("1.2.3.0,5 0", "length 0"),
    "twice": ("1.2.3.1,-1", "occurs twice"),
    "outside": ("../1.2.3.0,-1", "escapes the root"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_runs(tmp_path, case):
    first, expected = BAD[case]
    write_table(tmp_path, [first, *make_stage1(tmp_path, n=4)[1:]])
    text = refusal(prepare, tmp_path, on_error="exclude") if case == "outside" else refusal(prepare, tmp_path)
    assert expected in text and "train-rle.csv" in text


def test_wrong_folder_missing_image_and_column(tmp_path):
    assert "lacks\n  train-rle.csv or stage_2_train.csv" in refusal(prepare, tmp_path)
    assert "lacks\n  mine.csv" in refusal(prepare, tmp_path, table="mine.csv")
    assert "not a folder" in refusal(prepare, tmp_path / "nowhere")
    rows = make_stage1(tmp_path)
    (tmp_path / "dicom-images-train/study5/series5/1.2.3.5.dcm").unlink()
    assert "1.2.3.5" in refusal(prepare, tmp_path)
    frame = prepare(tmp_path, on_error="exclude", masks=False)
    assert len(frame) == 23 and frame.attrs["excluded"][0]["study_id"] == "1.2.3.5"
    write_dicom(tmp_path / "dicom-images-test/x/1.2.3.6.dcm")
    assert "occurs twice" in refusal(prepare, tmp_path)
    write_table(tmp_path, rows, "ImageId,Pixels")
    assert "EncodedPixels" in refusal(prepare, tmp_path)


def test_the_owners_full_table(tmp_path):
    """12,047 images; GLoRIA's and MGCA's split of rows has 154 images in train and in test."""
    shutil.copy(wheel_table("siim-pneumothorax-train-rle.csv.gz"), tmp_path / "train-rle.csv.gz")
    (tmp_path / "dicom-images-train").mkdir()
    for name in pd.read_csv(tmp_path / "train-rle.csv.gz")["ImageId"].unique():
        (tmp_path / f"dicom-images-train/{name}.dcm").touch()
    frame = prepare(tmp_path, masks=False)
    assert len(frame) == 12_047 and frame["Pneumothorax"].sum() == 2_669
    assert frame["split"].value_counts().to_dict() == {"train": 8432, "test": 2410, "valid": 1205}
    frame = prepare(tmp_path, masks=False, split_rule="published")
    assert frame["split"].value_counts().to_dict() == {"train": 8578, "test": 1903, "valid": 1910}
    trained = set(frame.loc[frame["split"] == "train", "images"])
    positive = frame[(frame["split"] == "test") & (frame["Pneumothorax"] == 1)]
    assert positive["images"].isin(trained).sum() == 154 and frame["images"].nunique() == 12_047
    assert frame["study_id"].str.endswith((" (train)", " (valid)", " (test)")).sum() == 655
    assert frame.loc[frame["split"] == "test", "Pneumothorax"].sum() == 476
    leaks = frame.attrs["leaks"]
    assert leaks["images in train and test"] == 154 and leaks["images in train and valid"] == 161
    assert leaks["test rows"] == 1943 and leaks["test rows whose image is in train"] == 176
