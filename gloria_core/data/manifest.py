"""The manifest: one CSV row per study, checked when it is written and when it is read.

Columns, in order: the fixed head (`study_id ... label_rank`), one column per label, `boxes`, `masks`, then metadata
whose names begin with `meta_`. Labels are 1 present, 0 absent, -1 uncertain, blank unknown (the CheXpert convention,
Irvin et al. 2019, https://arxiv.org/abs/1901.07031). Label columns that are targets but no findings begin with `is_`
(`is_ap_view`, `is_male`). Everything else is text: a patient "00012" stays "00012", and a report "NA" stays "NA".

What may stand inside one cell of a manifest: a path, a JSON list of boxes, a JSON list of masks.

What a manifest may contain: a pandera schema built for one frame, and the failures it finds, one per cell.

`gloria_core.data.manifest` is the door to this module; nobody else needs it.

Do the files that a manifest names exist, and do they lie under the dataset's root?
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pandera.pandas as pa

from gloria_core.data.files import atomic_write, file_hash


def path_problem(path: str) -> str | None:
    """Why `path` is no plain relative posix path below the root, or None if it is one."""
    if not path or path != path.strip():
        return "is empty or has spaces around it"
    if "\\" in path:
        return "has a backslash; write folders with /"
    if path.startswith("/") or path[1:2] == ":" or path.startswith("~"):
        return "is absolute; give it relative to the dataset's root"
    parts = path.split("/")
    if ".." in parts:
        return "escapes the root with '..'; give a path below the dataset's root"
    if "." in parts or "" in parts:
        return "is not in plain form; write it without '.' and double slashes"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _entry_problem(entry: object, n_images: int) -> str | None:
    """Faults that boxes and masks share: the form of the entry, its label and its image number."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object"
    if not isinstance(entry.get("label"), str) or not entry["label"]:
        return "an entry has no 'label'"
    image = entry.get("image")
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < n_images:
        return f"'image' is {image!r}; it must count the study's images from 0 to {n_images - 1}"
    return None


def box_problem(entry: object, n_images: int, texts: dict[str, str]) -> str | None:
    problem = _entry_problem(entry, n_images)
    if problem:
        return problem
    box = entry.get("xywh")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"'xywh' is {box!r}; it must be four numbers [x, y, width, height]"
    return None if box[2] > 0 and box[3] > 0 else f"'xywh' is {box!r}; width and height must be positive"


def mask_problem(entry: object, n_images: int, texts: dict[str, str]) -> str | None:
    problem = _entry_problem(entry, n_images)
    if problem:
        return problem
    path = entry.get("path")
    if not isinstance(path, str):
        return f"'path' is {path!r}; it must be the mask's path below the root"
    if path_problem(path):
        return f"path {path!r} {path_problem(path)}"
    spans = entry.get("spans", [])
    for span in spans if isinstance(spans, list) else [spans]:
        good = isinstance(span, list) and len(span) == 3 and span[0] in texts and all(map(_is_number, span[1:]))
        if not good or not 0 <= span[1] < span[2] <= len(texts[span[0]]):
            return f"span {span!r} must be [section, start, end] inside that section's text"
    return None


def json_problems(frame: pd.DataFrame, column: str, check: Callable) -> dict[int, str]:
    """Row position -> fault, of one column of JSON lists; empty cells are fine."""
    problems: dict[int, str] = {}
    cells = frame[column].to_numpy(object)
    for position in np.flatnonzero(frame[column].notna() & (frame[column] != "")):
        row = frame.iloc[position]
        texts = {section: str(row[section]) for section in ("findings", "impression")}
        try:
            entries = json.loads(cells[position])
        except (ValueError, TypeError) as error:
            problems[int(position)] = f"not JSON ({error}); leave the cell empty if there are none"
            continue
        if not isinstance(entries, list):
            problems[int(position)] = "must be a JSON list of objects"
            continue
        n_images = str(row["images"]).count(";") + 1
        found = next(filter(None, (check(entry, n_images, texts) for entry in entries)), None)
        if found:
            problems[int(position)] = found
    return problems


HEAD = ("study_id", "patient_id", "split", "images", "views", "findings", "impression", "label_rank")
TAIL = ("boxes", "masks")
FIXED = HEAD + TAIL
TEXT_COLUMNS = tuple(name for name in FIXED if name != "label_rank")
SPLITS = ("train", "valid", "test")
VIEWS = ("PA", "AP", "FRONTAL", "LATERAL")
META = "meta_"

SHOWN = 10
"""Failures spelt out in one error; the rest are counted."""


class ManifestError(ValueError):
    """A manifest breaks the schema; the message names the file, CSV row (header = row 1), column, value and remedy."""


@dataclass(frozen=True)
class Failure:
    """One bad cell. `row` counts as in a spreadsheet: the header is row 1, the first study row 2."""

    study_id: str
    row: int
    column: str
    value: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} (study {self.study_id!r}), column {self.column!r}: {self.value} - {self.reason}"


class ExcludedRows(list):
    """The list in `frame.attrs["excluded"]`: dicts of study_id, row, column, reason.

    pandas copies `attrs` deeply at every step; this list is shared instead, for it can be as long as the dataset.
    """

    def __deepcopy__(self, memo: dict) -> ExcludedRows:
        return self

    @classmethod
    def of(cls, failures: Sequence[Failure]) -> ExcludedRows:
        """The failures in the order of their rows."""
        return cls(
            {"study_id": f.study_id, "row": f.row, "column": f.column, "reason": f"{f.value} - {f.reason}"}
            for f in sorted(failures, key=lambda failure: failure.row)
        )


def label_columns(frame: pd.DataFrame) -> list[str]:
    """Names of the label columns, in the order of the frame: neither fixed nor beginning with `meta_`."""
    return [name for name in frame.columns if name not in FIXED and not name.startswith(META)]


def split_cell(cell: str) -> list[str]:
    """The entries of a `;`-joined cell; an empty cell has none."""
    return cell.split(";") if cell else []


def raise_failures(failures: Sequence[Failure], *, source: str) -> None:
    """Raise one ManifestError that lists the first failures and counts the others; nothing to do without failures."""
    if not failures:
        return
    ordered = sorted(failures, key=lambda failure: failure.row)
    lines = [f"{source}: {len(ordered)} problem{'s' if len(ordered) > 1 else ''} in the manifest"]
    lines += [f"  {failure}" for failure in ordered[:SHOWN]]
    if len(ordered) > SHOWN:
        lines.append(f"  and {len(ordered) - SHOWN} more")
    raise ManifestError("\n".join(lines))


def _images_problem(cell: str) -> str | None:
    """The first fault of an `images` cell."""
    if not cell:
        return "no image; a study needs at least one path"
    for path in cell.split(";"):
        problem = path_problem(path)
        if problem:
            return f"path {path!r} {problem}"
    return None


def _cell_problems(frame: pd.DataFrame) -> dict[str, dict[int, str]]:
    """Column -> row position -> fault, for the faults whose wording depends on the cell or on other rows."""
    images = frame["images"].fillna("").to_numpy(object)
    views = frame["views"].fillna("").to_numpy(object)
    bad_images = {i: text for i, cell in enumerate(images) if (text := _images_problem(cell))}
    bad_views = {}
    for position, (image_cell, view_cell) in enumerate(zip(images, views, strict=True)):
        names, n_images = split_cell(view_cell), image_cell.count(";") + 1
        if len(names) != n_images:
            bad_views[position] = f"{len(names)} views for {n_images} images; give one view an image"
        elif not set(names) <= set(VIEWS):
            bad_views[position] = f"a view must be one of {', '.join(VIEWS)}"
    patients = frame["patient_id"].where(frame["patient_id"] != "")
    splits = frame["split"].where(frame["split"].isin(SPLITS))
    ranks = pd.to_numeric(frame["label_rank"], errors="coerce")
    ranks = ranks.where(ranks.between(0, 1, inclusive="left"))
    rows = pd.Series(range(len(frame)))
    return {
        "study_id": _differing(frame["study_id"], rows, "duplicate study_id; give every study its own"),
        "patient_id": _differing(patients, splits, "patient in two splits; keep a patient in one"),
        "images": _shared_images(frame["images"], splits, frame["patient_id"]) | bad_images,
        "views": bad_views,
        "label_rank": _differing(patients, ranks, "label_rank differs within the patient; use assign_label_ranks"),
        "boxes": json_problems(frame, "boxes", box_problem),
        "masks": json_problems(frame, "masks", mask_problem),
    }


def _differing(key: pd.Series, value: pd.Series, reason: str) -> dict[int, str]:
    """Row positions whose `value` is not that of the first row with the same `key`; the first row stands.

    Rows without a key or with a value that is missing (or was found bad before) are not compared.
    """
    table = pd.DataFrame({"key": key.to_numpy(object), "value": value.to_numpy(object)}).dropna()
    first = table.groupby("key", sort=False)["value"].transform("first")
    different = table.index[table["value"] != first]
    if different.empty:
        return {}
    starts = table.reset_index().groupby("key", sort=False)["index"].first()
    return {
        int(position): f"{reason} (first seen in row {starts[table['key'][position]] + 2}{_shown(first[position])})"
        for position in different
    }


def _shown(value: object) -> str:
    """The value that the first row has, where it says more than the row's number."""
    return "" if isinstance(value, int) else f" with {value}"


def torn_ids(patients: pd.Series, splits: pd.Series) -> pd.Series:
    """Ids for what a published split tears apart: "p" becomes "p (train)" and "p (test)"."""
    return patients + _torn_mark(splits)


def _torn_mark(splits: pd.Series) -> pd.Series:
    return " (" + splits.astype(str) + ")"


def _torn_from(patients: pd.Series, splits: pd.Series) -> pd.Series:
    """What each id was before `torn_ids`; missing for an id without the mark of its split."""
    pairs = zip(patients.astype(str), _torn_mark(splits), strict=True)
    return pd.Series([name.removesuffix(mark) if name.endswith(mark) else None for name, mark in pairs], patients.index)


def _shared_images(images: pd.Series, splits: pd.Series, patients: pd.Series) -> dict[int, str]:
    """Rows with an image that an earlier row of another split has as well: a leak that patient ids do not show.

    It is no fault where they show it: all studies with that image are of one patient torn apart (`torn_ids`).
    """
    paths = images.fillna("").str.split(";").explode()
    owners = paths.index.to_numpy()
    found = _differing(paths, splits.loc[owners], "image is in two splits; keep it in one")
    if not found:
        return {}
    paths = paths.reset_index(drop=True)
    shared = paths[paths.isin(paths[list(found)])]
    whole = _torn_from(patients, splits).loc[owners[shared.index]].groupby(shared.to_numpy(), dropna=False)
    named = whole.agg(lambda names: names.notna().all() and names.nunique() == 1)
    return {
        int(owners[place]): text.partition(" (first seen")[0]
        for place, text in found.items()
        if not named[paths[place]]
    }


def _schema(frame: pd.DataFrame, problems: dict[str, dict[int, str]]) -> pa.DataFrameSchema:
    """The schema of this frame: simple rules by value, the others from the row positions in `problems`."""

    def check(rule: Callable[[pd.Series], pd.Series], reason: str) -> pa.Check:
        return pa.Check(rule, error=reason, ignore_na=False)

    rank = check(
        lambda s: pd.to_numeric(s, errors="coerce").between(0, 1, inclusive="left"),
        "label_rank must be a number in [0, 1); use assign_label_ranks",
    )
    label = check(
        lambda s: s.isna() | s.isin([1, 0, -1]),
        "a label is 1 (present), 0 (absent), -1 (uncertain) or blank; name a column of other data meta_<name>",
    )
    rules: dict[str, list[pa.Check]] = {name: [] for name in frame.columns if not name.startswith(META)}
    for name in TEXT_COLUMNS:
        rules[name].append(
            check(lambda s: s.map(lambda v: isinstance(v, str)).astype(bool), "must be text, '' if empty")
        )
    for name in ("study_id", "patient_id"):
        rules[name].append(check(lambda s: s.fillna("x").astype(str).str.strip() != "", f"{name} is empty; give one"))
    rules["split"].append(check(lambda s: s.isin(SPLITS), f"split must be one of {', '.join(SPLITS)}; rename it"))
    rules["label_rank"].append(rank)
    for name in label_columns(frame):
        rules[name].append(label)
    for name, found in problems.items():
        rules[name].append(check(lambda s, found=found: ~s.index.to_series().isin(list(found)), f"problems:{name}"))
    columns = {name: pa.Column(checks=checks, nullable=True) for name, checks in rules.items()}
    return pa.DataFrameSchema(columns)


def find_failures(frame: pd.DataFrame, *, source: str) -> list[Failure]:
    """Every bad cell of a frame whose index is 0..n-1, in no order. Missing columns and no rows raise at once."""
    missing = [name for name in FIXED if name not in frame.columns]
    if missing:
        raise ManifestError(
            f"{source}: row 1 (the header) lacks column {', '.join(map(repr, missing))}; "
            f"add it (cells may be empty for findings, impression, boxes, masks). Required: {', '.join(FIXED)}"
        )
    if frame.empty:
        raise ManifestError(f"{source}: the manifest has no rows; it needs at least one study below the header")
    problems = _cell_problems(frame)
    try:
        _schema(frame, problems).validate(frame, lazy=True)
    except pa.errors.SchemaErrors as errors:
        cases = errors.failure_cases
    else:
        return []
    failures = []
    for column, reason, position in zip(cases["column"], cases["check"], cases["index"], strict=True):
        text = problems[column][int(position)] if str(reason).startswith("problems:") else str(reason)
        failures.append(failure_at(frame, int(position), column, text))
    return failures


def failure_at(frame: pd.DataFrame, position: int, column: str, reason: str) -> Failure:
    """The failure of the cell at row `position`; a long cell is shortened."""
    value = repr(frame[column].iloc[position])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return Failure(str(frame["study_id"].iloc[position]), int(frame.index[position]) + 2, column, shown, reason)


def _folder_contents(folder: Path, wanted: set[str], real_root: str) -> tuple[set[str], set[str]]:
    """Of the `wanted` names: those that are files of `folder`, and those that a symlink leads out of the root."""
    if not folder.is_dir():
        return set(), set()
    inside = os.path.join(real_root, "")  # noqa: PTH118 - string prefix with a separator at its end
    if not os.path.join(os.path.realpath(folder), "").startswith(inside):  # noqa: PTH118
        return set(), wanted
    files, escaping = set(), set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in wanted or not entry.is_file():
                continue
            leads_out = entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside)
            (escaping if leads_out else files).add(entry.name)
    return files, escaping


def file_failures(frame: pd.DataFrame, root: Path, *, skip: set[int]) -> list[Failure]:
    """Images and masks that do not exist below `root` or that a symlink leads out of it.

    One directory listing per folder instead of one look-up per file: network disks have slow look-ups.
    `skip` holds row positions whose paths are known to be bad.
    """
    if not root.is_dir():
        raise ManifestError(
            f"the dataset's root {root} is not a folder; give the folder that the image paths start from"
        )
    listed: list[tuple[int, str, str]] = []
    for position, cell in enumerate(frame["images"].to_numpy(object)):
        if position not in skip:
            listed += [(position, "images", path) for path in cell.split(";")]
    for position in np.flatnonzero(frame["masks"] != ""):
        if int(position) not in skip:
            listed += [(int(position), "masks", m["path"]) for m in json.loads(frame["masks"].iloc[position])]
    wanted: dict[str, set[str]] = {}
    for _, _, path in listed:
        folder, _, name = path.rpartition("/")
        wanted.setdefault(folder, set()).add(name)
    real_root = os.path.realpath(root)
    state = {folder: _folder_contents(root / folder, names, real_root) for folder, names in wanted.items()}
    failures = []
    for position, column, path in listed:
        folder, _, name = path.rpartition("/")
        files, escaping = state[folder]
        if name in escaping:
            reason = f"{path!r} is a symlink out of the root {root}; copy the file or choose the root it lies under"
        elif name not in files:
            reason = f"file {path!r} not found under {root}; check the root, or read with on_error='exclude'"
        else:
            continue
        failures.append(failure_at(frame, position, column, reason))
    return failures


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
    """Check `frame`, write it atomically and return its `file_hash`. Equal content gives equal bytes everywhere.

    Rows keep their order. Line ends are \\n, labels 1/0/-1/blank, other numbers in shortest exact form.
    """
    path = Path(path)
    clean = validate(frame, source=str(path))
    for name in label_columns(clean):
        clean[name] = clean[name].map({1.0: "1", 0.0: "0", -1.0: "-1"}).astype(object).where(clean[name].notna(), "")
    clean["label_rank"] = [repr(float(value)) for value in clean["label_rank"]]
    atomic_write(path, clean.to_csv(index=False, lineterminator="\n"))
    return file_hash(path)


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
