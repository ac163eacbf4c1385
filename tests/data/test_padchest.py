"""PadChest: trees, labels, and the owner's table of 160,861 images."""

import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
from owner_trees import adapter, prepared_twice, refusal, wheel_table
from PIL import Image

from gloria_core.data.raw_folder import read_table
from gloria_core.data.sources.padchest import COLUMNS as RULES
from gloria_core.data.sources.padchest import LABELS, NAME

prepare = adapter("padchest")

COLUMNS = ["ImageID", "ImageDir", "StudyID", "PatientID", "PatientSex_DICOM", "Projection", "MethodLabel", "Labels"]
COLUMNS += ["Report", "StudyDate_DICOM"]
KINDS = ["['normal']", "[' pleural effusion', 'NSG tube']", "['nodule', '']", "['cardiomegaly', 'loc basal']"]


def make_tree(root: Path, n: int = 20) -> pd.DataFrame:
    rows = []
    for i in range(n):
        for k, view in enumerate(("PA" if i % 3 else "AP_horizontal", "L")):
            method = "Physician" if i % 2 else "RNN_model"
            labels = "nan" if i == 6 else KINDS[i % 4]
            rows.append(
                [
                    f"{i}_{k}.png",
                    str(i % 3),
                    f"st{i}",
                    f"pt{i // 2}",
                    "MFO"[i % 3],
                    view,
                    method,
                    labels,
                    " sin . ",
                    "2014",
                ]
            )
            file = root / f"{i % 3}/{i}_{k}.png"
            file.parent.mkdir(exist_ok=True, parents=True)
            Image.new("L", (4, 4)).save(file)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(root / NAME, index=False)
    return table


def test_a_good_manifest(tmp_path):
    make_tree(tmp_path)
    frame = prepared_twice(prepare, tmp_path, tmp_path)
    assert len(frame) == 19 and set(frame["views"]) == {"PA", "AP"}
    assert [item["study_id"] for item in frame.attrs["excluded"]] == ["st6", "st6"]
    row = frame.set_index("study_id").loc["st5"]
    assert [name for name in LABELS if row[name] == 1] == ["Pleural Effusion", "Support Devices"]
    assert row["impression"] == "sin ." and row["meta_labelled_by"] == "physician" and row["meta_date"] == "2014"
    assert (
        pd.isna(row["is_male"]) and row["images"] == "2/5_0.png" and row["meta_labels"] == "NSG tube|pleural effusion"
    )
    assert set(prepare(tmp_path, views="all")["views"]) == {"PA;LATERAL", "AP;LATERAL"}
    assert len(prepare(tmp_path, labelled_by="physician")) == 10


def test_all_images_in_one_folder(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "images").mkdir()
    for file in tmp_path.glob("[0-9]/*.png"):
        shutil.move(file, tmp_path / "images")
    assert prepare(tmp_path)["images"].str.startswith("images/").all()
    (tmp_path / "images/3_0.png").unlink()
    assert "3_0.png" in refusal(prepare, tmp_path)
    assert len(prepare(tmp_path, on_error="exclude")) == 18


def test_bad_input(tmp_path):
    assert NAME in refusal(prepare, tmp_path) and "bimcv" in refusal(prepare, tmp_path)
    table = make_tree(tmp_path)

    def broken(change) -> str:
        change(table.copy()).to_csv(tmp_path / NAME, index=False)
        return refusal(prepare, tmp_path)

    assert "Did you mean 'Label'" in broken(lambda t: t.rename(columns={"Labels": "Label"}))
    assert "occurs twice" in broken(lambda t: pd.concat([t, t[:1]]))
    assert "escapes the root" in broken(lambda t: t.assign(ImageID=["../a.png", *t["ImageID"][1:]]))
    assert "column 'Projection'" in broken(lambda t: t.assign(Projection="UP"))
    assert "row 2, column 'Labels'" in broken(lambda t: t.assign(Labels="normal"))


def test_the_real_table(tmp_path):
    shutil.copy(wheel_table(f"{NAME}.gz"), tmp_path)
    table = read_table(tmp_path / f"{NAME}.gz", RULES)
    assert (len(table), table["patient_id"].nunique(), table["study_id"].nunique()) == (160_861, 67_625, 109_931)
    assert (table["method"] == "Physician").sum() == 39_053 and (table["labels"] == "nan").sum() == 103
    frame = prepare(tmp_path, labelled_by="physician", check_images=False)
    assert len(frame) == 26_087 and frame["patient_id"].nunique() == 24_239
    assert frame["split"].value_counts().to_dict() == {"train": 18_261, "test": 5_217, "valid": 2_609}
    counts = {name: int(frame[name].sum()) for name in ("No Finding", "Pleural Effusion", "Pneumothorax", "Edema")}
    assert counts == {"No Finding": 8_812, "Pleural Effusion": 1_190, "Pneumothorax": 67, "Edema": 73}
    assert Counter(item["reason"].split(" - ")[-1] for item in frame.attrs["excluded"]) == {
        "not labelled by a physician": 83_439,
        "no image of view 'frontal'": 326,
        "the owner gives no labels": 103,
    }
    assert frame.attrs["leaks"] == {}
