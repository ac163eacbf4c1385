"""Oxford-IIIT Pet (Parkhi et al. 2012, https://www.robots.ox.ac.uk/~vgg/data/pets/): is the segmentation code right?

7,349 photographs of cats and dogs with outlines. Nothing medical: a set on which any working segmentation reaches a
Dice above 0.9, so that a fault in the code shows. Read are `images/*.jpg`, `annotations/trainval.txt`, `test.txt` and
`annotations/trimaps/*.png` (1 pet, 2 background, 3 border).
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field

from gloria_core.data import raw_folder as raw
from gloria_core.data.annotations import write_mask
from gloria_core.data.manifest import ManifestError, OnError

MASK, MASKS = "Pet", "masks_oxford_pet"
HOW = "https://www.robots.ox.ac.uk/~vgg/data/pets/ (images.tar.gz, annotations.tar.gz)"
LISTS = {"annotations/trainval.txt": "train", "annotations/test.txt": "test"}
LINES = {
    "name": raw.Column("study_id", path=True, filled=True, unique=True),
    "species": raw.Column("species", values={"1": "Cat", "2": "Dog"}, remedy="1 is a cat, 2 a dog"),
}


def prepare(
    root: Path,
    *,
    border: bool = True,
    limit: Annotated[int, Field(ge=0)] = 0,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study a photograph, labels "Cat" and "Dog", mask "Pet" written to `masks_oxford_pet/`.

    border: whether the border of the trimap counts as pet; False gives masks of their own, without it.
    limit: only the first so many photographs of each list after a draw by `seed`; 0 takes all.
    Test is the owner's list, valid an eighth of `trainval.txt`, stratified. A photograph is its own "patient".
    on_error="exclude" leaves out photographs that are not there, or without a readable trimap, and lists them in
    `attrs["excluded"]`.
    """
    folder = raw.RawFolder(root, "oxford_pet")
    needs = {**LISTS, "images/": "the photographs", "annotations/trimaps/": "the outlines"}
    lists = folder.require({name: f"{what}; {HOW}" for name, what in needs.items()})[:2]
    tables = []
    for path, split in zip(lists, LISTS.values(), strict=True):
        table = _read(path).assign(split=split)
        tables.append(table.sample(min(limit, len(table)), random_state=seed).sort_index() if limit else table)
    table = pd.concat(tables)
    table["images"] = folder.locate(table["study_id"], ["images"], raw.PICTURES)
    table["trimap"] = folder.locate(table["study_id"], ["annotations/trimaps"], [".png"])
    rows = raw.Rows(table, source=" and ".join(LISTS), cell=("image", "study_id"))
    there = (table["images"] != "") & (table["trimap"] != "")
    rows.exclude_missing(there, on_error, reason="no such photograph or trimap")
    home = MASKS if border else f"{MASKS}_inner"
    masks = [
        write_mask(root, f"{home}/{name}.png", lambda path=root / trimap: _pet(path, border))
        for name, trimap in zip(rows.table["study_id"], rows.table["trimap"], strict=True)
    ]
    labels = {name: (rows.table["species"] == name).astype(float) for name in ("Cat", "Dog")}
    rows.table = rows.table.assign(masks=raw.mask_cells(MASK, masks), **labels)
    return raw.finish(None if limit else folder, rows, list(labels), seed=seed, draw="valid")


def _read(path: Path) -> pd.DataFrame:
    """study_id and species of a list; index + 2 is the line as if it had a header, like the tables'."""
    lines = [line.split() for line in raw.read_text(path)[0].splitlines() if line and line[0] != "#"]
    if not lines or any(len(line) != 4 for line in lines):
        raise ManifestError(f"{path}: lines are 'name class species breed'; unpack annotations.tar.gz again")
    table = pd.DataFrame([line[::2] for line in lines], columns=["name", "species"], index=range(-1, len(lines) - 1))
    return pd.DataFrame({rule.name: rule.checked(path, name, table[name]) for name, rule in LINES.items()})


def _pet(path: Path, border: bool) -> np.ndarray:
    try:
        with Image.open(path) as image:
            trimap = np.asarray(image.convert("L") if image.mode not in ("L", "P") else image)
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error}); unpack annotations.tar.gz again") from error
    if not set(np.unique(trimap)) <= {1, 2, 3}:
        raise ManifestError(f"{path}: a trimap has the values 1, 2 and 3 only; unpack annotations.tar.gz again")
    return np.isin(trimap, (1, 3)) if border else trimap == 1
