"""The tables of CXR-CLIP-CGMH, read and checked: one study a row, with lists written as Python writes them."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError
from gloria_core.data.manifest_entries import path_problem
from gloria_core.data.prompts import NO_FINDING

CGMH_LABELS = (
    "Endotracheal tube in place",
    "Endotracheal tube malposition",
    "Pigtail in place",
    "Pigtail malposition",
    "Chest tube in place",
    "Chest tube malposition",
    "NG tube in place",
    "NG tube malposition",
    "Central venous catheter in place",
    "Pneumothorax",
    "Subcutaneous emphysema",
    "Pneumomediastinum",
    "Foreign body",
)
OTHER_SPELLINGS = {"Pigtail malpositon": "Pigtail malposition"}
"""The fork's label list, prompts and tables have the former; both are read, and the manifest has the latter."""


def read_studies(path: Path, root: Path, split: str, tasks: list[str], prefix: str) -> pd.DataFrame:
    """The rows of one table as studies; the index + 2 is the row of the table."""
    table = _table(path)
    images = _cells(table, path, "image", lambda cell: _images(cell, root, prefix))
    index = next((table[name] for name in ("index", "Unnamed: 0") if name in table), pd.Series(range(len(table))))
    ids = [f"{path.stem}-{value}" for value in index]
    repeated = pd.Series(ids).duplicated()
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        raise ManifestError(f"{path}, row {row + 2}: index {index[row]!r} is there twice; number the rows anew")
    patients = [value.strip() for value in table["patient_id"]] if "patient_id" in table else ids
    frame = pd.DataFrame(
        {
            "study_id": ids,
            "patient_id": patients,
            "split": split,
            "images": [";".join(paths) for paths in images],
            "views": [";".join(["FRONTAL"] * len(paths)) for paths in images],
            "findings": "",
            "impression": table["text"] if split == "test" and "text" in table else "",
            "boxes": "",
            "masks": "",
        }
    )
    return frame.assign(**_labels(table, path, tasks, listed=split != "test"))


def _table(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise ManifestError(
            f"{path}: cannot be read as a table ({error}); options train, valid, test name it"
        ) from error
    if table.empty:
        raise ManifestError(f"{path}: the table has no rows below its header; remove it, or give it studies")
    return table.rename(columns=OTHER_SPELLINGS)


def _column(table: pd.DataFrame, path: Path, name: str) -> pd.Series:
    if name not in table:
        near = difflib.get_close_matches(name, list(table.columns), 1)
        hint = f"is it {near[0]!r}? " if near else ""
        raise ManifestError(
            f"{path}: row 1 (the header) lacks column {name!r}; {hint}It has: {', '.join(table.columns)}. "
            "Rename it, or give the labels of this table as `tasks`"
        )
    return table[name]


def _cells(table: pd.DataFrame, path: Path, name: str, read: Callable[[str], list[str]]) -> list[list[str]]:
    """Every cell of a column as `read` gives it; its ValueError becomes the one that names file, row and column."""
    found, column = [], _column(table, path, name)
    for row, cell in enumerate(column, start=2):
        try:
            found.append(read(cell.strip()))
        except ValueError as error:
            shown = cell if len(cell) <= 80 else cell[:77] + "..."
            raise ManifestError(f"{path}, row {row}, column {name!r}: {shown!r} {error}") from error
    return found


def _list(cell: str) -> list[str]:
    """A list literal of strings, or one string without brackets, as the fork reads both; else ValueError."""
    if not cell:
        raise ValueError("is empty; write a list, [] for one without entries")
    if cell[0] not in "[(":
        return [cell]
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError("is no list; write it as ['first', 'second']") from error
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError("is no list of texts; write it as ['first', 'second']")
    return [value.strip() for value in values]


def _images(cell: str, root: Path, prefix: str) -> list[str]:
    """Paths below the root."""
    paths = []
    for path in _list(cell):
        if prefix and not path.startswith(prefix):
            raise ValueError(f"has path {path!r}, which does not begin with path_prefix {prefix!r}")
        path = path.removeprefix(prefix).lstrip("/") if prefix else path
        if Path(path).is_absolute() and Path(path).is_relative_to(root.absolute()):
            path = Path(path).relative_to(root.absolute()).as_posix()
        problem = path_problem(path) or ("has a ';', which separates images" if ";" in path else None)
        if problem:
            raise ValueError(f"has path {path!r}, which {problem}; path_prefix cuts a common beginning off")
        paths.append(path)
    if not paths:
        raise ValueError("names no image; give at least one")
    return paths


def _labels(table: pd.DataFrame, path: Path, tasks: list[str], *, listed: bool) -> dict[str, list[float]]:
    """One column of 0 and 1 for each task."""
    if listed:
        rows = _cells(table, path, "text_label", lambda cell: _known(_list(cell), tasks))
        return {name: [float(name in row) for row in rows] for name in tasks}
    return {name: [float(row[0]) for row in _cells(table, path, name, _binary)] for name in tasks}


def _known(names: list[str], tasks: list[str]) -> list[str]:
    names = [OTHER_SPELLINGS.get(name, name) for name in names]
    for name in names:
        if name not in tasks and name != NO_FINDING:
            near = difflib.get_close_matches(name, tasks, 1)
            raise ValueError(
                f"has label {name!r}, which is none of the tasks"
                + (f"; is it {near[0]!r}?" if near else "")
                + "; other labels are given as `tasks`"
            )
    return names


def _binary(cell: str) -> list[str]:
    if cell not in ("0", "1", "0.0", "1.0"):
        raise ValueError("is neither 0 nor 1; a label of the test table is 1 present or 0 absent")
    return [cell]
