"""The covid_pairs source: a made folder with every kind of row, and the real one where it is there."""

import json

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, real_folder
from PIL import Image

from gloria_core.data.manifest import ManifestError, masks_of
from gloria_core.data.prompts import load_prompts
from gloria_core.data.sources import covid_pairs

prepare = adapter("covid_pairs")

COLUMNS = list(covid_pairs.COLUMNS)
ROWS = [
    # id, text, finding, view, patient, sex, lesions
    ("a", "Ground-glass opacities and consolidation.", "Pneumonia/Viral/COVID-19", "PA", "p1", "M", True),
    ("b", "ground glass opacities, and CONSOLIDATION", "Pneumonia/Viral/COVID-19", "AP Supine", "p1", "M", False),
    ("c", "", "No Finding", "AP", "p2", "F", False),
    ("d", "Lateral view of the same.", "Tuberculosis", "L", "p3", "", False),
    ("e", "Lobar opacity.", "Pneumonia/Bacterial/Klebsiella", "AP Erect", "p4", "F", False),
    ("f", "A clear lung.", "Unknown", "PA", "p5", "F", False),
]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for name, text, finding, view, patient, sex, lesions in ROWS:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"images/{name}.jpg")
        row = dict.fromkeys(COLUMNS, "") | {"id": name, "path": f"images/{name}.jpg", "text_imaging": text}
        row |= {"finding": finding, "view": view, "patient": patient, "sex": sex, "licence": "CC BY 4.0"}
        if lesions:
            row["lungmask_v7"] = "lungmask_v7/a.png"
            row["lung_boxes"] = json.dumps([["right_lung", 1, 2, 3, 4]])
            names = ("ground_glass_opacities", "consolidation", "left_lung", "pneumothorax")
            row["lesion_masks"] = json.dumps({name: f"lesion/{name}.png" for name in names})
        rows.append(row)
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def change(root, row, column, value):
    table = pd.read_csv(root / "index.csv", dtype=str, keep_default_na=False)
    table.loc[row, column] = value
    table.to_csv(root / "index.csv", index=False)


def reasons(frame):
    return {item["study_id"]: item["reason"] for item in frame.attrs["excluded"]}


def test_frontal_images_with_text(root):
    frame = prepare(root).set_index("study_id")
    assert list(frame.index) == ["a", "b", "e", "f"]
    assert frame.loc["a", "impression"] == "Ground-glass opacities and consolidation."
    assert frame["views"].tolist() == ["PA", "AP", "AP", "PA"] and frame["is_ap_view"].tolist() == [0, 1, 1, 0]
    assert frame.loc["a", ["Pneumonia", "COVID-19", "Bacterial Pneumonia"]].tolist() == [1, 1, 0]
    assert frame.loc["e", ["Pneumonia", "COVID-19", "Bacterial Pneumonia"]].tolist() == [1, 0, 1]
    assert frame.loc["f", list(covid_pairs.LABELS)].isna().all()  # "Unknown" says nothing
    assert frame.loc["a", "split"] == frame.loc["b", "split"]


def test_what_is_left_out_is_named(root):
    left = reasons(prepare(root, deduplicate=True))
    assert set(left) == {"b", "c", "d"}
    assert "earlier image" in left["b"] and "no sentence" in left["c"] and "lateral" in left["d"]
    everything = prepare(root, texts_only=False, lateral=True, split_rule="test").set_index("study_id")
    assert len(everything) == 6 and not everything.attrs.get("excluded") and set(everything["split"]) == {"test"}
    assert everything.loc["d", "views"] == "LATERAL" and np.isnan(everything.loc["d", "is_ap_view"])
    assert np.isnan(everything.loc["d", "is_male"]) and everything.loc["c", "impression"] == ""


def test_masks_name_their_words(root):
    row = prepare(root).iloc[0]
    masks = {mask["label"]: mask for mask in masks_of(row)}
    assert set(masks) == {"Lung", "Ground Glass Opacity", "Consolidation", "Left Lung", "Pneumothorax"}
    words = {label: [row[s][a:b] for s, a, b in mask.get("spans", [])] for label, mask in masks.items()}
    assert words["Ground Glass Opacity"] == ["Ground-glass opacities"] and words["Consolidation"] == ["consolidation"]
    assert words["Pneumothorax"] == [] and masks["Left Lung"]["side"] == "left"
    assert json.loads(row["boxes"]) == [{"label": "Right Lung", "image": 0, "xywh": [1, 2, 3, 4]}]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("view", "oblique", "row 3: 'oblique'"),
        ("id", "a", "row 3: 'a'"),
        ("patient", "", "every image its patient"),
        ("sex", "X", "row 3: 'X'"),
        ("lesion_masks", "[1", "row 3: boxes or masks"),
        ("path", "images/none.jpg", "no such image file"),
    ],
)
def test_bad_cells_are_named(root, column, value, message):
    change(root, 1, column, value)
    with pytest.raises(ManifestError, match=message):
        prepare(root)


def test_bad_options(root, tmp_path):
    with pytest.raises(ValueError, match="split_rule"):
        prepare(root, split_rule="published")


def test_prompts_know_every_label():
    assert set(load_prompts("covid_pairs").classes) == set(covid_pairs.LABELS)


def test_the_real_collection(tmp_path):
    root = real_folder("covid_pairs")
    frame = prepared_twice(prepare, root, tmp_path, lateral=True)
    assert len(frame) == 338 and frame["patient_id"].nunique() == 182
    assert set(frame["split"]) == {"train", "valid", "test"}
    distinct = prepare(root, lateral=True, deduplicate=True)
    assert 270 < len(distinct) <= 275  # 275 texts as they are written; fewer by their words
    everything = prepare(root, lateral=True, texts_only=False)
    labels = [[mask["label"] for mask in masks_of(row)] for row in everything.to_dict("records")]
    assert sum("Lung" in row for row in labels) == 181
    assert sum("Ground Glass Opacity" in row for row in labels) == 36
    for row in everything[everything["masks"] != ""].head(30).to_dict("records"):
        size = Image.open(root / row["images"]).size
        assert all(Image.open(root / mask["path"]).size == size for mask in masks_of(row))
