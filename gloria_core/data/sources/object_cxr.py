"""Object-CXR (JF Healthcare, MIDL 2020, https://github.com/hlk-1135/object-CXR): foreign objects on radiographs.

Read are `train.csv` and `dev.csv` (image_path or image_name, annotation) with image folders `train/` and `dev/`, as
shipped: 8,000 and 1,000 images, half of them with objects. An annotation is shapes with ";" between them, each
"type x1 y1 x2 y2 ...": 0 rectangle, 1 ellipse (both by their corners), 2 polygon (its points).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from gloria_core.data.annotations import write_mask
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    absent,
    check_option,
    check_paths,
    check_unique,
    existing,
    file_sizes,
    finish,
    read_table,
    require,
    settle,
)
from gloria_core.data.splits import assign_splits, drawn_once

LABEL = "Foreign Object"
MASKS = "masks_object_cxr"
HOW = "github.com/hlk-1135/object-CXR (link to the archive there)"
NEEDS = {name: f"the {what}; {HOW}" for name, what in (("train.csv", "training shapes"), ("dev.csv", "test shapes"))}

Shape = tuple[int, list[float]]


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    masks: bool = False,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, label and boxes "Foreign Object", boxes in pixels of the file.

    A box holds its shape, whatever its type. (MGCA draws a symmetric box round the visual centre of a polygon's
    buffered outline; its detection numbers are on those boxes.)
    split_rule: test is `dev.csv`, as in the papers, for the contest's test labels are not public. "patient" draws an
        eighth of `train.csv` as valid, stratified; "published" MGCA's tenth: 7,200 / 800 / 1,000. The owner names no
        patients; each image is one.
    masks: also write the shapes to `masks_object_cxr/*.png` below the root, all of an image in one mask.
    on_error="exclude" leaves out images that are not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy.
    """
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    root = Path(root)
    paths = require(root, NEEDS, "object_cxr")
    tables, gone = [], []
    for name, split in (("train.csv", "train"), ("dev.csv", "test")):
        table = _read(paths[name], root).assign(split=split)
        if split_rule == "published" and split == "train":
            table["split"] = drawn_once(len(table), held_out=0.1)
        gone += absent(table, table["there"], key="study", value="image", column="image_path")
        tables.append(table[table["there"]])
    table = pd.concat(tables, ignore_index=True)
    settle(gone, source=f"{paths['train.csv']} and dev.csv", on_error=on_error, left=len(table))
    frame = _frame(table, _masks(table, root) if masks else {})
    if split_rule == "patient":
        learn = frame["split"] == "train"
        if learn.any():
            parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)["split"]
            frame["split"] = np.where(learn, parts.reindex(frame.index), frame["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone)


def _read(path: Path, root: Path) -> pd.DataFrame:
    """study, image (path below the root), there, shapes."""
    header = path.open(encoding="utf-8-sig").readline()
    column = "image_name" if "image_name" in header else "image_path"
    table = read_table(path, {column: "cell", "annotation": "annotation"})
    # the owner's paths begin with a folder of theirs; the file's name says which image it is
    table["name"] = table["cell"].str.replace(r"^/path/", "", regex=True)
    check_paths(path, column, table["name"])
    table["name"] = table["name"].str.rpartition("/")[2]
    check_unique(path, column, table["name"])
    places = [f"{path.stem}/" + table["name"], table["name"]]
    files = existing(root, pd.concat(places).tolist())
    table["there"] = places[0].isin(files) | places[1].isin(files)
    table["image"] = places[0].where(~places[1].isin(files), places[1])
    table["shapes"] = [_shapes(cell, path, row + 2) for row, cell in enumerate(table["annotation"])]
    return table.assign(study=f"{path.stem}-" + table["name"].str.rpartition(".")[0])


def _shapes(cell: str, path: Path, row: int) -> list[Shape]:
    """The shapes of one cell. Raises ManifestError for what is none."""
    shapes = []
    for part in filter(None, (text.strip() for text in cell.split(";"))):
        try:
            kind, *numbers = part.split()
            kind, numbers = int(kind), [float(number) for number in numbers]
        except ValueError:
            kind, numbers = -1, []
        good = (kind in (0, 1) and len(numbers) == 4) or (kind == 2 and len(numbers) >= 6 and len(numbers) % 2 == 0)
        if good:
            width, height = (max(numbers[i::2]) - min(numbers[i::2]) for i in (0, 1))
            good = np.isfinite(numbers).all() and width > 0 and height > 0
        if not good:
            raise ManifestError(
                f"{path}, row {row}, column 'annotation': {part[:60]!r} is no shape; shapes are '0 x1 y1 x2 y2' "
                "(rectangle), 1 (ellipse) or '2 x1 y1 x2 y2 x3 y3 ...' (polygon)"
            )
        shapes.append((kind, numbers))
    return shapes


def _masks(table: pd.DataFrame, root: Path) -> dict[str, str]:
    """Study -> path of its mask."""
    drawn = table[table["shapes"].map(len) > 0]
    sizes = file_sizes(root, drawn["image"])
    paths = {}
    for study, image, shapes in zip(drawn["study"], drawn["image"], drawn["shapes"], strict=True):
        size = sizes[image]
        if size is None:
            raise ManifestError(f"{root / image} cannot be read, so its mask has no size; copy it again")
        paths[study] = write_mask(root, f"{MASKS}/{study}.png", lambda size=size, shapes=shapes: filled(shapes, size))
    return paths


def filled(shapes: list[Shape], size: tuple[int, int]) -> np.ndarray:
    """The pixels of shapes in an image of `size` (width, height). Shape: (height, width) bool."""
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    for kind, numbers in shapes:
        corners = [min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])]
        if kind == 2:
            draw.polygon(numbers, fill=1)
        else:
            (draw.ellipse if kind == 1 else draw.rectangle)(corners, fill=1)
    return np.array(canvas)


def _frame(table: pd.DataFrame, masks: dict[str, str]) -> pd.DataFrame:
    cells = []
    for shapes in table["shapes"]:
        entries = []
        for _, numbers in shapes:
            x, y = min(numbers[::2]), min(numbers[1::2])
            xywh = [x, y, round(max(numbers[::2]) - x, 3), round(max(numbers[1::2]) - y, 3)]
            entries.append({"label": LABEL, "image": 0, "xywh": xywh})
        cells.append(json.dumps(entries) if entries else "")
    return pd.DataFrame(
        {
            "study_id": table["study"],
            "patient_id": table["study"],
            "split": table["split"],
            "images": table["image"],
            "views": "FRONTAL",
            LABEL: table["shapes"].map(len).gt(0).astype(float),
            "boxes": cells,
            "masks": [
                json.dumps([{"label": LABEL, "image": 0, "path": masks[name]}]) if name in masks else ""
                for name in table["study"]
            ],
        }
    )
