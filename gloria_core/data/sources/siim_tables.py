"""The tables of SIIM-ACR pneumothorax, read and checked, and their runs written as mask files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError
from gloria_core.data.mask_files import write_mask
from gloria_core.data.owner_folder import check_cells, check_paths, check_unique, read_table
from gloria_core.data.rle import SIIM_SIDE, RleError, decode_rle

MASKS = "masks_siim_pneumothorax"
"""Folder below the root that the decoded masks are written to."""


def read_runs(path: Path) -> pd.DataFrame:
    """One row a run-length text: name, stem, runs, positive, row (index + 2 is the row of the file).

    Spaces in column names and cells do not count: the released table has " EncodedPixels", and " -1" or "-1" for images
    without a finding.
    """
    header = path.open(encoding="utf-8-sig").readline().rstrip("\r\n").split(",")
    columns = {name: name.strip() for name in header if name.strip() in ("ImageId", "EncodedPixels")}
    if len(columns) < 2:
        columns = {"ImageId": "ImageId", " EncodedPixels": "EncodedPixels"}
    table = read_table(path, columns, remedy="Take train-rle.csv of stage 1 or stage_2_train.csv as Kaggle ships it")
    table = table.rename(columns={"ImageId": "name", "EncodedPixels": "runs"})
    table["name"], table["runs"] = table["name"].str.strip(), table["runs"].str.strip()
    check_paths(path, "ImageId", table["name"])
    good = table["runs"].str.fullmatch(r"-1|\d+ \d+(?: \d+ \d+)*")
    check_cells(path, "EncodedPixels", table["runs"], good, "runs are pairs of whole numbers, or -1 without a finding")
    table["positive"] = table["runs"] != "-1"
    several = table.duplicated("name", keep=False)
    both = several & ~table["positive"]
    check_cells(path, "ImageId", table["name"], ~both, "an image without a finding is there twice; keep one row of it")
    again = table.duplicated(["name", "runs"])
    check_cells(path, "ImageId", table["name"], ~again, "the same runs are there twice; keep one row")
    return table.assign(stem=table["name"], row=table.index)


def read_pictures(tables: Sequence[tuple[Path, str]]) -> pd.DataFrame:
    """One row an image of the PNG version: name, stem, positive, split, row."""
    parts = []
    for path, split in tables:
        names = {"new_filename": "file", "ImageId": "name", "has_pneumo": "has"}
        table = read_table(path, names, remedy="Take the tables that come with png_images/")
        check_paths(path, "new_filename", table["file"])
        check_unique(path, "ImageId", table["name"])
        check_unique(path, "new_filename", table["file"])
        check_cells(path, "has_pneumo", table["has"], table["has"].isin(["0", "1"]), "has_pneumo is 0 or 1")
        stem = table["file"].str.replace(r"\.png$", "", regex=True)
        parts.append(table.assign(stem=stem, positive=table["has"] == "1", split=split, row=table.index))
    rows = pd.concat(parts, ignore_index=True)
    twice = rows["name"].duplicated()
    if twice.any():
        where = " and ".join(str(path) for path, _ in tables)
        raise ManifestError(f"{where}: image {rows.loc[twice, 'name'].iloc[0]!r} is in both; keep it in one")
    return rows


def write_masks(root: Path, rows: pd.DataFrame, *, source: str) -> dict[str, str]:
    """Study -> path of its mask, the union of its rows, as 1-bit PNG of 1024 x 1024 below the root.

    rows: as of `read_runs`, with `study`: the image, or a part of its rows. Files that are there are kept.
    Raises ManifestError for runs that are no mask of such an image, naming the row, and for a root one cannot write to.
    """
    paths: dict[str, str] = {}
    for study, part in rows.groupby("study", sort=False):
        name = part["name"].iloc[0]
        if study != name:
            # which rows are a part's is drawn over the whole table, so the file of another table's part is not it
            name = f"{name}-{hashlib.sha256(';'.join(part['runs']).encode()).hexdigest()[:12]}"
        paths[study] = write_mask(
            root, f"{MASKS}/{name}.png", lambda study=study, part=part: _union(study, part, source)
        )
    return paths


def _union(name: str, part: pd.DataFrame, source: str) -> np.ndarray:
    mask = np.zeros((SIIM_SIDE, SIIM_SIDE), bool)
    for row, runs in zip(part["row"], part["runs"], strict=True):
        try:
            mask |= decode_rle(runs, SIIM_SIDE, SIIM_SIDE, format="siim")
        except RleError as error:
            raise ManifestError(
                f"{source}, row {row + 2}, column 'EncodedPixels', image {name!r}: {error}; get the table again"
            ) from error
    return mask
