"""A part of a dataset as a folder of its own: the right files, and nothing before all of them are known to be there."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from owner_trees import write_picture

from gloria_core.data import copying
from gloria_core.data.copying import copy_studies
from gloria_core.data.manifest import ManifestError, read_manifest

MASK = json.dumps([{"label": "Edema", "image": 0, "path": "masks/p3.png"}])
IMAGES = {
    "a": "train/p1/study1/view1_frontal.jpg;train/p1/study1/view2_lateral.jpg",
    "b": "train/p1/study2/view1_frontal.jpg",
    "c": "valid/p3/study1/view1_frontal.jpg",
    "d": "valid/p4/study1/view1_frontal.jpg",
}


@pytest.fixture
def root(tmp_path):
    for number, path in enumerate(";".join(IMAGES.values()).split(";")):
        write_picture(tmp_path / "root" / path, gray=40 * number)
    write_picture(tmp_path / "root/masks/p3.png")
    return tmp_path / "root"


@pytest.fixture
def frame():
    rows = {
        "study_id": list(IMAGES),
        "patient_id": ["p1", "p1", "p3", "p4"],
        "split": ["train", "train", "test", "valid"],
        "images": list(IMAGES.values()),
        "views": ["PA;LATERAL", "AP", "PA", "PA"],
        "findings": "",
        "impression": "clear",
        "label_rank": [0.0, 0.0, 0.25, 0.5],
        "Edema": [1.0, 0.0, 1.0, -1.0],
        "boxes": "",
        "masks": ["", "", MASK, ""],
    }
    return pd.DataFrame(rows)


def listed(*names, column="study_id"):
    return pd.DataFrame({column: list(names)})


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*arguments, **options):
    with pytest.raises(ManifestError) as caught:
        copy_studies(*arguments, **options)
    return str(caught.value)


def test_files_masks_and_manifest_of_the_listed_studies_and_no_others(frame, root, tmp_path):
    copied = copy_studies(frame, root, tmp_path / "new", listed=listed("c", "a", "c"))
    assert copied["study_id"].tolist() == ["a", "c"]  # in the order of the manifest, each once
    wanted = {*IMAGES["a"].split(";"), IMAGES["c"], "masks/p3.png"}
    source = files_below(root)
    found = files_below(tmp_path / "new")
    assert set(found) == {*wanted, "manifest.csv"}
    assert all(found[name] == source[name] for name in wanted)
    read = read_manifest(tmp_path / "new/manifest.csv", root=tmp_path / "new")
    pd.testing.assert_frame_equal(read, copied)
    expected = frame[frame["study_id"].isin(["a", "c"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(copied, expected, check_dtype=False)


@pytest.mark.parametrize(
    ("column", "name", "study"),
    [
        ("images", IMAGES["a"], "a"),
        ("image", "train/p1/study1/view2_lateral.jpg", "a"),
        ("Path", f"CheXpert-v1.0-small/{IMAGES['c']}", "c"),
        ("path", f"/somewhere/CheXpert-v1.0/{IMAGES['b']}", "b"),
        ("Path", "p4/study1/view1_frontal.jpg", "d"),  # the manifest has more leading folders than the list
    ],
)
def test_paths_count_with_and_without_leading_folders(frame, root, tmp_path, column, name, study):
    copied = copy_studies(frame, root, tmp_path / "new", listed=listed(name, None, column=column))
    assert copied["study_id"].tolist() == [study]


def test_a_whole_path_is_not_taken_for_the_ending_of_another(frame, root, tmp_path):
    frame.loc[3, "images"] = "more/" + IMAGES["c"]
    write_picture(root / "more" / IMAGES["c"])
    copied = copy_studies(frame, root, tmp_path / "new", listed=listed(IMAGES["c"], column="Path"))
    assert copied["study_id"].tolist() == ["c"]


@pytest.mark.parametrize(
    ("column", "names", "text"),
    [
        ("study_id", ["a", "x", "y"], "2 of 3 names of the list are no study_id here: x, y"),
        ("Path", ["valid/p9/study1/view1_frontal.jpg"], "1 of 1 names of the list are no Path here: valid/p9"),
        ("Path", ["view1_frontal.jpg"], "name several studies: view1_frontal.jpg; give more of the path"),
        ("study_id", [], "column 'study_id' of the list is empty"),
        ("study_id", [None], "column 'study_id' of the list is empty"),
        ("Patient", ["p1"], "the list has the columns Patient; it needs one of study_id, images, Path"),
    ],
)
def test_lists_that_do_not_name_studies(frame, root, tmp_path, column, names, text):
    assert text in refused(frame, root, tmp_path / "new", listed=listed(*names, column=column))
    assert not (tmp_path / "new").exists()


def test_an_image_of_two_studies_names_neither(frame, root, tmp_path):
    frame.loc[3, "images"] = IMAGES["c"]
    text = refused(frame, root, tmp_path / "new", listed=listed(IMAGES["c"], column="Path"))
    assert "name several studies" in text and "study_id" in text


@pytest.mark.parametrize("gone", ["masks/p3.png", "valid/p3/study1/view1_frontal.jpg"])
def test_nothing_is_copied_where_a_file_is_missing(frame, root, tmp_path, gone):
    (root / gone).unlink()
    text = refused(frame, root, tmp_path / "new", listed=listed("a", "c"))
    assert f"1 of 4 files are not below {root}: {gone}" in text and not (tmp_path / "new").exists()


def test_folders_that_hold_each_other(frame, root, tmp_path):
    for target in (root, root / "new", tmp_path, root / ".." / root.name / "deep" / "new"):
        assert "hold each other" in refused(frame, root, target, listed=listed("a"))
    assert not (root / "new").exists() and not (tmp_path / "manifest.csv").exists()


def test_a_target_with_other_studies_is_left_alone(frame, root, tmp_path):
    copy_studies(frame, root, tmp_path / "new", listed=listed("a"))
    before = files_below(tmp_path / "new")
    assert "lists 1 other studies; choose a new folder" in refused(
        frame, root, tmp_path / "new", listed=listed("a", "c")
    )
    assert files_below(tmp_path / "new") == before


def test_a_copy_that_was_cut_is_completed(frame, root, tmp_path, monkeypatch):
    whole = copy_studies(frame, root, tmp_path / "whole", listed=frame)
    target = tmp_path / "new"
    real, calls = copying.shutil.copy2, []

    def breaks(source, temporary):
        calls.append(source)
        if len(calls) == 3:
            Path(temporary).write_bytes(b"half of a fi")
            raise OSError("the disk is full")
        return real(source, temporary)

    monkeypatch.setattr(copying.shutil, "copy2", breaks)
    with pytest.raises(OSError, match="disk is full"):
        copy_studies(frame, root, target, listed=frame)
    assert not (target / "manifest.csv").exists() and any(target.rglob("*.part"))
    done = {path for path in files_below(target) if not path.endswith(".part")}
    calls.clear()
    monkeypatch.setattr(copying.shutil, "copy2", lambda source, to: calls.append(source) or real(source, to))
    pd.testing.assert_frame_equal(copy_studies(frame, root, target, listed=frame), whole)
    assert files_below(target) == files_below(tmp_path / "whole")
    # what was whole has not been copied twice
    assert {path.relative_to(root).as_posix() for path in calls} == set(files_below(root)) - done


def test_a_changed_file_is_copied_again_and_an_equal_one_is_not(frame, root, tmp_path):
    copy_studies(frame, root, tmp_path / "new", listed=frame)
    write_picture(root / IMAGES["b"], gray=200)
    kept = (tmp_path / "new" / IMAGES["c"]).stat().st_ino
    copy_studies(frame, root, tmp_path / "new", listed=frame)
    assert (tmp_path / "new" / IMAGES["b"]).read_bytes() == (root / IMAGES["b"]).read_bytes()
    assert (tmp_path / "new" / IMAGES["c"]).stat().st_ino == kept
    os.truncate(tmp_path / "new" / IMAGES["c"], 10)
    copy_studies(frame, root, tmp_path / "new", listed=frame)
    assert (tmp_path / "new" / IMAGES["c"]).read_bytes() == (root / IMAGES["c"]).read_bytes()
