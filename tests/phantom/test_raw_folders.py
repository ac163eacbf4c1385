"""Simulated raw folders: each dataset's own adapter reads what is written in its owner's format."""

from __future__ import annotations

import filecmp

import pytest

from gloria_core.data.manifest import boxes_of, masks_of, read_manifest, write_manifest
from gloria_core.data.sources import available, prepare
from gloria_core.phantom.raw_folders import WRITERS, write

OPTIONS = {"chexpert": {"hold_out": ""}, "chexpert_5x200": {"per_class": 2}, "own_csv": {"labels": ["Effusion"]}}
WITH_BOXES = ("nih", "rsna_pneumonia", "rsna_sample", "vindr_cxr", "object_cxr", "ms_cxr")
WITH_MASKS = ("siim_pneumothorax", "montgomery_shenzhen", "oxford_pet", "ms_cxr", "covid_pairs")
WITH_TEXT = ("mimic_cxr", "chexpert_plus", "openi", "padchest", "covid_pairs", "ms_cxr", "own_csv", "cgmh", "nih")


def test_every_dataset_can_be_simulated():
    assert set(WRITERS) == set(available()) - {"phantom"}


@pytest.mark.parametrize("dataset", sorted(WRITERS))
def test_the_adapter_reads_the_folder(dataset, tmp_path):
    write(dataset, tmp_path / "raw", n_studies=40, size=64)
    frame = prepare(dataset, tmp_path / "raw", OPTIONS.get(dataset, {}))
    write_manifest(frame, tmp_path / "manifest.csv")
    assert len(read_manifest(tmp_path / "manifest.csv", root=tmp_path / "raw")) == len(frame) >= 10
    assert "test" in set(frame["split"])
    for column, read, names in (("boxes", boxes_of, WITH_BOXES), ("masks", masks_of, WITH_MASKS)):
        if dataset in names:
            entries = [entry for row in frame.to_dict("records") for entry in read(row)]
            assert entries and all(entry["label"] for entry in entries), column
    if dataset in WITH_TEXT:
        assert (frame["impression"] != "").mean() > 0.9


@pytest.mark.parametrize("dataset", ["mimic_cxr", "vindr_cxr", "siim_pneumothorax"])
def test_the_same_seed_writes_the_same_bytes(dataset, tmp_path):
    for name in ("a", "b"):
        write(dataset, tmp_path / name, n_studies=6, size=64, seed=3)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    same, different, missing = filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)
    assert len(same) == len(files) > 6 and not missing
    assert different == []


def test_a_folder_with_files_and_an_unknown_dataset_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="new folder"):
        write("nih", tmp_path)
    with pytest.raises(ValueError, match=r"available: .*nih"):
        write("nhi", tmp_path / "raw")
