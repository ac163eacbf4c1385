"""Oxford-IIIT Pet (Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/): is the segmentation code right?

7,349 photographs of cats and dogs with outlines. Nothing medical: a set on which any working segmentation reaches a
Dice above 0.9, so that a fault in the code shows. Read are `images/*.jpg`, `annotations/trainval.txt`, `test.txt` and
`annotations/trimaps/*.png` (1 pet, 2 background, 3 border).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data.annotations import write_mask
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import (
    PICTURES,
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    finish,
    locate,
    require,
)
from gloria_core.data.raw_folder import settle as settle_failures
from gloria_core.data.splits import assign_splits

MASK, MASKS = "Pet", "masks_oxford_pet"
HOW = "https://www.robots.ox.ac.uk/~vgg/data/pets/ (images.tar.gz, annotations.tar.gz)"
LISTS = {"annotations/trainval.txt": "train", "annotations/test.txt": "test"}


def prepare(
    root: Path | str, *, border: bool = True, limit: int = 0, seed: int = 0, on_error: OnError = "raise"
) -> pd.DataFrame:
    """The checked manifest: one study a photograph, labels "Cat" and "Dog", mask "Pet" written to `masks_oxford_pet/`.

    border: whether the border of the trimap counts as pet; False gives masks of their own, without it.
    limit: only the first so many photographs of each list after a draw by `seed`; 0 takes all.
    Test is the owner's list, valid an eighth of `trainval.txt`, stratified. A photograph is its own "patient".
    on_error="exclude" leaves out photographs that are not there, or without a readable trimap, and lists them in
    `attrs["excluded"]`. Raises ManifestError naming file, row and remedy.
    """
    check_option("on_error", on_error, ("raise", "exclude"))
    if limit < 0:
        raise ValueError(f"limit is {limit}; it is a number of photographs, or 0 for all")
    root = Path(root)
    needs = {**LISTS, "images/": "the photographs", "annotations/trimaps/": "the outlines"}
    paths = require(root, {name: f"{what}; {HOW}" for name, what in needs.items()}, "oxford_pet")
    tables = []
    for name, split in LISTS.items():
        table = _read(paths[name]).assign(split=split)
        tables.append(table.sample(min(limit, len(table)), random_state=seed).sort_index() if limit else table)
    table = pd.concat(tables)
    table["file"] = locate(root, table["name"], ["images"], PICTURES)
    table["trimap"] = locate(root, table["name"], ["annotations/trimaps"], [".png"])
    there = (table["file"] != "") & (table["trimap"] != "")
    gone = absent(table, there, key="name", value="name", column="image", reason="no such photograph or trimap")
    settle_failures(gone, source=" and ".join(LISTS), on_error=on_error, left=int(there.sum()))
    frame = _frame(table[there].reset_index(drop=True), root, border)
    learn = frame["split"] == "train"
    if learn.any():
        parts = assign_splits(frame[learn], fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)["split"]
        frame["split"] = np.where(learn, parts.reindex(frame.index), frame["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=gone)


def _read(path: Path) -> pd.DataFrame:
    """name, species ("1" cat, "2" dog) of a list; index + 2 is the line as if it had a header, like the tables'."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: no text ({error}); unpack annotations.tar.gz again") from error
    if not lines or any(len(line) != 4 for line in lines):
        raise ManifestError(f"{path}: lines are 'name class species breed'; unpack annotations.tar.gz again")
    table = pd.DataFrame([line[::2] for line in lines], columns=["name", "species"], index=range(-1, len(lines) - 1))
    check_paths(path, "name", table["name"])
    check_unique(path, "name", table["name"])
    check_cells(path, "species", table["species"], table["species"].isin(["1", "2"]), "1 is a cat, 2 a dog")
    return table


def _frame(table: pd.DataFrame, root: Path, border: bool) -> pd.DataFrame:
    folder = MASKS if border else f"{MASKS}_inner"
    cells = []
    for name, trimap in zip(table["name"], table["trimap"], strict=True):
        path = write_mask(root, f"{folder}/{name}.png", lambda trimap=trimap: _pet(root / trimap, border))
        cells.append(json.dumps([{"label": MASK, "image": 0, "path": path}]))
    return pd.DataFrame(
        {
            "study_id": table["name"],
            "patient_id": table["name"],
            "split": table["split"],
            "images": table["file"],
            "views": "FRONTAL",
            "Cat": (table["species"] == "1").astype(float),
            "Dog": (table["species"] == "2").astype(float),
            "masks": cells,
        }
    )


def _pet(path: Path, border: bool) -> np.ndarray:
    try:
        with Image.open(path) as image:
            trimap = np.asarray(image.convert("L") if image.mode not in ("L", "P") else image)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error}); unpack annotations.tar.gz again") from error
    if not set(np.unique(trimap)) <= {1, 2, 3}:
        raise ManifestError(f"{path}: a trimap has the values 1, 2 and 3 only; unpack annotations.tar.gz again")
    return np.isin(trimap, (1, 3)) if border else trimap == 1
