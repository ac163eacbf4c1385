"""The manifest: one CSV row per study, checked when it is written and when it is read.

Columns, in order: the fixed head (`study_id ... label_rank`), one column per label, `boxes`, `masks`, then metadata
whose names begin with `meta_`. Labels are 1 present, 0 absent, -1 uncertain, blank unknown (the CheXpert convention,
Irvin et al. 2019, https://arxiv.org/abs/1901.07031). Label columns that are targets but no findings begin with `is_`
(`is_ap_view`, `is_male`). Everything else is text: a patient "00012" stays "00012", and a report "NA" stays "NA".
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest_files import file_failures
from gloria_core.data.manifest_rules import (
    FIXED,
    HEAD,
    META,
    SPLITS,
    TAIL,
    TEXT_COLUMNS,
    VIEWS,
    ExcludedRows,
    Failure,
    ManifestError,
    failure_at,
    find_failures,
    label_columns,
    raise_failures,
    split_cell,
)

__all__ = [
    "CHEXPERT_LABELS",
    "COMPETITION_LABELS",
    "FIXED",
    "SPLITS",
    "VIEWS",
    "ManifestError",
    "boxes_of",
    "finding_columns",
    "label_columns",
    "manifest_hash",
    "masks_of",
    "read_manifest",
    "require_text",
    "split_cell",
    "validate",
    "write_manifest",
]

CHEXPERT_LABELS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
COMPETITION_LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")

OnError = Literal["raise", "exclude"]

_LABEL_TEXT = {"": np.nan, "1": 1.0, "0": 0.0, "-1": -1.0, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0}


def finding_columns(frame: pd.DataFrame) -> list[str]:
    """Label columns that are findings: without those that begin with `is_`."""
    return [name for name in label_columns(frame) if not name.startswith("is_")]


def validate(frame: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Check a frame against the schema; return it in canonical column order and types, rows numbered from 0.

    Raises ManifestError naming `source`, the row as it would stand in the CSV, column, value and remedy.
    """
    clean = _canonical(frame)
    raise_failures(find_failures(clean, source=source), source=source)
    return _typed(clean)


def read_manifest(path: Path | str, *, root: Path | str | None = None, on_error: OnError = "raise") -> pd.DataFrame:
    """Read and check a manifest; with `root`, also that every image and mask file exists and lies under it.

    on_error="exclude" leaves out the rows that fail and lists them in `frame.attrs["excluded"]` as dicts of
    study_id, row, column, reason (of duplicates, the first row stands). The kept rows keep their index, so
    index + 2 is always the row of the CSV. A missing column cannot be excluded and raises.
    Raises ManifestError; FileNotFoundError where there is no such file.
    """
    if on_error not in ("raise", "exclude"):
        raise ValueError(f"on_error must be 'raise' or 'exclude', not {on_error!r}")
    path = Path(path)
    frame = _canonical(_read_text(path))
    failures = find_failures(frame, source=str(path))
    if root is not None:
        bad_paths = {failure.row - 2 for failure in failures if failure.column in ("images", "masks")}
        failures += file_failures(frame, Path(root), skip=bad_paths)
    bad = np.isin(frame.index, [failure.row - 2 for failure in failures])
    return _typed(_settle(frame, failures, bad, source=str(path), on_error=on_error))


def write_manifest(frame: pd.DataFrame, path: Path | str) -> str:
    """Check `frame`, write it atomically and return its `manifest_hash`. Equal content gives equal bytes everywhere.

    Rows keep their order. Line ends are \\n, labels 1/0/-1/blank, other numbers in shortest exact form.
    """
    path = Path(path)
    clean = validate(frame, source=str(path))
    for name in label_columns(clean):
        clean[name] = clean[name].map({1.0: "1", 0.0: "0", -1.0: "-1"}).astype(object).where(clean[name].notna(), "")
    clean["label_rank"] = [repr(float(value)) for value in clean["label_rank"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as handle:
            clean.to_csv(handle, index=False, lineterminator="\n")
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return manifest_hash(path)


def manifest_hash(path: Path | str) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def require_text(
    frame: pd.DataFrame,
    section: Literal["findings", "impression", "both"],
    *,
    source: str,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """Rows of `frame` that have text in `section` ("both": in at least one of the two sections).

    The schema allows empty reports; whoever trains on text asks here. Raises ManifestError naming the empty rows,
    or with on_error="exclude" leaves them out and adds them to `attrs["excluded"]`.
    """
    if section not in ("findings", "impression", "both"):
        raise ValueError(f"section must be 'findings', 'impression' or 'both', not {section!r}")
    columns = ["findings", "impression"] if section == "both" else [section]
    empty = np.ones(len(frame), bool)
    for column in columns:
        empty &= (frame[column].str.strip() == "").to_numpy(bool)
    reason = (
        f"empty report: no text in {' or '.join(columns)}; add it, choose another section or use on_error='exclude'"
    )
    failures = [failure_at(frame, int(position), columns[-1], reason) for position in np.flatnonzero(empty)]
    return _settle(frame, failures, empty, source=source, on_error=on_error)


def boxes_of(row: Mapping[str, Any]) -> list[dict]:
    """The boxes of one row: dicts of label, image, xywh (pixels of that image file)."""
    return json.loads(row["boxes"]) if row["boxes"] else []


def masks_of(row: Mapping[str, Any]) -> list[dict]:
    """The masks of one row: dicts of label, image, path and, where given, side and spans."""
    return json.loads(row["masks"]) if row["masks"] else []


def _read_text(path: Path) -> pd.DataFrame:
    """The CSV as text cells. Only what is wrong with the file as a table is raised here."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.reader(handle, strict=True))
    except csv.Error as error:
        raise ManifestError(f'{path}: not a table ({error}); close every quote, write " in a text as ""') from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from error
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise ManifestError(f"{path}: the file is empty; a manifest begins with a header: {', '.join(FIXED)}")
    header, *body = rows
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise ManifestError(f"{path}: row 1 (the header) has column {repeated!r} twice; rename or remove one")
    for number, cells in enumerate(body, start=2):
        if len(cells) != len(header):
            found = f"has {len(cells)} cells, the header {len(header)}" if cells else "is an empty line"
            raise ManifestError(f"{path}: row {number} {found}; put texts with commas in quotes, remove empty lines")
    return pd.DataFrame(body, columns=header, dtype=str)


def _canonical(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy in canonical column order, numbers as numbers where they are numbers, metadata as text, index 0..n-1."""
    labels = label_columns(frame)
    meta = [name for name in frame.columns if name.startswith(META)]
    order = [*(n for n in HEAD if n in frame), *labels, *(n for n in TAIL if n in frame), *meta]
    clean = frame[order].reset_index(drop=True)
    clean.attrs = {}
    for name in labels:
        clean[name] = _as_labels(clean[name])
    if "label_rank" in clean:
        numbers = pd.to_numeric(clean["label_rank"], errors="coerce")
        clean["label_rank"] = numbers if numbers.notna().all() else clean["label_rank"].astype(object)
    for name in meta:
        if not isinstance(clean[name].dtype, pd.StringDtype) or clean[name].isna().any():
            clean[name] = pd.Series([_as_text(value) for value in clean[name]], index=clean.index, dtype=str)
    return clean


def _as_labels(column: pd.Series) -> pd.Series:
    """float64 where every cell is a label; otherwise the cells as they are, for the schema to name."""
    if pd.api.types.is_numeric_dtype(column):
        return column.astype(float)
    known = column.isin(list(_LABEL_TEXT)) | column.isna()
    numbers = column.astype(object).map(_LABEL_TEXT).astype(float)
    if known.all():
        return numbers
    mixed = numbers.astype(object)
    mixed[~known] = column[~known]
    return mixed if mixed[~known].map(lambda v: isinstance(v, str)).any() else pd.to_numeric(mixed)


def _as_text(value: object) -> str:
    """A metadata cell: text as it is, missing as "", whole numbers without a point, others in shortest exact form."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, float | np.floating):
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    return str(value)


def _typed(frame: pd.DataFrame) -> pd.DataFrame:
    """A checked frame with float64 labels and ranks, everything else text."""
    numbers = dict.fromkeys([*label_columns(frame), "label_rank"], float)
    return frame.astype({**dict.fromkeys(TEXT_COLUMNS, str), **numbers})


def _settle(
    frame: pd.DataFrame, failures: Sequence[Failure], bad: np.ndarray, *, source: str, on_error: OnError
) -> pd.DataFrame:
    """Raise the failures, or leave the rows where `bad` out and list them."""
    if on_error == "raise":
        raise_failures(failures, source=source)
    elif bad.all():
        raise_failures(failures, source=f"{source}: nothing left after exclusion")
    kept = frame[~bad].copy()
    kept.attrs["excluded"] = ExcludedRows([*frame.attrs.get("excluded", []), *ExcludedRows.of(failures)])
    return kept
