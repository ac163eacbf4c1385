"""The tables of VinDr-CXR, read and checked, and the three readers of an image made one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.owner_folder import check_cells, check_paths, read_table

Readers = Literal["union", "majority"]

NO_FINDING = "No Finding"
_NAMES = {"No finding": NO_FINDING, "Other diseases": "Other disease"}
"""The owner's spellings that differ between tables or from ours."""
_CORNERS = ["x_min", "y_min", "x_max", "y_max"]


def read_boxes(path: Path) -> pd.DataFrame:
    """One row a box: image, label, reader ("" for a consensus), x_min, y_min, x_max, y_max (NaN: no box)."""
    table = read_table(
        path, {"image_id": "image", "class_name": "label", **{c: c for c in _CORNERS}}, optional=["rad_id"]
    )
    table = table.rename(columns={"rad_id": "reader"})
    check_paths(path, "image_id", table["image"])
    check_cells(path, "class_name", table["label"], table["label"] != "", "every row has a class")
    table["label"] = table["label"].replace(_NAMES)
    cells = table[_CORNERS]
    blank = (cells == "").all(axis=1)
    numbers = cells.apply(pd.to_numeric, errors="coerce")
    for low, high in (("x_min", "x_max"), ("y_min", "y_max")):
        shown = table[low] + " to " + table[high]
        good = blank | ((numbers[low] >= 0) & (numbers[low] < numbers[high]))
        check_cells(path, f"{low}, {high}", shown, good, "a box has 0 <= min < max in pixels, or is blank")
    marked = (table["label"] == NO_FINDING) & ~blank
    check_cells(path, "class_name", table["label"], ~marked, "an image without a finding has no box")
    table[_CORNERS] = numbers
    return table


def read_image_labels(path: Path, readers: Readers) -> pd.DataFrame:
    """Labels of each image (1 or 0), indexed by image and sorted; several readers are made one."""
    header = path.open(encoding="utf-8-sig").readline().rstrip("\r\n").split(",")
    reader = next((name for name in header if name.lower() == "rad_id"), "")
    names = [name for name in header if name not in ("image_id", reader)]
    table = read_table(path, ["image_id", *([reader] if reader else []), *names])
    check_paths(path, "image_id", table["image_id"])
    for name in names:
        check_cells(path, name, table[name], table[name].isin(["0", "1", "0.0", "1.0"]), "a label is 0 or 1")
    key = ["image_id", reader] if reader else ["image_id"]
    shown = table[key].agg(" ".join, axis=1)
    check_cells(path, " and ".join(key), shown, ~table.duplicated(key), "a reading is there twice; keep one row of it")
    values = table[names].astype(float).rename(columns=_NAMES)
    return _agreed(values.groupby(table["image_id"], sort=True).mean(), readers if reader else "majority")


def labels_of_boxes(boxes: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """The same from Kaggle's table of boxes alone: a reader saw what they marked."""
    seen = boxes.drop_duplicates(["image", "reader", "label"])
    share = seen.pivot_table(index="image", columns="label", values="reader", aggfunc="count", fill_value=0)
    number = boxes.groupby("image", sort=True)["reader"].nunique()
    return _agreed(share.div(number, axis=0), readers)


def _agreed(share: pd.DataFrame, readers: Readers) -> pd.DataFrame:
    """Labels from the share of readers who saw them; "No Finding" is what has none."""
    present = (share > 0 if readers == "union" else share > 0.5).astype(float)
    findings = present.drop(columns=NO_FINDING, errors="ignore")
    return findings.assign(**{NO_FINDING: (findings.sum(axis=1) == 0).astype(float)})


def merged_boxes(boxes: pd.DataFrame, readers: Readers, overlap: float) -> dict[str, list[dict]]:
    """Boxes of each image as manifest entries; those of one finding that overlap are one, their mean."""
    marked = boxes[boxes["x_min"].notna()]
    found: dict[str, list[dict]] = {}
    marked = marked.sort_values(["image", "label"], kind="stable")
    images, labels, readings = (marked[name].to_numpy(object) for name in ("image", "label", "reader"))
    places = marked[_CORNERS].to_numpy(float)
    starts = (
        np.flatnonzero(np.r_[True, (images[1:] != images[:-1]) | (labels[1:] != labels[:-1])]) if len(marked) else []
    )
    for start, end in zip(starts, [*starts[1:], len(marked)], strict=True):
        image, label, corners, who = images[start], labels[start], places[start:end], readings[start:end]
        for members in _groups(corners, overlap):
            if readers == "majority" and (who != "").all() and len(set(who[members])) < 2:
                continue
            x0, y0, x1, y1 = corners[members].mean(0)
            xywh = [round(float(value), 2) for value in (x0, y0, x1 - x0, y1 - y0)]
            found.setdefault(image, []).append({"label": label, "image": 0, "xywh": xywh})
    return found


def _groups(corners: np.ndarray, overlap: float) -> list[list[int]]:
    """Indices of boxes (n, 4) that hang together by an intersection over union >= `overlap`, in order of the first."""
    if len(corners) == 1:
        return [[0]]
    low = np.maximum(corners[:, None, :2], corners[None, :, :2])
    high = np.minimum(corners[:, None, 2:], corners[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = (corners[:, 2:] - corners[:, :2]).prod(-1)
    linked = shared / (area[:, None] + area[None] - shared) >= overlap
    group = np.arange(len(corners))
    for i, j in zip(*np.nonzero(np.triu(linked, 1)), strict=True):
        group[group == max(group[i], group[j])] = min(group[i], group[j])
    return [np.flatnonzero(group == number).tolist() for number in np.unique(group)]
