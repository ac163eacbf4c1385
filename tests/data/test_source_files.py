"""A change of any file that a dataset was prepared from is seen, and nothing else is taken for one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from gloria_core.data import source_files
from gloria_core.data.annotations import write_mask
from gloria_core.data.sources import prepare
from gloria_core.phantom.raw_folders import write


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with tables, lists, images, masks and reports, and what is of no account."""
    root = tmp_path / "raw"
    files = (
        "table.csv",
        "boxes.CSV",
        "lists/test.txt",
        "images/a.png",
        "images/b.dcm",
        "masks/a.png",
        "reports/s1.txt",
    )
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"content {number}".encode())
    (root / ".hidden").mkdir()
    (root / "results").mkdir()
    (tmp_path / "lists.csv").write_text("Path\na.png\n")
    return root


def recorded(root: Path) -> Path:
    named = ["cgmh", 3, "", str(root / "table.csv"), str(root.parent / "lists.csv")]
    assert source_files.record(root.parent, root, named=named, skip=root / "results") == 8
    return root.parent


def later(path: Path, content: bytes) -> None:
    """Another content of the same size, a second later."""
    time = path.stat().st_mtime + 1
    path.write_bytes(content)
    os.utime(path, (time, time))


def touch(path: Path) -> None:
    later(path, path.read_bytes())


CHANGES = {
    "other pixels": (lambda root: later(root / "images/a.png", b"CONTENT 3"), "images/a.png is another"),
    "an image that was copied anew": (lambda root: touch(root / "images/b.dcm"), "images/b.dcm is another"),
    "an image less": (lambda root: (root / "images/a.png").unlink(), "images/a.png is gone"),
    "an image more": (lambda root: (root / "images/c.png").touch(), "images/c.png is new"),
    "all sexes swapped": (lambda root: later(root / "table.csv", b"CONTENT 0"), "table.csv is another"),
    "other boxes": (lambda root: (root / "boxes.CSV").write_bytes(b"more than before"), "boxes.CSV is another"),
    "another split": (lambda root: later(root / "lists/test.txt", b"CONTENT 2"), "lists/test.txt is another"),
    "another mask": (lambda root: later(root / "masks/a.png", b"CONTENT 5"), "masks/a.png is another"),
    "another list elsewhere": (lambda root: later(root.parent / "lists.csv", b"Path\nb.png\n"), "lists.csv is another"),
    "the images elsewhere": (lambda root: shutil.rmtree(root / "images"), "images/a.png is gone"),
    "a folder more": (lambda root: shutil.copytree(root / "images", root / "images_002"), "images_002/a.png is new"),
    "a link that leads nowhere": (lambda root: (root / "x.png").symlink_to("nothing"), "x.png is new"),
}
NO_CHANGES = {
    "nothing": lambda root: None,
    "a table is touched": lambda root: touch(root / "table.csv"),
    "a report is copied": lambda root: touch(root / "reports/s1.txt"),
    "a hidden file": lambda root: (root / ".hidden/x").touch(),
    "results inside": lambda root: (root / "results/metrics.csv").touch(),
    "masks that are drawn": lambda root: write_mask(root, "drawn/a.png", lambda: np.eye(3, dtype=bool)),
    "a link to a folder": lambda root: (root / "images/up").symlink_to(root / "masks"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(root, name):
    folder = recorded(root)
    change, message = CHANGES[name]
    change(root)
    assert any(line.endswith(message) for line in source_files.changes(folder, root, skip=root / "results"))


def test_a_renamed_report_is_two_changes(root):
    folder = recorded(root)
    (root / "reports/s1.txt").rename(root / "reports/s2.txt")
    changes = source_files.changes(folder, root, skip=root / "results")
    assert changes == [f"{root}/reports/s2.txt is new", f"{root}/reports/s1.txt is gone"]


@pytest.mark.parametrize("name", NO_CHANGES)
def test_what_is_no_change(root, name):
    folder = recorded(root)
    NO_CHANGES[name](root)
    assert source_files.changes(folder, root, skip=root / "results") == []


def test_a_moved_folder_is_the_same_one(root):
    folder = recorded(root)
    elsewhere = shutil.move(root, root.with_name("elsewhere"))
    assert source_files.changes(folder, Path(elsewhere), skip=Path(elsewhere) / "results") == []
    assert "table.csv is gone" in "".join(source_files.changes(folder, root, skip=root / "results"))
    (folder / source_files.NAME).write_bytes(b"cut")
    assert source_files.changes(folder, Path(elsewhere), skip=root)[0].endswith("cannot be read")


def test_drawn_masks_follow_their_table(tmp_path):
    """They were drawn from the table of another day; now they are drawn again, and no change of the folder."""
    write("object_cxr", tmp_path / "raw", n_studies=40, size=64)
    frame = prepare("object_cxr", tmp_path / "raw", {"masks": True})
    source_files.record(tmp_path, tmp_path / "raw", skip=tmp_path)
    masks = sorted((tmp_path / "raw").glob("masks_object_cxr/*.png"))
    drawn = [path.read_bytes() for path in masks]
    masks[0].write_bytes(b"of an older table")
    again = prepare("object_cxr", tmp_path / "raw", {"masks": True})
    pd.testing.assert_frame_equal(frame, again)
    assert [path.read_bytes() for path in masks] == drawn
    assert source_files.changes(tmp_path, tmp_path / "raw", skip=tmp_path) == []
