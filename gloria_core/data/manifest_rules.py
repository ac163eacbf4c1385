"""What a manifest may contain: a pandera schema built for one frame, and the failures it finds, one per cell.

`gloria_core.data.manifest` is the door to this module; nobody else needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import pandera.pandas as pa

from gloria_core.data.manifest_entries import box_problem, json_problems, mask_problem, path_problem

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
