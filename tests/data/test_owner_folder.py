"""What an adapter asks of its owner's folder: one clear message for each thing that is wrong."""

import gzip
import zipfile

import pandas as pd
import pytest

from gloria_core.data.manifest import ManifestError
from gloria_core.data.raw_folder import (
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    existing,
    finish,
    group_studies,
    open_zip,
    patient_leaks,
    read_member,
    read_table,
    require,
    settle,
    unseen_studies,
    wanted_views,
)


def said(function, *args, **options) -> str:
    with pytest.raises(ManifestError) as caught:
        function(*args, **options)
    return str(caught.value)


def test_require_finds_alternatives_patterns_and_folders(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(b"")
    (tmp_path / "t-2.0-x.csv").write_text("")
    (tmp_path / "images").mkdir()
    found = require(tmp_path, {"a.csv|a.csv.gz": "", "t-*.csv": "", "images/": ""}, "Some")
    assert [path.name for path in found.values()] == ["a.csv.gz", "t-2.0-x.csv", "images"]


def test_require_names_all_that_is_missing_and_what_is_there(tmp_path):
    (tmp_path / "other.txt").write_text("")
    text = said(require, tmp_path, {"a.csv": "labels, from there", "images/": "the images"}, "Some")
    assert "a.csv: labels, from there" in text and "images/: the images" in text and "it has: other.txt" in text
    assert "is not a folder" in said(require, tmp_path / "no", {"a.csv": ""}, "Some")
    (tmp_path / "x1.csv").write_text("")
    (tmp_path / "x2.csv").write_text("")
    assert "several files x*.csv: x1.csv, x2.csv" in said(require, tmp_path, {"x*.csv": ""}, "Some")


def test_read_table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfId,Age,Note\n007,,NA\n8,5,\n")
    table = read_table(path, {"Id": "id"}, optional={"Note": "note", "Sex": "sex"})
    assert table.to_dict("list") == {"id": ["007", "8"], "note": ["NA", ""], "sex": ["", ""]}
    text = said(read_table, path, ["Ids"])
    assert "t.csv" in text and "lacks column 'Ids'" in text and "is it 'Id' now" in text
    path.write_text("Id\n")
    assert "no rows" in said(read_table, path, ["Id"])
    packed = tmp_path / "t.csv.gz"
    packed.write_bytes(gzip.compress(b"Id\n1\n" * 1000)[:-20])
    assert "cannot be read as a table" in said(read_table, packed, ["Id"])


def test_cells_and_ids():
    values = pd.Series(["a", "b", "a"])
    assert "column 'C': 2 bad values (row 2: 'a', row 4: 'a'); mend it" in said(
        check_cells, "f", "C", values, values == "b", "mend it"
    )
    assert "1 bad value (row 4: 'a')" in said(check_unique, "f", "C", values)
    check_unique("f", "C", values[:2])


@pytest.mark.parametrize(
    "bad", ["../x.png", "a/../../x.png", "/x.png", "a//x.png", "a\\x.png", "a;b.png", "", " a", "a/./b"]
)
def test_paths(bad):
    assert "row 3" in said(check_paths, "f", "P", pd.Series(["a/b.png", bad]))
    check_paths("f", "P", pd.Series(["a/b..c.png", "a/...png"]))


def test_existing_lists_each_folder_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png", "top.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "folder.png").mkdir()
    import os

    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    asked = ["a/1.png", "a/2.png", "a/3.png", "top.png", "b/1.png", "a/folder.png", "top.png/x"]
    assert existing(tmp_path, asked) == {"a/1.png", "a/2.png", "top.png"}
    assert len(listed) == len(set(listed)) == 4


def test_zip_truncated_damaged_or_none(tmp_path):
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "words " * 100)
    whole = path.read_bytes()
    with open_zip(path) as archive:
        assert read_member(archive, "a.txt") == b"words " * 100
        assert "'b.txt' cannot be read" in said(read_member, archive, "b.txt")
    path.write_bytes(whole.replace(b"words words", b"wordz words", 1))
    with open_zip(path) as archive:
        assert "'a.txt' cannot be read" in said(read_member, archive, "a.txt")
    for content in (whole[:300], b"", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(ManifestError, match=f"{len(content)} bytes.*repeat it"), open_zip(path):
            pass


def test_absent_and_settle():
    table = pd.DataFrame({"study": ["a", "b"], "path": ["x", "y"]}, index=[4, 9])
    failures = absent(table, [True, False], key="study", value="path", column="Path")
    assert [(f.study_id, f.row, f.column) for f in failures] == [("b", 11, "Path")]
    assert "row 11" in said(settle, failures, source="f", on_error="raise", left=1)
    assert "nothing is left" in said(settle, failures, source="f", on_error="exclude", left=0)
    settle(failures, source="f", on_error="exclude", left=1)
    with pytest.raises(ValueError, match="on_error must be one of 'raise', 'exclude', not 'skip'"):
        check_option("on_error", "skip", ("raise", "exclude"))


def test_leaks_are_counted_by_pairs():
    assert patient_leaks(list("aabbc"), ["train", "test", "train", "train", "test"]) == {
        "patients in train and test": 1
    }
    assert patient_leaks(list("ab"), ["train", "train"]) == {}


def test_studies_are_grouped_frontal_first():
    images = pd.DataFrame(
        {
            "study": ["s2", "s1", "s1", "s1"],
            "patient": ["q", "p", "p", "p"],
            "image": ["d.png", "a.png", "c.png", "b.png"],
            "view": ["AP", "LATERAL", "PA", "AP"],
            "age": [4, 1, 3, 2],
        }
    )
    frame = group_studies(images, keep=["age"])
    assert frame.to_dict("list") == {
        "study_id": ["s1", "s2"],
        "patient_id": ["p", "q"],
        "images": ["b.png;c.png;a.png", "d.png"],
        "views": ["AP;PA;LATERAL", "AP"],
        "age": [2, 4],
    }
    single = group_studies(images[:1], keep=[])
    assert single["images"].tolist() == ["d.png"]
    kept = wanted_views(images["view"], "PA")
    assert kept.tolist() == [False, False, True, False]
    assert [f.study_id for f in unseen_studies(images, kept, column="image", reason="")] == ["s2"]
    assert wanted_views(images["view"], "frontal").tolist() == [True, False, True, True]
    assert wanted_views(images["view"], "lateral").sum() == 1 and wanted_views(images["view"], "all").all()


def test_finish_checks_and_reports():
    frame = pd.DataFrame(
        {"study_id": ["a", "b"], "patient_id": ["p", "q"], "split": ["train", "test"], "images": ["x", "y"]}
    ).assign(views="PA", Edema=1.0)
    done = finish(frame, source="f", seed=0, leaks={"patients": 0})
    assert done.attrs == {"excluded": [], "leaks": {"patients": 0}} and done["label_rank"].between(0, 1).all()
    assert "patient in two splits" in said(finish, frame.assign(patient_id="p"), source="f", seed=0)
