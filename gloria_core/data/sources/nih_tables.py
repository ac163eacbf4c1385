"""The tables of NIH ChestX-ray14, read and checked: entries, boxes, official lists, and the optional extras."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gloria_core.data.manifest import ManifestError

NIH_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"

_ENTRY = {
    "Image Index": "image",
    "Finding Labels": "labels",
    "Follow-up #": "follow_up",
    "Patient ID": "patient",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
}
# the header's "Bbox [x,y,w,h]" holds commas, so it is read as four columns
_BOX = {"Image Index": "image", "Finding Label": "label", "Bbox [x": "x", "y": "y", "w": "w", "h]": "h"}
_BOX_LABELS = {"Infiltrate": "Infiltration"}


def find_table(root: Path, pattern: str) -> Path:
    """The one file of `root` that matches; ManifestError where there is none or where there are several."""
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        what = "no file" if not found else "several files: " + ", ".join(path.name for path in found) + ";"
        raise ManifestError(f"{root}: {what} {pattern}; the root must hold exactly one, as NIH distributes it")
    return found[0]


def read_columns(path: Path, names: dict[str, str]) -> pd.DataFrame:
    """Columns `names` (theirs -> ours) of a CSV as text; ManifestError naming a column that is not there."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error})") from error
    for name in names:
        if name not in table.columns:
            near = difflib.get_close_matches(name, [str(column) for column in table.columns], 1)
            hint = f"is it {near[0]!r} now? " if near else ""
            raise ManifestError(
                f"{path}: row 1 (the header) lacks column {name!r}; {hint}It has: {', '.join(table.columns)}. "
                "Give the table the names of the 2017 release"
            )
    return table[list(names)].rename(columns=names).fillna("")


def require(path: Path, column: str, values: pd.Series, good: pd.Series, remedy: str) -> None:
    """Raise ManifestError naming the first rows of `values` that are not `good`, and how many there are."""
    bad = values[~good.to_numpy(bool)]
    if len(bad):
        rows = ", ".join(f"row {index + 2}: {value!r}" for index, value in bad.iloc[:5].items())
        raise ManifestError(f"{path}, column {column!r}: {len(bad)} bad values ({rows}); {remedy}")


def read_entries(path: Path) -> pd.DataFrame:
    """One row an image: study (the stem), patient, labels (a set), age (years), sex, view; index + 2 is its row."""
    table = read_columns(path, _ENTRY)
    require(path, "Image Index", table["image"], ~table["image"].duplicated(), "an image is listed twice; keep one row")
    table["study"] = table["image"].str.rsplit(".", n=1).str[0]
    require(path, "Patient ID", table["patient"], table["patient"].str.strip() != "", "give every image its patient")
    table["labels"] = table["labels"].str.split("|").map(frozenset)
    known = table["labels"].map(lambda names: names <= {*NIH_LABELS, NO_FINDING})
    shown = table["labels"].map(lambda names: "|".join(sorted(names)))
    require(path, "Finding Labels", shown, known, f"labels are {', '.join(NIH_LABELS)}, {NO_FINDING}, joined by |")
    alone = table["labels"].map(lambda names: NO_FINDING not in names or len(names) == 1)
    require(path, "Finding Labels", shown, alone, f"{NO_FINDING!r} must stand alone")
    require(path, "View Position", table["view"], table["view"].isin(["PA", "AP"]), "a view is PA or AP")
    require(path, "Patient Gender", table["sex"], table["sex"].isin(["M", "F"]), "a sex is M or F")
    parts = table["age"].str.extract(r"^0*(\d+)([YMD]?)$")
    require(
        path, "Patient Age", table["age"], parts[0].notna(), "an age is a number of years, or like 058Y, 011M, 020D"
    )
    per_year = parts[1].map({"": 1, "Y": 1, "M": 12, "D": 365})
    table["age"] = (parts[0].astype(int) // per_year).astype(str)
    return table


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: image, label (with NIH's 'Infiltrate' spelt as in the entries), x, y, w, h in original pixels."""
    table = read_columns(path, _BOX)
    table["label"] = table["label"].replace(_BOX_LABELS)
    require(path, "Finding Label", table["label"], table["label"].isin(NIH_LABELS), "use the labels of the entries")
    for name in ("x", "y", "w", "h"):
        numbers = pd.to_numeric(table[name], errors="coerce")
        good = numbers.notna() & (numbers > 0 if name in "wh" else numbers >= 0)
        require(path, f"Bbox {name}", table[name], good, "a box is x, y >= 0 and w, h > 0 in pixels")
        table[name] = numbers
    return table


def published_split(root: Path, images: Sequence[str]) -> pd.Series:
    """ "train" or "test" for each image by the lists of NIH; ManifestError where a list or an image is missing."""
    parts = {}
    for name, split in (("train_val_list.txt", "train"), ("test_list.txt", "test")):
        path = root / name
        if not path.is_file():
            raise ManifestError(f"{path} is missing; split_rule='published' needs it: add NIH's list or use 'patient'")
        parts |= dict.fromkeys(path.read_text(encoding="utf-8").split(), split)
    split = pd.Series([parts.get(image, "") for image in images])
    absent = [image for image, part in zip(images, split, strict=True) if not part]
    if absent:
        raise ManifestError(
            f"{root}: {len(absent)} images are in neither train_val_list.txt nor test_list.txt "
            f"({', '.join(absent[:5])}); get the complete lists or use split_rule='patient'"
        )
    return split


def read_extra(path: Path, key: str, value: str) -> dict[str, str]:
    """An optional table, image -> value; empty if the file is not there."""
    if not path.is_file():
        return {}
    table = read_columns(path, {key: "key", value: "value"})
    return dict(zip(table["key"], table["value"], strict=True))
