"""CheXpert Plus: reports with line breaks and marks, both image kinds, labels by line, and bad input."""

import json
from pathlib import Path

import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal
from PIL import Image

from gloria_core.data.manifest import CHEXPERT_LABELS
from gloria_core.data.sources.chexpert_plus import TABLE

prepare = adapter("chexpert_plus")


def make_tree(root: Path, *, home: str = "", suffix: str = ".jpg", n: int = 60, labels: bool = True) -> pd.DataFrame:
    rows, marks = [], []
    for i in range(1, n + 1):
        part = "valid" if i > n - 4 else "train"
        for view, side, projection in ((1, "Frontal", "AP" if i % 2 else "PA"), (2, "Lateral", "")):
            path = f"{part}/patient{i:05d}/study1/view{view}_{side.lower()}.jpg"
            text = "" if i == 5 else f"1. Stable {i}.\n2. Seen by Dr. <alpha>\nXXXX.\n\nEnd."
            rows.append([path, side, projection, "Findings: ___ clear." if i % 3 else "", text, part, "61", "Female"])
            file = root / home / f"{path[:-4]}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(file)
            values = {name: (None, 1.0, 0.0, -1.0)[(i + k) % 4] for k, name in enumerate(CHEXPERT_LABELS)}
            marks.append(json.dumps({"path_to_image": path, **values}))
    names = [
        "path_to_image",
        "frontal_lateral",
        "ap_pa",
        "section_findings",
        "section_impression",
        "split",
        "age",
        "sex",
    ]
    table = pd.DataFrame(rows, columns=names)
    table.to_csv(root / TABLE, index=False)
    if labels:
        (root / "chexbert_labels").mkdir(exist_ok=True)
        (root / "chexbert_labels/impression_fixed.json").write_text("\n".join(marks) + "\n")
    return table


@pytest.mark.parametrize(("home", "suffix"), [("", ".jpg"), ("PNG", ".png"), ("CheXpert-v1.0-small", ".jpg")])
def test_each_home_of_the_images(tmp_path, home, suffix):
    make_tree(tmp_path, home=home, suffix=suffix, n=160)
    frame = prepared_twice(prepare, tmp_path, tmp_path)
    assert frame["split"].value_counts().to_dict() == {"train": 152, "valid": 4, "test": 4}
    row = frame.set_index("study_id").loc["patient00007_study1"]
    assert row["impression"] == "1. Stable 7. 2. Seen by Dr. <alpha> XXXX.\n\nEnd."
    assert row["findings"] == "Findings: ___ clear." and row["is_male"] == 0 and row["meta_age"] == "61"
    assert [str(row[name]) for name in CHEXPERT_LABELS[:4]] == ["-1.0", "nan", "1.0", "0.0"]


def test_studies_without_text(tmp_path):
    table = make_tree(tmp_path)
    table.loc[table["path_to_image"].str.contains("patient00005"), ["section_findings", "section_impression"]] = ""
    table.to_csv(tmp_path / TABLE, index=False)
    frame = prepare(tmp_path, views="all")
    assert len(frame) == 59 and len(frame.attrs["excluded"]) == 2
    assert "neither findings nor impression" in frame.attrs["excluded"][0]["reason"]
    assert len(prepare(tmp_path, views="all", texts_only=False)) == 60
    assert len(prepare(tmp_path, views="all", texts_only=False, unit="image")) == 120


def test_published_split_labels_and_list(tmp_path):
    make_tree(tmp_path)
    assert prepare(tmp_path, split_rule="published")["split"].value_counts().to_dict() == {"train": 56, "valid": 4}
    assert "Edema" not in prepare(tmp_path, labels="none")
    assert "lacks chexbert_labels/findings_fixed.json" in refusal(prepare, tmp_path, labels="findings")
    given = tmp_path / "list.csv"
    given.write_text("Path\nx/train/patient00007/study1/view1_frontal.jpg\n")
    frame = prepare(tmp_path, hold_out=given)
    assert "patient00007" not in set(frame["patient_id"]) and len(frame) == 59
    (tmp_path / "chexbert_labels").rename(tmp_path / "labels")
    assert "Edema" in prepare(tmp_path)
    (tmp_path / "labels/impression_fixed.json").write_text('{"path_to_image": "a.jpg"}\n')
    assert "line 1: no labels" in refusal(prepare, tmp_path)


def test_bad_input(tmp_path):
    assert "lacks" in refusal(prepare, tmp_path) and "stanfordaimi" in refusal(prepare, tmp_path)
    table = make_tree(tmp_path, n=6, labels=False)
    assert "Edema" not in prepare(tmp_path)
    (tmp_path / "train/patient00001/study1/view1_frontal.jpg").unlink()
    assert "row 2" in refusal(prepare, tmp_path) and "no such image file" in refusal(prepare, tmp_path)
    frame = prepare(tmp_path, on_error="exclude")
    assert len(frame) == 5 and frame.attrs["excluded"][0]["row"] == 2

    def broken(change) -> str:
        change(table.copy()).to_csv(tmp_path / TABLE, index=False)
        return refusal(prepare, tmp_path)

    text = broken(lambda t: t.rename(columns={"section_impression": "impression"}))
    assert "lacks column 'section_impression'" in text and "'impression'" in text
    assert "occurs twice" in broken(lambda t: pd.concat([t, t[:1]]))
    assert "column 'path_to_image'" in broken(lambda t: t.assign(path_to_image=["../" + p for p in t["path_to_image"]]))
    assert "column 'split'" in broken(lambda t: t.assign(split="dev"))
    (tmp_path / TABLE).write_bytes((tmp_path / TABLE).read_bytes()[:0])
    assert "cannot be read as a table" in refusal(prepare, tmp_path)
