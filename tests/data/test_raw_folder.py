"""What the adapters share: files that are found, tables that are read, one clear message for each fault."""

import gzip
import io
import os
import zipfile

import pandas as pd
import pytest
from owner_trees import write_picture

from gloria_core.data.manifest import ManifestError
from gloria_core.data.raw_folder import (
    Column,
    RawFolder,
    Rows,
    check_boxes,
    check_cells,
    check_paths,
    draw_valid,
    finish,
    group_studies,
    manifest_frame,
    read_table,
)


def said(function, *args, **options) -> str:
    with pytest.raises(ManifestError) as caught:
        function(*args, **options)
    return str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_require_finds_alternatives_patterns_folders_and_packed_tables(tmp_path):
    for name in ("a.csv.gz", "t-2.0-x.csv", "LOWER.CSV.zip"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "images").mkdir()
    found = RawFolder(tmp_path, "Some").require({"b.csv|a.csv": "", "t-*.csv": "", "lower.csv": "", "images/": ""})
    assert [path.name for path in found] == ["a.csv.gz", "t-2.0-x.csv", "LOWER.CSV.zip", "images"]


def test_require_names_all_that_is_missing_and_what_is_there(tmp_path):
    (tmp_path / "other.txt").write_text("")
    folder = RawFolder(tmp_path, "Some")
    text = said(folder.require, {"a.csv": "labels, from there", "images/": "the images"})
    assert "a.csv: labels, from there" in text and "images/: the images" in text and "it has: other.txt" in text
    assert "is not a folder" in said(RawFolder, tmp_path / "no", "Some")
    (tmp_path / "x1.csv").write_text("")
    (tmp_path / "x2.csv").write_text("")
    assert "several files x*.csv: x1.csv, x2.csv" in said(folder.require, {"x*.csv": ""})


@pytest.mark.parametrize("name", ["boxes_2017.csv", "BOXES_2017.csv", "Boxes_2017.csv.gz", "boxes_2017.csv.zip"])
def test_optional_files_are_found(tmp_path, recwarn, name):
    (tmp_path / name).write_bytes(b"")
    assert RawFolder(tmp_path, "Some").optional("boxes_2017.csv").name == name and not recwarn.list


@pytest.mark.parametrize("name", ["boxes_2018.csv", "boxes-2017.txt", "Boxes_2017_final.xlsx"])
def test_a_table_that_is_nearly_an_optional_one_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{name} is not read.*boxes_2017.csv"):
        assert RawFolder(tmp_path, "Some").optional("boxes_2017.csv") is None


def test_existing_lists_each_folder_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png", "top.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "folder.png").mkdir()
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    asked = ["a/1.png", "a/2.png", "a/3.png", "top.png", "b/1.png", "a/folder.png", "top.png/x"]
    folder = RawFolder(tmp_path, "Some")
    assert folder.existing(asked) == folder.existing(asked) == {"a/1.png", "a/2.png", "top.png"}
    assert len(listed) == len(set(listed)) == 4


def test_places_of_images(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/2.PNG", "3.jpg"):
        write_picture(tmp_path / name)
    names = pd.Series(["1.png", "2.PNG", "4.png"], index=[5, 5, 7])
    folder = RawFolder(tmp_path, "Some")
    assert folder.first_existing(["b/" + names, "a/" + names]).tolist() == ["b/1.png", "b/2.PNG", ""]
    stems = pd.Series(["2", "3", "4"])
    assert folder.locate(stems, ["b", ""], [".png", ".jpg"]).tolist() == ["b/2.PNG", "3.jpg", ""]
    assert "image '1' occurs twice, a/1.png and b/1.png" in said(folder.locate, names.str[0], ["a", "b"], [".png"])


# --- tables ----------------------------------------------------------------------------------------------------------

TEXT = "Id,Note,Follow-up #\n007,Épanchement à gauche,3\n8,NA,\n"


def zipped(content: bytes, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-le"),
        gzip.compress(TEXT.encode()),
        zipped(TEXT.encode(), "t.csv", "__MACOSX/._t.csv"),
        TEXT.replace(",", ";").encode(),
        TEXT.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
        TEXT.replace("Id,Note,Follow-up #", '" ID" ,note,FOLLOW-UP#').encode(),
    ],
    ids=["utf-8", "mark", "utf-16", "no_mark", "gzip", "zip", "semicolons", "excel_unicode", "header"],
)
def test_one_reader_for_every_table(tmp_path, recwarn, content):
    (tmp_path / "t.csv").write_bytes(content)
    table = read_table(tmp_path / "t.csv", {"Id": "id", "Note": "note"}, optional={"Follow-up #": "next", "Sex": "sex"})
    assert table.to_dict("list") == {
        "id": ["007", "8"],
        "note": ["Épanchement à gauche", "NA"],
        "next": ["3", ""],
        "sex": ["", ""],
    }
    assert not recwarn.list


def test_windows_1252_is_read_with_a_warning(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(("Id,Note\n" + "1,plain\n" * 50_000 + "2,Épanchement\n").encode("cp1252"))
    with pytest.warns(UserWarning, match=r"t.csv is not UTF-8"):
        assert read_table(path, {"Note": "note"})["note"].iloc[-1] == "Épanchement"
    path.write_bytes(b"Id,Note\n1,\x81\xff\n")
    assert "save it as UTF-8" in said(read_table, path, {"Note": "note"})


def test_unreadable_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Id,ID\n1,2\n")
    assert "has 'Id' and 'ID'" in said(read_table, path, {"id": "id"})
    text = said(read_table, path, {"Ids": "id"})
    assert "t.csv: row 1 (the header) lacks column 'Ids'. Did you mean 'Id'?" in text
    path.write_text("Id,Note\n1,clear, no effusion\n")
    assert "t.csv: rows have more cells than row 1 (the header); put texts" in said(read_table, path, {"Id": "id"})
    path.write_text("Id\n")
    assert "no rows" in said(read_table, path, {"Id": "id"})
    path.write_bytes(gzip.compress(b"Id\n1\n" * 1000)[:-20])
    assert "cannot be read as a table" in said(read_table, path, {"Id": "id"})
    path.write_bytes(zipped(b"", "[Content_Types].xml", "xl/workbook.xml"))
    assert "an Excel workbook; save it as CSV" in said(read_table, path, {"Id": "id"})
    path.write_bytes(zipped(b"Id\n1\n", "a.csv", "b.csv"))
    assert "holds 2 files (a.csv, b.csv), not one table" in said(read_table, path, {"Id": "id"})


@pytest.mark.parametrize(
    ("rule", "cells", "message"),
    [
        ({"values": {"yes": 1.0, "": 0.0}}, ["yes", "no"], "'C': 1 bad value (row 3: 'no'); allowed are: yes, blank"),
        (
            {"pattern": r"\d+", "remedy": "a number"},
            ["1", "1a", "x"],
            "2 bad values (row 3: '1a', row 4: 'x'); a number",
        ),
        ({"unique": True}, ["a", "b", "a"], "1 bad value (row 4: 'a'); it occurs twice"),
        ({"filled": True}, ["a", " "], "1 bad value (row 3: ' '); fill in the cell"),
        ({"path": True}, ["a/b.png", "../c.png"], "row 3, column 'C': path '../c.png' escapes"),
    ],
)
def test_rules_of_columns(tmp_path, rule, cells, message):
    path = tmp_path / "t.csv"
    path.write_text("C,D\n" + "".join(f"{cell},x\n" for cell in cells))
    text = said(read_table, path, {"C": Column("c", **rule)})
    assert "t.csv" in text and message in text
    path.write_text(f"C,D\n{cells[0]},x\n")
    assert read_table(path, {"C": Column("c", **rule)})["c"].tolist() == [rule.get("values", {}).get("yes", cells[0])]


@pytest.mark.parametrize(
    "bad", ["../x.png", "a/../../x.png", "/x.png", "a//x.png", "a\\x.png", "a;b.png", "", " a", "a/./b"]
)
def test_paths(bad):
    assert "row 3" in said(check_paths, "f", "P", pd.Series(["a/b.png", bad]))
    check_paths("f", "P", pd.Series(["a/b..c.png", "a/...png"]))


def test_boxes_are_numbers_where_they_are_marked():
    table = pd.DataFrame({"x": ["0", ""], "w": ["2.5", ""]})
    names = {"left": "x", "width": "w"}
    assert check_boxes("f", table, names, marked=[True, False])["w"].iloc[0] == 2.5
    assert "column 'left': 1 bad value (row 3: '')" in said(check_boxes, "f", table, names)
    assert "column 'width': 1 bad value (row 2: '0')" in said(check_boxes, "f", table[:1].assign(w="0"), names)
    assert "column 'width'" in said(check_boxes, "f", table[:1].assign(w="inf"), names)
    assert "column 'left'" in said(check_boxes, "f", table[:1], names, marked=[False])
    assert "2 bad values (row 2: 1, row 4: 3); mend" in said(
        check_cells, "f", "C", pd.Series([1, 2, 3]), [False, True, False], "mend"
    )


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_are_left_out_are_listed_or_raise():
    table = pd.DataFrame({"study_id": list("abcd"), "file": ["a.png", "b.png", "c.png", "d.png"]})

    def rows() -> Rows:
        return Rows(table, source="t.csv", cell=("File", "file"))

    kept = rows()
    kept.exclude(table["study_id"] == "d", "not wanted")
    kept.exclude_missing([True, False, True], None)
    kept.exclude_missing([True, False], "exclude", reason="no report")
    assert kept.table["study_id"].tolist() == ["a"]
    assert [(f.study_id, f.row, f.column, f.value) for f in kept.failures] == [
        ("d", 5, "File", "'d.png'"),
        ("b", 3, "File", "'b.png'"),
        ("c", 4, "File", "'c.png'"),
    ]
    waiting = rows()
    waiting.exclude_missing([False, True, True, True], None)
    text = said(waiting.exclude_missing, [True, False, True], "raise", reason="no report")
    assert "t.csv" in text and "2 problems" in text and "on_error='exclude'" in text
    assert "nothing is left" in said(rows().exclude_missing, False, "exclude")
    kept.exclude(True, "not wanted")
    assert "4 rows left out); use another view" in said(kept.check_rest, "use another view")


IMAGES = pd.DataFrame(
    {
        "study_id": ["s2", "s1", "s1", "s1"],
        "patient_id": ["q", "p", "p", "p"],
        "images": ["d.png", "a.png", "c.png", "b.png"],
        "view": ["AP", "LATERAL", "PA", "AP"],
        "meta_age": [4, 1, 3, 2],
    }
)


@pytest.mark.parametrize(
    ("rule", "kept", "unseen"),
    [("PA", [2], ["s2"]), ("frontal", [0, 2, 3], []), ("lateral", [1], ["s2"]), ("all", [0, 1, 2, 3], [])],
)
def test_views(rule, kept, unseen):
    rows = Rows(IMAGES, source="t.csv", cell=("Image", "images"))
    rows.keep_views(rule)
    assert rows.table.index.tolist() == kept and [failure.study_id for failure in rows.failures] == unseen
    rows = Rows(IMAGES.assign(known=False), source="t.csv", cell=("Image", "images"))
    rows.keep_views(rule, known="known")
    assert len(rows.table) == (4 if rule == "all" else 0) and len(rows.failures) == (0 if rule == "all" else 2)


def test_studies_are_grouped_frontal_first():
    assert manifest_frame(group_studies(IMAGES)).drop(columns=["findings", "impression"]).to_dict("list") == {
        "study_id": ["s1", "s2"],
        "patient_id": ["p", "q"],
        "images": ["b.png;c.png;a.png", "d.png"],
        "views": ["AP;PA;LATERAL", "AP"],
        "boxes": ["", ""],
        "masks": ["", ""],
        "meta_age": [2, 4],
    }
    assert group_studies(IMAGES[:1])["images"].tolist() == ["d.png"]


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_valid_is_drawn_from_train_alone():
    """Also where the index repeats, as that of joined tables does."""
    studies = [f"s{i}" for i in range(40)]
    frame = pd.DataFrame({"study_id": studies, "patient_id": studies, "split": "train"}, index=[*range(20)] * 2)
    frame["split"] = ["test"] * 8 + ["train"] * 32
    drawn = draw_valid(frame, seed=0)["split"]
    assert drawn.value_counts().to_dict() == {"train": 28, "test": 8, "valid": 4} and set(drawn.iloc[:8]) == {"test"}
    assert draw_valid(frame[:8], seed=0)["split"].tolist() == ["test"] * 8


def test_finish_checks_and_reports():
    table = pd.DataFrame({"study_id": ["a", "b"], "split": ["train", "test"], "images": ["x", "y"], "Edema": 1.0})
    rows = Rows(table, source="f", cell=("Image", "images"))
    done = finish(None, rows, ["Edema"], seed=0, leaks={"patients": 0})
    assert done.attrs == {"excluded": [], "leaks": {"patients": 0}} and done["label_rank"].between(0, 1).all()
    assert done["patient_id"].tolist() == ["a", "b"] and set(done["views"]) == {"FRONTAL"}
    rows.table = table.assign(patient_id="p")
    assert "patient in two splits" in said(finish, None, rows, ["Edema"], seed=0)
