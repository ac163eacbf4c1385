"""`prepare`: the phantom as files and manifest."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from owner_trees import adapter
from PIL import Image

from gloria_core import phantom
from gloria_core.data.manifest import boxes_of, masks_of, read_manifest, split_cell, write_manifest

prepare = adapter("phantom")
PATIENTS, SEED = 18, 2


def make(root: Path, **changes) -> pd.DataFrame:
    return prepare(
        root, **{"n_patients": PATIENTS, "size": 64, "seed": SEED, "workers": 1, "progress": False, **changes}
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    root = tmp_path_factory.mktemp("phantom")
    return root, make(root, lateral=True)


def tree(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_manifest_survives_writing_and_reading(prepared, tmp_path):
    root, frame = prepared
    write_manifest(frame, tmp_path / "manifest.csv")
    again = read_manifest(tmp_path / "manifest.csv", root=root)
    pd.testing.assert_frame_equal(frame, again)


def test_rows_are_the_studies(prepared):
    root, frame = prepared
    expected = [f"p{p.patient:05d}_s{k}" for p in phantom.patients(SEED, PATIENTS) for k in range(1, p.studies + 1)]
    assert list(frame["study_id"]) == expected
    row = frame.iloc[3]
    study = phantom.study(SEED, int(row["patient_id"][1:]), int(row["study_id"][-1]), size=64, views=phantom.VIEWS)
    assert row["impression"] == study.impression
    for path, view in zip(split_cell(row["images"]), phantom.VIEWS, strict=True):
        assert np.array_equal(np.asarray(Image.open(root / path)), study.images[view])
    for label, value in study.labels.items():
        assert row[label] == value or (np.isnan(row[label]) and np.isnan(value))
    assert split_cell(row["views"]) == [study.projection, "LATERAL"]


def test_masks_boxes_and_spans_come_back(prepared):
    root, frame = prepared
    count = 0
    for _, row in frame.iterrows():
        number = int(row["study_id"][-1])
        study = phantom.study(SEED, int(row["patient_id"][1:]), number, size=64, views=phantom.VIEWS)
        masks, boxes = masks_of(row), boxes_of(row)
        assert len(masks) == len(boxes) == len(study.regions)
        for mask, box, region in zip(masks, boxes, study.regions, strict=True):
            image = Image.open(root / mask["path"])
            assert image.mode == "1"
            assert np.array_equal(np.asarray(image), region.mask)
            assert (mask["label"], mask["side"], mask["image"]) == (
                region.label,
                region.side,
                phantom.VIEWS.index(region.view),
            )
            assert tuple(box["xywh"]) == region.box
            for section, start, end in mask["spans"]:
                assert row[section][start:end] == study.text((section, start, end))
            count += 1
    assert count > 20


def test_splits_are_disjoint_in_patients(prepared):
    _, frame = prepared
    assert (frame.groupby("patient_id")["split"].nunique() == 1).all()
    assert frame["label_rank"].between(0, 1, inclusive="left").all()


def test_workers_do_not_matter(tmp_path):
    """18 patients are two batches, so two processes really share the work."""
    one, two = make(tmp_path / "one", workers=1), make(tmp_path / "two", workers=2)
    pd.testing.assert_frame_equal(one, two)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_killed_run_is_completed(tmp_path):
    """Missing images, cut records and left-over temporary files are repaired; finished patients are left alone."""
    whole = make(tmp_path, n_patients=4)
    before = tree(tmp_path)
    kept = sorted((tmp_path / "images").glob("p00003*.png"))[0]
    stamp = kept.stat().st_mtime_ns
    sorted((tmp_path / "images").glob("p00000*.png"))[0].unlink()
    record = tmp_path / "records" / "p00001.json"
    record.write_text(record.read_text()[:40])
    (tmp_path / "records" / "p00002.json").unlink()
    (tmp_path / "images" / ".p00001_s1_frontal.png.77.tmp").write_bytes(b"half a file")
    again = make(tmp_path, n_patients=4)
    pd.testing.assert_frame_equal(whole, again)
    assert tree(tmp_path) == before
    assert kept.stat().st_mtime_ns == stamp


def test_other_arguments_redraw(tmp_path):
    make(tmp_path, n_patients=2)
    frame = make(tmp_path, n_patients=2, size=72)
    image = Image.open(tmp_path / split_cell(frame["images"].iloc[0])[0])
    assert image.size == (72, 72)
    assert json.loads((tmp_path / "records" / "p00000.json").read_text())["rows"]


@pytest.mark.parametrize("changes", [{"n_patients": 0}, {"workers": 0}, {"size": 32}])
def test_bad_arguments_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match="greater than"):
        make(tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()
