"""Every way a manifest can be wrong, by name; and that a right one comes back unchanged."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from gloria_core.data.files import file_hash
from gloria_core.data.manifest import (
    FIXED,
    ManifestError,
    boxes_of,
    finding_columns,
    label_columns,
    masks_of,
    read_manifest,
    validate,
    write_manifest,
)
from gloria_core.data.splits import ids_by_split


def make_frame(n: int = 6) -> pd.DataFrame:
    """n studies, two a patient, patient ids with leading zeros, one of each kind of label."""
    patients = [i // 2 for i in range(n)]
    return pd.DataFrame(
        {
            "study_id": [f"s{i:03d}" for i in range(n)],
            "patient_id": [f"{p:05d}" for p in patients],
            "split": [("train", "valid", "test")[p % 3] for p in patients],
            "images": [f"images/{i}.png" for i in range(n)],
            "views": ["PA"] * n,
            "findings": ["The heart is normal."] * n,
            "impression": ["No edema."] * n,
            "label_rank": [round(p / n, 6) for p in patients],
            "Edema": [(1.0, 0.0, -1.0, np.nan)[i % 4] for i in range(n)],
            "is_male": [float(i % 2) for i in range(n)],
            "boxes": [""] * n,
            "masks": [""] * n,
            "meta_age": ["57"] * n,
        }
    )


def problem(frame: pd.DataFrame) -> str:
    with pytest.raises(ManifestError) as caught:
        validate(frame, source="my.csv")
    return str(caught.value)


def changed(column: str, row: int, value: object, n: int = 6) -> pd.DataFrame:
    frame = make_frame(n)
    frame[column] = frame[column].astype(object)
    frame.loc[row, column] = value
    return frame


def make_files(frame: pd.DataFrame, root) -> None:
    for cell in frame["images"]:
        for path in cell.split(";"):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"x")


# --- a good manifest -------------------------------------------------------------------------------------------------


def test_round_trip_keeps_strings_and_bytes(tmp_path):
    frame = make_frame()
    frame.loc[0, "findings"] = 'Quote " comma , line\nbreak; semicolon, µ — é'
    frame.loc[1, "findings"] = "carriage\r\nreturn  "
    frame.loc[2, "impression"] = "NA"
    frame.loc[3, "impression"] = ""
    first = write_manifest(frame, tmp_path / "a.csv")
    back = read_manifest(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(back, validate(frame, source="x"), check_dtype=True)
    assert list(back["patient_id"][:2]) == ["00000", "00000"]
    assert back["impression"][2] == "NA" and back["impression"][3] == ""
    assert np.isnan(back["Edema"][3]) and back["Edema"][2] == -1
    second = write_manifest(back, tmp_path / "b.csv")
    assert first == second == file_hash(tmp_path / "b.csv") and len(first) == 16
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_bytes_are_fixed(tmp_path):
    """The very bytes, so that a hash written down today is the hash of tomorrow's machine."""
    frame = make_frame(2)
    frame["meta_age"] = [57.0, 3.25]
    frame["label_rank"] = [0.1 + 0.2, 0.1 + 0.2]
    write_manifest(frame, tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == (
        b"study_id,patient_id,split,images,views,findings,impression,label_rank,Edema,is_male,boxes,masks,meta_age\n"
        b"s000,00000,train,images/0.png,PA,The heart is normal.,No edema.,0.30000000000000004,1,0,,,57\n"
        b"s001,00000,train,images/1.png,PA,The heart is normal.,No edema.,0.30000000000000004,0,1,,,3.25\n"
    )


def test_columns_come_in_canonical_order_from_any_order(tmp_path):
    frame = make_frame()
    shuffled = frame[frame.columns[::-1]]
    assert list(validate(shuffled, source="x").columns) == [
        *FIXED[:8],
        "is_male",
        "Edema",
        "boxes",
        "masks",
        "meta_age",
    ]
    assert label_columns(frame) == ["Edema", "is_male"] and finding_columns(frame) == ["Edema"]


def test_excel_byte_order_mark_is_read(tmp_path):
    write_manifest(make_frame(), tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "m.csv").read_bytes())
    assert read_manifest(tmp_path / "m.csv").columns[0] == "study_id"


def test_validate_does_not_change_its_argument():
    frame = make_frame()
    before = frame.copy(deep=True)
    checked = validate(frame, source="x")
    checked.loc[0, "Edema"] = 0
    pd.testing.assert_frame_equal(frame, before)


def test_several_images_and_views_are_fine():
    frame = changed("images", 1, "a/1.png;a/2.png")
    frame.loc[1, "views"] = "PA;LATERAL"
    assert len(validate(frame, source="x")) == 6


def frame_of(*rows: tuple[str, str, str]) -> pd.DataFrame:
    """Studies of (patient, split, images)."""
    frame = make_frame(len(rows))
    frame["patient_id"], frame["split"], frame["images"] = zip(*rows, strict=True)
    frame["views"] = [";".join(["PA"] * len(cell.split(";"))) for cell in frame["images"]]
    return frame.assign(label_rank=0.0)


def test_an_image_may_be_in_two_splits_where_its_patient_has_an_id_per_split():
    ids = ids_by_split(pd.Series(["x", "y", "x"]), ["train", "valid", "test"]).tolist()
    assert ids == ["x (train)", "y", "x (test)"]
    rows = [(ids[0], "train", "x.png;only.png"), (ids[1], "valid", "y.png"), (ids[2], "test", "x.png")]
    validate(frame_of(*rows, (ids[0], "train", "x.png")), source="my.csv")


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        ([("x", "train", "x.png"), ("y", "test", "x.png")], 3),
        ([("x (train)", "train", "x.png"), ("x", "test", "x.png")], 3),
        ([("x (train)", "train", "x.png"), ("y (test)", "test", "x.png")], 3),  # two people
        ([("x (train)", "train", "x.png"), ("x (valid)", "test", "x.png")], 3),  # the mark of another split
        # a study of the first row's split that is not marked: it shares the image with the test set
        ([("x (train)", "train", "x.png"), ("x (test)", "test", "x.png"), ("z", "train", "x.png")], 3),
        ([("x (train)", "train", "x.png;z.png"), ("x (test)", "test", "x.png"), ("z", "valid", "z.png")], 4),
    ],
)
def test_otherwise_an_image_is_in_one_split(rows, bad):
    text = problem(frame_of(*rows))
    assert text.startswith("my.csv: 1 problem") and f"row {bad} " in text and "image is in two splits" in text


def test_boxes_and_masks_of_a_row():
    boxes = [{"label": "Edema", "image": 0, "xywh": [1, 2, 3.5, 4]}]
    masks = [{"label": "Edema", "image": 0, "path": "masks/1.png", "side": "left", "spans": [["impression", 0, 2]]}]
    frame = changed("boxes", 1, json.dumps(boxes))
    frame["masks"] = ["", json.dumps(masks), "", "", "", ""]
    good = validate(frame, source="x")
    assert boxes_of(good.iloc[1]) == boxes and masks_of(good.iloc[1]) == masks and boxes_of(good.iloc[0]) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_manifest(make_frame(), tmp_path / "m.csv")
    before = (tmp_path / "m.csv").read_bytes()
    with pytest.raises(ManifestError):
        write_manifest(changed("split", 0, "dev"), tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# --- bad input, by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", FIXED)
def test_missing_column(column):
    message = problem(make_frame().drop(columns=column))
    assert "my.csv" in message and repr(column) in message and "row 1" in message and "add it" in message


CASES = {
    "duplicate_study": ("study_id", 3, "s001", ["row 5", "'s001'", "duplicate study_id", "first seen in row 3"]),
    "patient_in_two_splits": ("split", 3, "train", ["row 5", "patient in two splits", "'00001'", "row 4"]),
    "unknown_split": ("split", 0, "val", ["row 2", "'val'", "'train', 'valid' or 'test'", "rename it"]),
    "label_two": ("Edema", 2, 2.0, ["row 4", "'Edema'", "2.0", "blank"]),
    "label_text": ("Edema", 2, "yes", ["row 4", "'Edema'", "'yes'", "meta_<name>"]),
    "label_half": ("is_male", 5, 0.5, ["row 7", "'is_male'", "0.5"]),
    "rank_one": ("label_rank", 0, 1.0, ["row 2", "'label_rank'", "1.0", "[0, 1)"]),
    "rank_negative": ("label_rank", 0, -0.1, ["row 2", "-0.1", "[0, 1)"]),
    "rank_missing": ("label_rank", 0, np.nan, ["row 2", "nan", "[0, 1)"]),
    "rank_text": ("label_rank", 0, "first", ["row 2", "'first'", "[0, 1)"]),
    "rank_differs_in_patient": ("label_rank", 1, 0.9, ["row 3", "differs within the patient", "first seen in row 2"]),
    "path_parent": ("images", 4, "images/../../x.png", ["row 6", "escapes the root", "'images/../../x.png'"]),
    "path_absolute": ("images", 4, "/etc/passwd", ["row 6", "absolute", "relative to the dataset's root"]),
    "path_drive": ("images", 4, "C:/x.png", ["row 6", "absolute"]),
    "path_home": ("images", 4, "~/x.png", ["row 6", "absolute"]),
    "path_backslash": ("images", 4, "images\\4.png", ["row 6", "backslash"]),
    "path_not_plain": ("images", 4, "images//4.png", ["row 6", "plain form"]),
    "path_dot": ("images", 4, "./4.png", ["row 6", "plain form"]),
    "path_second": ("images", 4, "images/4.png;../4.png", ["row 6", "escapes the root"]),
    "image_empty": ("images", 4, "", ["row 6", "at least one path"]),
    "image_trailing": ("images", 4, "images/4.png;", ["row 6", "is empty"]),
    "image_in_two_splits": ("images", 4, "images/0.png", ["row 6", "image is in two splits"]),
    "views_count": ("views", 4, "PA;LATERAL", ["row 6", "2 views for 1 images"]),
    "views_none": ("views", 4, "", ["row 6", "0 views for 1 images"]),
    "view_unknown": ("views", 4, "pa", ["row 6", "'PA', 'AP', 'FRONTAL' or 'LATERAL'"]),
    "study_empty": ("study_id", 0, " ", ["row 2", "'study_id'", "at least 1 character"]),
    "patient_empty": ("patient_id", 0, "", ["row 2", "'patient_id'", "at least 1 character"]),
    "text_missing": ("findings", 0, None, ["row 2", "'findings'", "must be text"]),
    "boxes_no_json": ("boxes", 3, "[{", ["row 5", "Invalid JSON", "leave the cell empty"]),
    "boxes_no_list": ("boxes", 3, '{"label": "a"}', ["row 5", "list"]),
    "boxes_three": ("boxes", 3, '[{"label": "a", "image": 0, "xywh": [1, 2, 3]}]', ["row 5", "four numbers"]),
    "boxes_flat": (
        "boxes",
        3,
        '[{"label": "a", "image": 0, "xywh": [1, 2, 3, 0]}]',
        ["row 5", "['xywh'][3]", "greater than 0"],
    ),
    "boxes_nan": ("boxes", 3, '[{"label": "a", "image": 0, "xywh": [1, NaN, 3, 4]}]', ["row 5", "four numbers"]),
    "boxes_image": ("boxes", 3, '[{"label": "a", "image": 1, "xywh": [1, 2, 3, 4]}]', ["row 5", "'image' is 1"]),
    "boxes_label": ("boxes", 3, '[{"image": 0, "xywh": [1, 2, 3, 4]}]', ["row 5", "[0]['label']: Field required"]),
    "masks_path": ("masks", 3, '[{"label": "a", "image": 0, "path": "../m.png"}]', ["row 5", "escapes the root"]),
    "masks_span": (
        "masks",
        3,
        '[{"label": "a", "image": 0, "path": "m.png", "spans": [["impression", 4, 99]]}]',
        ["row 5", "span", "inside the text of impression"],
    ),
    "masks_section": (
        "masks",
        3,
        '[{"label": "a", "image": 0, "path": "m.png", "spans": [["history", 0, 2]]}]',
        ["row 5", "span"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_cell(case):
    column, row, value, words = CASES[case]
    message = problem(changed(column, row, value))
    assert "my.csv: 1 problem in the manifest" in message or case in ("image_trailing", "path_second")
    for word in words:
        assert word in message


@pytest.mark.parametrize("case", sorted(set(CASES) - {"text_missing"}))  # a CSV cell is never missing, only empty
def test_bad_cell_is_found_in_the_file_too_and_can_be_excluded(case, tmp_path):
    column, row, value, words = CASES[case]
    changed(column, row, value).to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ManifestError, match=words[0]):
        read_manifest(tmp_path / "m.csv")
    kept = read_manifest(tmp_path / "m.csv", on_error="exclude")
    excluded = kept.attrs["excluded"]
    assert {item["row"] for item in excluded} == {row + 2} and len(kept) == 5
    assert set(excluded[0]) == {"study_id", "row", "column", "reason"}
    assert list(kept.index) == [i for i in range(6) if i != row]
    validate(kept, source="kept")


def test_all_problems_are_reported_first_ten_spelt_out():
    frame = make_frame(40)
    frame["views"] = "XX"
    frame.loc[5, "Edema"] = 7
    message = problem(frame)
    assert "41 problems" in message and "and 31 more" in message and message.count("\n  row ") == 10
    assert message.index("row 2 ") < message.index("row 3 ")


def test_no_rows():
    assert "no rows" in problem(make_frame().iloc[:0])


def test_column_twice(tmp_path):
    write_manifest(make_frame(), tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text().replace("is_male", "Edema")
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ManifestError, match="'Edema' twice"):
        read_manifest(tmp_path / "m.csv")


def test_missing_column_is_never_excluded(tmp_path):
    make_frame().drop(columns="split").to_csv(tmp_path / "m.csv", index=False)
    with pytest.raises(ManifestError, match=r"m\.csv.*'split'"):
        read_manifest(tmp_path / "m.csv", on_error="exclude")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00,1", "UTF-8"),
        (b'study_id,patient_id\n"a,b\nc,d\n', "not a table"),
        (b"study_id,patient_id\na,b\n", "row 1 .* lacks column 'split'"),
    ],
)
def test_no_table(content, words, tmp_path):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path / "m.csv")


def test_row_with_too_many_cells(tmp_path):
    write_manifest(make_frame(), tmp_path / "m.csv")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    lines[3] = lines[3].replace("The heart is normal.", "The heart, is normal.")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ManifestError, match=r"m\.csv: row 4 has 14 cells, the header 13"):
        read_manifest(tmp_path / "m.csv")


def test_row_with_too_few_cells_and_blank_line(tmp_path):
    write_manifest(make_frame(), tmp_path / "m.csv")
    lines = (tmp_path / "m.csv").read_text().splitlines()
    (tmp_path / "m.csv").write_text("\n".join([*lines[:3], "s9,p9,train", *lines[3:]]) + "\n")
    with pytest.raises(ManifestError, match=r"row 4 has 3 cells, the header 13"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n\n")
    with pytest.raises(ManifestError, match=r"row 4 is an empty line"):
        read_manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n\n\n")
    assert len(read_manifest(tmp_path / "m.csv")) == 6


def test_unknown_on_error(tmp_path):
    with pytest.raises(ValueError, match="'raise' or 'exclude'"):
        read_manifest(tmp_path / "m.csv", on_error="ignore")


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    frame = make_frame()
    make_files(frame, tmp_path / "root")
    write_manifest(frame, tmp_path / "m.csv")
    return tmp_path / "m.csv", tmp_path / "root"


def test_all_files_there(tree):
    manifest, root = tree
    assert len(read_manifest(manifest, root=root)) == 6


def test_missing_files_are_counted_and_named(tree):
    manifest, root = tree
    (root / "images/2.png").unlink()
    (root / "images/4.png").unlink()
    (root / "images/4.png").mkdir()
    with pytest.raises(ManifestError) as caught:
        read_manifest(manifest, root=root)
    message = str(caught.value)
    assert "2 problems" in message and "row 4" in message and "'images/2.png' not found" in message
    assert "row 6" in message and str(root) in message and "on_error='exclude'" in message
    kept = read_manifest(manifest, root=root, on_error="exclude")
    assert [item["study_id"] for item in kept.attrs["excluded"]] == ["s002", "s004"] and len(kept) == 4
    assert kept[kept["split"] == "train"].attrs["excluded"] == kept.attrs["excluded"]


def test_wrong_root(tree):
    manifest, root = tree
    with pytest.raises(ManifestError, match="6 problems"):
        read_manifest(manifest, root=root / "images")
    with pytest.raises(ManifestError, match="not a folder"):
        read_manifest(manifest, root=root / "nowhere")
    with pytest.raises(ManifestError, match="nothing left"):
        read_manifest(manifest, root=root / "images", on_error="exclude")


def test_symlinked_files_count(tree, tmp_path):
    manifest, root = tree
    (root / "images").rename(tmp_path / "elsewhere")
    (root / "images").symlink_to(tmp_path / "elsewhere")
    assert len(read_manifest(manifest, root=root)) == 6


def test_root_may_itself_be_a_symlink(tree, tmp_path):
    manifest, root = tree
    (tmp_path / "link").symlink_to(root)
    assert len(read_manifest(manifest, root=tmp_path / "link")) == 6


def test_missing_mask_file(tmp_path):
    frame = changed("masks", 1, '[{"label": "Edema", "image": 0, "path": "masks/1.png"}]')
    make_files(frame, tmp_path)
    write_manifest(frame, tmp_path / "m.csv")
    with pytest.raises(ManifestError, match=r"row 3 .*'masks'.*'masks/1.png' not found"):
        read_manifest(tmp_path / "m.csv", root=tmp_path)
