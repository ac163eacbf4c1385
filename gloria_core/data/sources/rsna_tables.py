"""The tables of the RSNA pneumonia challenge, read and checked: boxes, three-way classes, and NIH's image names.

Shih et al. 2019, https://doi.org/10.1148/ryai.2019180041. The column `patientId` is the id of an image, not of a
patient: every image has its own, while NIH's patients, from whose images the challenge was drawn, have several.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError
from gloria_core.data.owner_folder import check_cells, check_paths, check_unique, read_table

CLASSES = ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
BOX_PIXELS = 1024
"""Side of the original images, whose pixels the boxes count."""
LABEL = "Pneumonia"

Boxes = dict[str, list[list[float]]]


def read_labels(path: Path) -> tuple[pd.Series, Boxes]:
    """Target (0 or 1) by image id, sorted by id as pandas groups them, and the boxes [x, y, w, h] of each image."""
    table = read_table(path, ["patientId", "x", "y", "width", "height", "Target"])
    ids = table["patientId"]
    check_paths(path, "patientId", ids)
    check_cells(path, "Target", table["Target"], table["Target"].isin(["0", "1"]), "a target is 0 or 1")
    positive = (table["Target"] == "1").to_numpy()
    numbers = table[["x", "y", "width", "height"]].apply(pd.to_numeric, errors="coerce")
    for name in numbers:
        good = numbers[name].gt(0) if name in ("width", "height") else numbers[name].ge(0)
        rule = "a box has x, y >= 0 and width, height > 0 in pixels; a row with Target 0 has none"
        check_cells(path, name, table[name], np.where(positive, good, table[name] == ""), rule)
    alone = ~ids.duplicated(keep=False) | positive
    check_cells(path, "patientId", ids, alone, "an image is there twice without a box; keep one row of it")
    boxes: Boxes = {}
    for name, box in zip(ids[positive], numbers[positive].to_numpy(float).tolist(), strict=True):
        boxes.setdefault(name, []).append(box)
    return pd.Series(positive.astype(float), index=ids).groupby(level=0, sort=True).max(), boxes


def read_classes(path: Path, targets: pd.Series) -> pd.Series:
    """The three-way class of each image; it must agree with `targets`."""
    table = read_table(path, ["patientId", "class"])
    check_cells(path, "class", table["class"], table["class"].isin(CLASSES), f"a class is one of {', '.join(CLASSES)}")
    table = table.drop_duplicates()
    check_cells(path, "patientId", table["patientId"], ~table["patientId"].duplicated(), "an image has two classes")
    classes = table.set_index("patientId")["class"].reindex(targets.index)
    agree = (classes == "Lung Opacity") == (targets == 1)
    if classes.isna().any() or not agree.all():
        first = targets.index[(classes.isna() | ~agree).to_numpy()][0]
        raise ManifestError(
            f"{path}: image {first!r} has class {classes[first]!r} and Target {targets[first]:.0f} in the table of "
            "labels; take both tables from one download"
        )
    return classes


def read_nih_names(path: Path) -> dict[str, str]:
    """RSNA's image id -> name of the image in ChestX-ray14, from RSNA's own mapping (JSON) or a CSV with both names."""
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            return {entry["subset_img_id"]: entry["img_id"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(
                f"{path}: no list of entries with 'subset_img_id' and 'img_id' ({error!r}); download it again"
            ) from error
    table = read_table(path, ["patientId", "image_index"])
    check_unique(path, "patientId", table["patientId"])
    return dict(zip(table["patientId"], table["image_index"], strict=True))


def nih_patient(image: str) -> str:
    """NIH's patient of an image "00000282_003.png": "282", as in NIH's table of entries."""
    return image.partition("_")[0].lstrip("0") or "0"
