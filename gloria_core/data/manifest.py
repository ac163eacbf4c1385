"""The manifest: one CSV row per study, checked when it is written and when it is read.

Columns, in order: the fixed ones from `study_id` to `label_rank`, one column per label, `boxes`, `masks`, then metadata
whose names begin with `meta_`. `Row` says what a fixed column may hold. Labels are 1 present, 0 absent, -1 uncertain,
blank unknown (the CheXpert convention, Irvin et al. 2019, https://arxiv.org/abs/1901.07031). Label columns that are
targets but no findings begin with `is_` (`is_ap_view`, `is_male`). Everything else is text: a patient "00012" stays
"00012", and a report "NA" stays "NA".
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pydantic
from pydantic import BaseModel, Field, FiniteFloat, Json, StringConstraints, TypeAdapter, ValidationError, validate_call
from pydantic.functional_validators import AfterValidator, BeforeValidator, field_validator

from gloria_core.data.files import atomic_write, existing, file_hash

# Irvin et al. 2019, table 1; and the five findings of CheXpert's competition
CHEXPERT_LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
COMPETITION_LABELS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")

OnError = Literal["raise", "exclude"]
Split = Literal["train", "valid", "test"]
View = Literal["PA", "AP", "FRONTAL", "LATERAL"]
SPLITS, VIEWS = Split.__args__, View.__args__
META = "meta_"
SPLIT_MARK = " ({split})"  # follows the id of a patient whom a published split has in two splits: `ids_by_split`
LABEL_CELLS = {"": np.nan, "1": 1.0, "0": 0.0, "-1": -1.0, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0}
_FAILURES_SHOWN = 10


class ManifestError(ValueError):
    """A manifest breaks the schema; the message names the file, CSV row (header = row 1), column, value and remedy."""


# ------------------------------------------------------------------------------------------------------ the schema


_PATH_PROBLEMS = {
    r"\s|.*\s\Z|\Z": "is empty or has spaces around it",
    r".*\\": "has a backslash; write folders with /",
    r"[/~]|.:": "is absolute; give it relative to the dataset's root",
    r"(.*/)?\.\.(/|$)": "escapes the root with '..'; give a path below the dataset's root",
    r"(.*/)?\.?(/|$)": "is not in plain form; write it without '.' and double slashes",
}


def path_problem(path: str) -> str | None:
    """Why `path` is no plain relative posix path below the root, or None if it is one."""
    return next((problem for pattern, problem in _PATH_PROBLEMS.items() if re.match(pattern, path, re.DOTALL)), None)


def _plain_path(path: str) -> str:
    if problem := path_problem(path):
        raise ValueError(f"path {path!r} {problem}")
    return path


def split_cell(cell: str) -> list[str]:
    """The entries of a `;`-joined cell; an empty cell has none."""
    return cell.split(";") if cell else []


RelativePath = Annotated[str, AfterValidator(_plain_path)]
Id = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Side = Annotated[FiniteFloat, Field(gt=0)]
Joined = BeforeValidator(lambda cell: split_cell(cell) if isinstance(cell, str) else cell)
JsonList = BeforeValidator(lambda cell: "[]" if cell == "" else cell)


class Box(BaseModel, strict=True):
    """`xywh` are left, top, width and height in pixels of image file number `image` of the study."""

    label: Annotated[str, Field(min_length=1)]
    image: int
    xywh: tuple[FiniteFloat, FiniteFloat, Side, Side]


class Mask(BaseModel, strict=True):
    """`spans` are the (section, start, end) of the report that the mask shows."""

    label: Annotated[str, Field(min_length=1)]
    image: int
    path: RelativePath
    spans: list[tuple[Literal["findings", "impression"], Annotated[int, Field(ge=0)], int]] = []


class Row(BaseModel, strict=True):
    """The fixed columns of one row. A failure is reported with the description of its column."""

    study_id: Id = Field(description="give every study an id of its own")
    patient_id: Id = Field(description="give all studies of a patient the same id")
    split: Split = Field(description="rename it")
    images: Annotated[list[RelativePath], Field(min_length=1), Joined] = Field(
        description="give a study at least one path, several joined by ';'"
    )
    views: Annotated[list[View], Joined] = Field(description="give one view an image, joined by ';'")
    findings: str = Field(description="must be text, '' if empty")
    impression: str = Field(description="must be text, '' if empty")
    label_rank: float = Field(ge=0, lt=1, description="must be a number in [0, 1); use assign_label_ranks")
    boxes: Annotated[Json[list[Box]], JsonList] = Field(
        description='give a JSON list of {"label", "image", "xywh": four numbers}, or leave the cell empty'
    )
    masks: Annotated[Json[list[Mask]], JsonList] = Field(
        description='give a JSON list of {"label", "image", "path"}, or leave the cell empty'
    )

    @field_validator("views")
    @classmethod
    def _one_view_an_image(cls, views: list[View], info: pydantic.ValidationInfo) -> list[View]:
        if "images" in info.data and len(views) != len(info.data["images"]):
            raise ValueError(f"{len(views)} views for {len(info.data['images'])} images")
        return views

    @field_validator("boxes", "masks")
    @classmethod
    def _of_this_study(cls, entries: list[Box | Mask], info: pydantic.ValidationInfo) -> list[Box | Mask]:
        count = len(info.data.get("images", ()))
        for entry in entries:
            if count and not 0 <= entry.image < count:
                raise ValueError(f"'image' is {entry.image}; it must count the study's images from 0 to {count - 1}")
            for section, start, end in getattr(entry, "spans", ()):
                if not start < end <= len(info.data.get(section, "")):
                    raise ValueError(f"span {[section, start, end]} must lie inside the text of {section}")
        return entries


FIXED = tuple(Row.model_fields)
_ROWS = TypeAdapter(list[Row])


def label_columns(frame: pd.DataFrame) -> list[str]:
    """Names of the label columns, in the order of the frame: neither fixed nor beginning with `meta_`."""
    return [name for name in frame.columns if name not in FIXED and not name.startswith(META)]


def finding_columns(frame: pd.DataFrame) -> list[str]:
    """Label columns that are findings: without those that begin with `is_`."""
    return [name for name in label_columns(frame) if not name.startswith("is_")]


def boxes_of(row: Mapping[str, Any]) -> list[dict]:
    """The boxes of one row: dicts of label, image, xywh (pixels of that image file)."""
    return json.loads(row["boxes"]) if row["boxes"] else []


def masks_of(row: Mapping[str, Any]) -> list[dict]:
    """The masks of one row: dicts of label, image, path and, where given, side and spans."""
    return json.loads(row["masks"]) if row["masks"] else []


# -------------------------------------------------------------------------------------------------------- failures


class Failure(NamedTuple):
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

    def __deepcopy__(self, memo: dict) -> "ExcludedRows":
        return self

    @classmethod
    def of(cls, failures: Sequence[Failure]) -> "ExcludedRows":
        """The failures in the order of their rows."""
        return cls(
            {"study_id": f.study_id, "row": f.row, "column": f.column, "reason": f"{f.value} - {f.reason}"}
            for f in sorted(failures, key=lambda failure: failure.row)
        )


def shorten(value: object) -> str:
    """Its `repr`, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(failures: Sequence[Failure]) -> str:
    """The first failures in the order of their rows, one a line, and how many more there are."""
    lines = [f"  {failure}" for failure in sorted(failures, key=lambda failure: failure.row)]
    more = [f"  and {len(lines) - _FAILURES_SHOWN} more"] if len(lines) > _FAILURES_SHOWN else []
    return "\n".join([*lines[:_FAILURES_SHOWN], *more])


def raise_failures(failures: Sequence[Failure], *, source: str) -> None:
    """Raise one ManifestError that lists the first failures and counts the others; nothing to do without failures."""
    if failures:
        title = f"{source}: {len(failures)} problem{'s'[: len(failures) > 1]} in the manifest"
        raise ManifestError(f"{title}\n{listed(failures)}")


def failures_at(frame: pd.DataFrame, faults: Sequence[tuple[int, str, str]]) -> list[Failure]:
    """A failure for each fault: position of the row, column, reason.

    A frame cut from a manifest keeps its integer index, and with it the rows of the CSV.
    """
    rows = frame.index if pd.api.types.is_integer_dtype(frame.index) else range(len(frame))
    studies = frame["study_id"].tolist()
    return [
        Failure(str(studies[i]), int(rows[i]) + 2, column, shorten(frame[column].iloc[i]), reason)
        for i, column, reason in faults
    ]


def _find_failures(frame: pd.DataFrame) -> list[Failure]:
    """Every bad cell of a canonical frame, in no order; a cell with several faults is listed with the first."""
    reasons: dict[tuple[int, str], str] = {}
    try:
        _ROWS.validate_python(frame[list(FIXED)].to_dict("records"))
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            position, column, *inside = fault["loc"]
            where = "".join(f"[{part!r}]" for part in inside) + ": " if inside else ""
            text = fault["msg"].removeprefix("Value error, ")
            reasons.setdefault((position, column), f"{where}{text}; {Row.model_fields[column].description}")
    rule = "a label is 1 (present), 0 (absent), -1 (uncertain) or blank; name a column of other data meta_<name>"
    for column in label_columns(frame):
        good = frame[column].isna() | frame[column].isin([1, 0, -1])
        reasons |= {(position, column): rule for position in np.flatnonzero(~good)}
    patients = frame["patient_id"].where(frame["patient_id"] != "")
    splits = frame["split"].where(frame["split"].isin(SPLITS))
    ranks = pd.to_numeric(frame["label_rank"], errors="coerce")
    ranks = ranks.where(ranks.between(0, 1, inclusive="left"))
    for column, conflicts, reason in (
        ("study_id", _conflicts(frame["study_id"], frame.index.to_series()), "duplicate study_id"),
        ("patient_id", _conflicts(patients, splits), "patient in two splits; keep a patient in one"),
        ("images", _images_in_two_splits(frame, splits), "image is in two splits; keep it in one"),
        ("label_rank", _conflicts(patients, ranks), "label_rank differs within the patient; use assign_label_ranks"),
    ):
        for position, first in conflicts.items():
            reasons.setdefault((position, column), f"{reason} (first seen in row {first + 2})")
    return failures_at(frame, [(int(position), column, reason) for (position, column), reason in reasons.items()])


def _conflicts(key: pd.Series, value: pd.Series) -> dict[int, int]:
    """Row -> the first row with the same `key`, where their values differ. Rows that lack either are not compared."""
    table = pd.DataFrame({"key": key.to_numpy(object), "value": value.to_numpy(object), "row": key.index}).dropna()
    first = table.groupby("key", sort=False)[["value", "row"]].transform("first")
    differs = table["value"] != first["value"]
    return dict(zip(table["row"][differs], first["row"][differs], strict=True))


def _images_in_two_splits(frame: pd.DataFrame, splits: pd.Series) -> dict[int, int]:
    """Rows with an image that an earlier row of another split has as well: a leak that patient ids do not show.

    It is no fault where they show it: all studies with that image are of one patient with marked ids
    (`SPLIT_MARK`).
    """
    marks = [SPLIT_MARK.format(split=split) for split in splits]
    pairs = zip(frame["patient_id"].astype(str), marks, strict=True)
    persons = [name.removesuffix(mark) if name.endswith(mark) else None for name, mark in pairs]
    paths = frame["images"].map(lambda cell: split_cell(cell) if isinstance(cell, str) else [])
    table = pd.DataFrame({"path": paths, "split": splits, "person": persons})
    table = table.explode("path").dropna(subset=["path", "split"])
    table = table[table.groupby("path")["split"].transform("nunique") > 1]
    persons = table.groupby("path")["person"]
    known = (persons.transform("nunique") == 1) & (persons.transform("count") == persons.transform("size"))
    return _conflicts(table["path"][~known], table["split"][~known])


def _missing_files(frame: pd.DataFrame, root: Path, *, skip: set[int]) -> list[Failure]:
    """Images and masks that are no files below `root`. `skip`: row positions whose paths are known to be bad."""
    if not root.is_dir():
        raise ManifestError(f"the root {root} is not a folder; give the folder that the image paths start from")
    rows = [position for position in range(len(frame)) if position not in skip]
    images, masks = frame["images"].to_numpy(object), frame["masks"].to_numpy(object)
    named = [(position, "images", path) for position in rows for path in images[position].split(";")]
    named += [(i, "masks", mask["path"]) for i in rows if masks[i] for mask in json.loads(masks[i])]
    present = existing(root, [path for _, _, path in named])
    remedy = f"not found under {root}; check it, or read with on_error='exclude'"
    missing = [(i, column, f"file {path!r} {remedy}") for i, column, path in named if path not in present]
    return failures_at(frame, missing)


# ------------------------------------------------------------------------------------------------ reading, writing


def validate(frame: pd.DataFrame, *, source: str) -> pd.DataFrame:
    """Check a frame against the schema; return it in canonical column order and types, rows numbered from 0.

    Raises ManifestError naming `source`, the row as it would stand in the CSV, column, value and remedy.
    """
    clean = _canonical(frame, source)
    raise_failures(_find_failures(clean), source=source)
    return _typed(clean)


@validate_call
def read_manifest(path: Path, *, root: Path | None = None, on_error: OnError = "raise") -> pd.DataFrame:
    """Read and check a manifest; with `root`, also that every image and mask file exists.

    on_error="exclude" leaves out the rows that fail and lists them in `frame.attrs["excluded"]` as dicts of
    study_id, row, column, reason (of duplicates, the first row stands). The other rows keep their index, so
    index + 2 is always the row of the CSV. A missing column cannot be excluded and raises.
    Raises ManifestError; FileNotFoundError where there is no such file.
    """
    frame = _canonical(_read_text(path), str(path))
    failures = _find_failures(frame)
    if root is not None:
        bad_paths = {failure.row - 2 for failure in failures if failure.column in ("images", "masks")}
        failures += _missing_files(frame, root, skip=bad_paths)
    if on_error == "raise":
        raise_failures(failures, source=str(path))
    good = frame.drop(index={failure.row - 2 for failure in failures})
    if good.empty:
        raise_failures(failures, source=f"{path}: nothing left after exclusion")
    good = _typed(good)
    good.attrs["excluded"] = ExcludedRows.of(failures)
    return good


def write_manifest(frame: pd.DataFrame, path: Path | str) -> str:
    """Check `frame`, write it atomically and return its `file_hash`. Equal content gives equal bytes everywhere.

    Rows keep their order. Line ends are \\n, labels 1/0/-1/blank, other numbers in shortest exact form.
    """
    clean = validate(frame, source=str(path))
    for name in label_columns(clean):
        clean[name] = clean[name].map({1.0: "1", 0.0: "0", -1.0: "-1"})
    atomic_write(path, clean.to_csv(index=False, lineterminator="\n"))
    return file_hash(path)


def _read_text(path: Path) -> pd.DataFrame:
    """The CSV as text cells. Only what is wrong with the file as a table is raised here."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.reader(handle, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        remedy = 'save it as UTF-8, close every quote, write " in a text as ""'
        raise ManifestError(f"{path}: not a table ({error}); {remedy}") from error
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
            fault = f"has {len(cells)} cells, the header {len(header)}" if cells else "is an empty line"
            raise ManifestError(f"{path}: row {number} {fault}; put texts with commas in quotes, remove empty lines")
    return pd.DataFrame(body, columns=header, dtype=str)


def _canonical(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """A copy in canonical column order, numbers as numbers where they are numbers, metadata as text, index 0..n-1.

    Raises ManifestError for missing columns and for a frame without rows.
    """
    missing = [name for name in FIXED if name not in frame.columns]
    if missing:
        remedy = f"add it (findings, impression, boxes and masks may be empty). Required: {', '.join(FIXED)}"
        raise ManifestError(f"{source}: row 1 (the header) lacks column {', '.join(map(repr, missing))}; {remedy}")
    if frame.empty:
        raise ManifestError(f"{source}: the manifest has no rows; it needs at least one study below the header")
    labels = label_columns(frame)
    meta = [name for name in frame.columns if name.startswith(META)]
    clean = frame[[*FIXED[:-2], *labels, *FIXED[-2:], *meta]].reset_index(drop=True)
    clean.attrs = {}
    for name in labels:
        if not pd.api.types.is_numeric_dtype(clean[name]):
            clean[name] = clean[name].astype(object).map(lambda cell: LABEL_CELLS.get(cell, cell))
    ranks = pd.to_numeric(clean["label_rank"], errors="coerce")
    clean["label_rank"] = ranks.astype(object).where(ranks.notna(), clean["label_rank"])
    for name in meta:
        clean[name] = pd.Series([_as_text(value) for value in clean[name]], dtype=str)
    return clean


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
    return frame.astype(dict.fromkeys(FIXED, str) | dict.fromkeys([*label_columns(frame), "label_rank"], float))
