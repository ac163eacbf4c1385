"""Your own CSV: column mappings, patients from paths, splits, labels, and the messages of what is wrong."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from owner_trees import adapter, prepared_twice, refusal, write_picture, write_rows

from gloria_core.data.sources import prepare as prepare_any

prepare = adapter("own_csv")

HEADER = "file;person;report;Effusion;Tube in place;meta_scanner"
OPTIONS = {
    "columns": {"image": "file", "patient": "person", "impression": "report"},
    "labels": {"Effusion": "Effusion", "Tube": "Tube in place"},
    "separator": ";",
}


def make(root: Path, n: int = 20) -> list[str]:
    rows = []
    for i in range(n):
        write_picture(root / f"p{i // 2}/s{i}.png")
        rows.append(f"p{i // 2}/s{i}.png;{i // 2:03d}; Text {i}. ;{(1, 0, -1, '')[i % 4]};{('yes', 'No')[i % 2]};X{i}")
    write(root, rows, HEADER)
    return rows


def write(root: Path, rows: list[str], header: str) -> None:
    write_rows(root / "studies.csv", header, rows)


def test_columns_and_labels_by_name(tmp_path):
    make(tmp_path / "root")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = prepared_twice(prepare, tmp_path / "root", tmp_path, **OPTIONS).set_index("study_id")
    assert (
        len(frame) == 20 and frame["patient_id"].nunique() == 10 and set(frame["split"]) == {"train", "valid", "test"}
    )
    row = frame.loc["p1/s2.png"]
    assert list(row[["patient_id", "impression", "views", "meta_scanner", "Tube"]]) == [
        "001",
        "Text 2.",
        "FRONTAL",
        "X2",
        1,
    ]
    assert frame["Effusion"].iloc[:3].tolist() == [1, 0, -1] and np.isnan(frame["Effusion"].iloc[3])


def test_columns_of_the_manifests_own_names_need_no_mapping(tmp_path):
    root = tmp_path / "root"
    for name in ("a", "b", "c"):
        write_picture(root / f"{name}.png")
        write_picture(root / f"{name}_side.png")
    rows = [f"s{name},q{name},{split},{name}.png;{name}_side.png,PA;LATERAL,Seen." for name, split in
            (("a", "Train"), ("b", "val"), ("c", "testing"))]  # fmt: skip
    write(root, rows, "study,patient,split,image,view,findings")
    frame = prepared_twice(prepare, root, tmp_path)
    assert frame["split"].tolist() == ["train", "valid", "test"] and frame["views"].tolist() == ["PA;LATERAL"] * 3
    assert frame["study_id"].tolist() == ["sa", "sb", "sc"] and frame["findings"].tolist() == ["Seen."] * 3


def test_a_table_as_a_spreadsheet_saves_it(tmp_path):
    """Capitals in the header, semicolons, Windows-1252 or UTF-16."""
    for name in ("a", "b"):
        write_picture(tmp_path / f"{name}.png")
    text = "Image;PATIENT;Split;Impression\na.png;p;train;Épanchement\nb.png;q;test;Rien\n"
    for encoding in ("utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "studies.csv").write_bytes(text.encode(encoding))
        with warnings.catch_warnings():
            warnings.simplefilter("error" if encoding != "cp1252" else "ignore")
            frame = prepare(tmp_path)
        assert frame["impression"].tolist() == ["Épanchement", "Rien"] and frame["patient_id"].tolist() == ["p", "q"]
        assert frame["split"].tolist() == ["train", "test"]
    (tmp_path / "studies.csv").write_bytes((text + "a.png;r;test;Séquelles\n").encode("cp1252"))
    with pytest.warns(UserWarning, match="not UTF-8"):
        assert "read as Windows-1252" in refusal(prepare, tmp_path)


def test_patients_from_paths_or_a_warning(tmp_path):
    make(tmp_path)
    options = {"columns": {"image": "file"}, "separator": ";"}
    frame = prepare(tmp_path, **options, patient_pattern="(p[0-9]+)/")
    assert frame["patient_id"].nunique() == 10
    with pytest.warns(UserWarning, match="no column says the patient"):
        assert prepare(tmp_path, **options)["patient_id"].nunique() == 20
    assert "finds no patient" in refusal(prepare, tmp_path, **options, patient_pattern="(q[0-9]+)/")
    with pytest.raises(ValueError, match="needs a group"):
        prepare(tmp_path, **options, patient_pattern="p[0-9]+")


def test_paths_below_the_root_may_be_written_whole(tmp_path):
    write_picture(tmp_path / "a.png")
    write(tmp_path, [f"{tmp_path}/a.png,p"], "image,patient")
    assert prepare(tmp_path, fractions={"train": 1.0})["images"].tolist() == ["a.png"]
    write(tmp_path, ["/elsewhere/a.png,p"], "image,patient")
    assert "is absolute" in refusal(prepare, tmp_path)


BAD = {
    "column": (HEADER.replace("report", "reports"), None, "Did you mean 'reports'"),
    "label": (HEADER, "p0/s0.png;0;;maybe;1;", "column 'Effusion'"),
    "outside": (HEADER, "../s0.png;0;;1;1;", "escapes the root"),
    "empty_patient": (HEADER, "p0/s0.png; ;;1;1;", "every study its patient"),
    "empty_path": (HEADER, ";0;;1;1;", "is empty"),
    "missing": (HEADER, "p0/none.png;0;;1;1;", "no such image file"),
    "twice": (HEADER, "p0/s1.png;0;;1;1;", "duplicate study_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path, case):
    rows, (header, first, expected) = make(tmp_path), BAD[case]
    write(tmp_path, [first or rows[0], *rows[1:]], header)
    assert expected in refusal(prepare, tmp_path, **OPTIONS) and "studies.csv" in refusal(prepare, tmp_path, **OPTIONS)


def test_other_refusals(tmp_path):
    assert "lacks" in refusal(prepare, tmp_path)
    make(tmp_path)
    assert "mine.csv" in refusal(prepare, tmp_path, table="mine.csv")
    assert "cannot be called 'boxes'" in refusal(prepare, tmp_path, **{**OPTIONS, "labels": {"boxes": "Effusion"}})
    with pytest.raises(ValueError, match=r"columns.picture"):
        prepare(tmp_path, columns={"picture": "file"})
    with pytest.raises(TypeError, match="no option 'label'"):
        prepare_any("own_csv", tmp_path, {"label": []})
    write(tmp_path, ["p0/s0.png,x,dev", "p0/s1.png,x,train"], "image,patient,split")
    assert "patient in two splits" in refusal(prepare, tmp_path)
    write(tmp_path, ["p0/s0.png,x,later"], "image,patient,split")
    assert "column 'split'" in refusal(prepare, tmp_path)
