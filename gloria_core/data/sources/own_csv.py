"""Your own images: any CSV with a column of image paths, and columns of text and labels, if you have them.

prepare("own_csv", "my_data", {"table": "studies.csv", "columns": {"image": "file", "impression": "report"},
                               "labels": ["Effusion", "Pneumothorax"]})
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import FIXED, META, VIEWS, ManifestError, OnError
from gloria_core.data.raw_folder import (
    absent,
    check_cells,
    check_option,
    check_paths,
    check_unique,
    existing,
    finish,
    read_table,
    require,
    settle,
)
from gloria_core.data.splits import DEFAULT_FRACTIONS, assign_splits

COLUMNS = ("image", "study", "patient", "split", "view", "findings", "impression")
"""What a column can be; each is looked for under its own name unless `columns` gives another."""
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
LABEL_VALUES = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "positive", "present"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no", "negative", "absent"), 0.0),
    **dict.fromkeys(("-1", "-1.0", "uncertain"), -1.0),
    **dict.fromkeys(("", "nan", "na", "none", "unknown"), np.nan),
}
"""How label cells are read, in lower case; anything else is an error that names the row."""


def prepare(
    root: Path | str,
    *,
    table: str = "studies.csv",
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | Mapping[str, str] = (),
    patient_pattern: str = "",
    separator: str = ",",
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest of the studies in `root/table`; one study a row.

    columns: what -> your column's name, for image, study, patient, split, view, findings, impression. Only image is
        needed. An image cell is a path below the root, or several with ";" between them (then `view`, too).
    labels: your label columns, or label name -> your column. Cells are 1 / 0 / -1 / blank (uncertain stays -1), or
        words such as yes and no. Columns "meta_..." are taken over as they are.
    patient_pattern: where no column says the patient, a regular expression whose first group finds it in the image
        path: "(p\\d+)/" in "p17/study3/a.png". Without either, every row is its own patient, and a warning is given:
        images of one person could then stand on both sides of the split.
    split: your column's train / valid / test (val, dev, ... are understood); without it, `fractions` are drawn,
        patient-disjoint and stratified, with `seed`.
    on_error="exclude" leaves out rows whose image is not there and lists them in `attrs["excluded"]`.
    Raises ManifestError naming file, row, column and remedy.
    """
    check_option("on_error", on_error, ("raise", "exclude"))
    root, named = Path(root), dict(columns or {})
    for name in named:
        check_option("a key of columns", name, COLUMNS)
    path = require(root, {table: "your table of images; option table=... names another"}, "own_csv")[table]
    label_of = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels}
    rows, metadata = _read(path, {"image": "image", **named}, label_of, separator)
    rows["image"] = _relative(rows["image"], root)
    _check(path, rows, {**{name: name for name in COLUMNS}, **named})
    frame = _frame(path, rows, label_of, patient_pattern).assign(**{name: rows[name] for name in metadata})
    images = frame["images"].str.split(";")
    there = existing(root, images.explode().tolist())
    complete = images.map(lambda files: all(file in there for file in files))
    gone = absent(frame, complete, key="study_id", value="images", column=named.get("image", "image"))
    frame = frame[complete].reset_index(drop=True)
    settle(gone, source=str(path), on_error=on_error, left=len(frame))
    if (frame["split"] == "").all():
        frame = assign_splits(frame, fractions=fractions, seed=seed)
    return finish(frame, source=f"manifest of {path}", seed=seed, failures=gone)


def _read(
    path: Path, named: Mapping[str, str], label_of: Mapping[str, str], separator: str
) -> tuple[pd.DataFrame, list[str]]:
    """The table under our names (labels as "label <name>"), and its metadata columns."""
    with path.open(encoding="utf-8-sig") as handle:
        header = [name.strip('"') for name in handle.readline().rstrip("\r\n").split(separator)]
    clash = [name for name in label_of if name in FIXED or name.startswith(META)]
    if clash:
        raise ManifestError(
            f"{path}: a label cannot be called {clash[0]!r}; give it another name: labels={{name: column}}"
        )
    metadata = [name for name in header if name.startswith(META)]
    wanted = {theirs: ours for ours, theirs in named.items()}
    for name, column in label_of.items():
        if column in wanted:
            raise ManifestError(f"{path}: column {column!r} is given as {wanted[column]} and as label {name!r}")
        wanted[column] = f"label {name}"
    free = {name: name for name in (*COLUMNS, *metadata) if name in header and name not in (*named, *wanted)}
    remedy = "Name your columns by the options columns and labels"
    return read_table(path, {**wanted, **free}, separator=separator, remedy=remedy), metadata


def _relative(cells: pd.Series, root: Path) -> pd.Series:
    """Paths that begin with the root's own path are cut to what stands below it."""
    start = f"{root.absolute().as_posix()}/"
    parts = cells.str.split(";")
    return parts.map(lambda files: ";".join(file.strip().removeprefix(start) for file in files))


def _check(path: Path, rows: pd.DataFrame, theirs: Mapping[str, str]) -> None:
    images = rows["image"].str.split(";").explode()
    check_paths(path, theirs["image"], images)
    if "study" in rows:
        check_unique(path, theirs["study"], rows["study"])
    if "patient" in rows:
        empty = rows["patient"].str.strip() == ""
        check_cells(path, theirs["patient"], rows["patient"], ~empty, "give every study its patient")
    if "split" in rows:
        known = rows["split"].str.strip().str.lower().isin(SPLIT_NAMES)
        check_cells(path, theirs["split"], rows["split"], known, f"a split is one of {', '.join(SPLIT_NAMES)}")
    if "view" in rows:
        good = rows["view"].str.upper().str.split(";").map(lambda names: set(names) <= {*VIEWS, ""})
        check_cells(path, theirs["view"], rows["view"], good, f"a view is one of {', '.join(VIEWS)}")


def _frame(path: Path, rows: pd.DataFrame, label_of: Mapping[str, str], pattern: str) -> pd.DataFrame:
    counts = rows["image"].str.count(";") + 1
    views = rows.get("view", pd.Series("", index=rows.index)).str.upper()
    unknown = counts.map(lambda n: ";".join(["FRONTAL"] * n))
    frame = pd.DataFrame(
        {
            "study_id": rows.get("study", rows["image"].str.replace(";", "+")),
            "patient_id": _patients(path, rows, pattern),
            "split": rows.get("split", pd.Series("", index=rows.index))
            .str.strip()
            .str.lower()
            .map(SPLIT_NAMES)
            .fillna(""),
            "images": rows["image"],
            "views": views.where(views.str.strip(";") != "", unknown),
            "findings": rows.get("findings", "").str.strip() if "findings" in rows else "",
            "impression": rows.get("impression", "").str.strip() if "impression" in rows else "",
        }
    )
    for name, column in label_of.items():
        cells = rows[f"label {name}"].str.strip().str.lower()
        known = cells.isin(LABEL_VALUES)
        check_cells(path, column, rows[f"label {name}"], known, "a label is 1, 0, -1 or blank (or yes, no, uncertain)")
        frame[name] = cells.map(LABEL_VALUES).astype(float)
    return frame


def _patients(path: Path, rows: pd.DataFrame, pattern: str) -> pd.Series:
    if "patient" in rows:
        return rows["patient"].str.strip()
    if pattern:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"patient_pattern {pattern!r} is no regular expression ({error})") from error
        if groups < 1:
            raise ValueError(f"patient_pattern {pattern!r} needs a group, such as '(p[0-9]+)/'")
        found = rows["image"].str.extract(pattern)[0]
        good = found.notna() & (found != "")
        check_cells(path, "image", rows["image"], good, f"patient_pattern {pattern!r} finds no patient in the path")
        return found
    near = difflib.get_close_matches("patient", [str(name) for name in rows.columns], 1, cutoff=0.5)
    warnings.warn(
        f"{path}: no column says the patient{f' (is it {near[0]!r}?)' if near else ''}, so every row is one. If people "
        "have several images, name the column, columns={'patient': ...}, or give patient_pattern",
        stacklevel=3,
    )
    return rows.get("study", rows["image"])
