"""Where a dataset keeps the image that its table calls by an id, and how large that file is.

Owners' tables name images by an id without folder or suffix, and copies of a dataset come in other formats and sizes.

A dataset's folder as its owner ships it: is everything there, are the tables what they were, do the images exist?

Every adapter in `data/sources/` asks the same questions and owes the same answers, so they live here:

- `require(root, {"train.csv": "the labels; from <where>"}, "CheXpert")` -> {pattern: path}; one error for all missing
- `read_table(path, {"Path": "path", "Sex": "sex"})` -> text cells under our names, row of the file = index + 2
- `check_cells(path, "Sex", values, good, remedy)`: one error for the bad cells of a column, with rows and values
- `check_paths(path, "Path", values)`: no path leaves the root
- `existing(root, paths)` -> the paths that are files; one listing per folder, not one look-up per file
- `open_zip(path)` / `read_member(archive, name)`: a truncated or broken archive is one clear error
- `absent(table, there, ...)` + `settle(...)`: missing images raise, or are left out and listed
- `finish(frame, ...)`: label ranks, schema, `attrs["excluded"]` and `attrs["leaks"]`
- `patient_leaks(...)`: how many patients (or images) a published split has on both sides

All errors are ManifestError and say the file, the row or column, and what to do.

From a table of images to one manifest row a study: the steps that datasets with several images a study share.
"""

from __future__ import annotations

import difflib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydicom import dcmread

from gloria_core.data.manifest import ExcludedRows, Failure, ManifestError, path_problem, raise_failures, validate
from gloria_core.data.splits import assign_label_ranks

LISTING_THREADS = 8
"""Folders listed at once; network disks answer slowly, but many at a time."""


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")


def check_options(allowed: Mapping[str, Sequence[object]], given: Mapping[str, object]) -> None:
    """`check_option` for each of the `given` options."""
    for name, value in given.items():
        check_option(name, value, allowed[name])


def require(root: Path | str, needs: Mapping[str, str], dataset: str) -> dict[str, Path]:
    """The path of each needed file or folder below `root`; one ManifestError that names everything missing.

    needs: pattern -> what it is and where it comes from. A pattern is a glob below the root; alternatives are parted
        by "|" and the first that is there counts ("train.csv|train.csv.gz"). A pattern that ends in "/" is a folder.
    Raises ManifestError, too, where one pattern fits several files.
    """
    root = Path(root)
    if not root.is_dir():
        wanted = ", ".join(needs)
        raise ManifestError(f"{dataset}: the root {root} is not a folder; give the folder that holds {wanted}")
    found, missing = {}, []
    for pattern, what in needs.items():
        matches = next((m for part in pattern.split("|") if (m := _matches(root, part))), [])
        if len(matches) > 1:
            names = ", ".join(path.relative_to(root).as_posix() for path in matches[:5])
            raise ManifestError(f"{dataset}: {root} has several files {pattern}: {names}; keep one of them there")
        if matches:
            found[pattern] = matches[0]
        else:
            missing.append(f"  {pattern.replace('|', ' or ')}: {what}")
    if missing:
        here = sorted(path.name for path in root.iterdir())
        shown = ", ".join(here[:12]) + (f" and {len(here) - 12} more" if len(here) > 12 else "") if here else "nothing"
        raise ManifestError("\n".join([f"{dataset}: {root} lacks", *missing, f"it has: {shown}"]))
    return found


def _matches(root: Path, pattern: str) -> list[Path]:
    if pattern.endswith("/"):
        return sorted(path for path in root.glob(pattern.rstrip("/")) if path.is_dir())
    return sorted(path for path in root.glob(pattern) if path.is_file())


def read_table(
    path: Path | str,
    columns: Mapping[str, str] | Sequence[str],
    *,
    optional: Mapping[str, str] | Sequence[str] = (),
    separator: str = ",",
    remedy: str = "Give the table the names that its owner published",
) -> pd.DataFrame:
    """Columns (theirs -> ours, or a list to keep theirs) of a CSV as text; .gz and one-file .zip are read, too.

    Blank cells are "". The index counts the rows from 0, so index + 2 is the row of the file (without line breaks in
    cells). `optional` columns are "" throughout where the file lacks them.
    Raises ManifestError for an unreadable table, and for a missing column with the nearest name and the remedy.
    """
    path = Path(path)
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig", sep=separator
        )
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error}); download it again") from error
    names = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    extras = optional if isinstance(optional, Mapping) else {name: name for name in optional}
    for name in names:
        if name not in table.columns:
            near = difflib.get_close_matches(name, [str(column) for column in table.columns], 1)
            hint = f"is it {near[0]!r} now? " if near else ""
            shown = ", ".join(map(str, table.columns[:30]))
            raise ManifestError(f"{path}: row 1 (the header) lacks column {name!r}; {hint}It has: {shown}. {remedy}")
    if table.empty:
        raise ManifestError(f"{path}: the table has no rows below its header; download it again")
    picked = table[[name for name in (*names, *extras) if name in table.columns]].rename(columns={**names, **extras})
    for name in extras.values():
        if name not in picked:
            picked[name] = ""
    return picked.fillna("")


def check_cells(path: Path | str, column: str, values: pd.Series, good: object, remedy: str) -> None:
    """Raise ManifestError with the first cells of `values` that are not `good` (bool, same length) and their number."""
    bad = values[~np.asarray(good, bool)]
    if len(bad):
        rows = ", ".join(f"row {index + 2}: {_shorten(value)}" for index, value in bad.iloc[:5].items())
        raise ManifestError(f"{path}, column {column!r}: {len(bad)} bad value{'s'[: len(bad) > 1]} ({rows}); {remedy}")


def check_unique(path: Path | str, column: str, values: pd.Series) -> None:
    """Raise ManifestError where an id stands twice."""
    check_cells(path, column, values, ~values.duplicated(), "the id is there twice; keep one row of it")


def check_paths(path: Path | str, column: str, values: pd.Series) -> None:
    """Raise ManifestError where a cell is no plain relative path below the root, or has the ";" that parts images."""
    # most tables are clean: one vectorised look first, the exact reason only for what looks odd
    odd = values.str.contains(r"\\|;|//|(?:^|/)\.{1,2}(?:/|$)|^[/~]|^.:|^\s|\s$|/$", regex=True) | (values == "")
    for index, cell in values[odd].items():
        problem = "has a ';', which parts images" if ";" in cell else path_problem(cell)
        if problem:
            raise ManifestError(f"{path}, row {index + 2}, column {column!r}: path {cell!r} {problem}")


def existing(root: Path | str, paths: Sequence[str]) -> set[str]:
    """Those of `paths` (posix, relative to `root`) that are files: each folder is listed once, several at a time."""
    root = Path(root)
    wanted: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        wanted.setdefault(folder, set()).add(name)

    def look(folders: list[tuple[str, set[str]]]) -> list[str]:
        found = []
        for folder, names in folders:
            prefix = f"{folder}/" if folder else ""
            try:
                with os.scandir(root / folder) as entries:
                    found += [prefix + entry.name for entry in entries if entry.name in names and entry.is_file()]
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    folders = list(wanted.items())
    batches = [folders[start : start + 256] for start in range(0, len(folders), 256)]
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return {path for found in pool.map(look, batches) for path in found}


def absent(
    table: pd.DataFrame, there: object, *, key: str, value: str, column: str, reason: str = "no such image file"
) -> list[Failure]:
    """A Failure for each row of `table` not `there`: its study from column `key`, the shown cell from `value`."""
    gone = table[~np.asarray(there, bool)]
    return [
        Failure(str(study), int(index) + 2, column, _shorten(cell), reason)
        for index, study, cell in zip(gone.index, gone[key], gone[value], strict=True)
    ]


def settle(failures: Sequence[Failure], *, source: str, on_error: str, left: int) -> None:
    """Raise the failures unless on_error is "exclude" and rows are `left`."""
    check_option("on_error", on_error, ("raise", "exclude"))
    if on_error == "raise":
        raise_failures(failures, source=f"{source} (an incomplete copy? on_error='exclude' keeps what is there)")
    if left == 0:
        raise_failures(failures, source=f"{source}: nothing is left; check the root")


@contextmanager
def open_zip(path: Path | str) -> Iterator[zipfile.ZipFile]:
    """The archive for reading. Raises ManifestError for a file that is truncated or no zip archive."""
    path = Path(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise ManifestError(
            f"{path}: no readable zip archive ({error}; {size} bytes); the download was cut short, repeat it"
        ) from error
    with archive:
        yield archive


def read_member(archive: zipfile.ZipFile, name: str | zipfile.ZipInfo) -> bytes:
    """One file of an open archive. Raises ManifestError where its bytes are broken or it is encrypted."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, KeyError) as error:
        shown = name if isinstance(name, str) else name.filename
        raise ManifestError(
            f"{archive.filename}: member {shown!r} cannot be read ({error}); the archive is damaged, download it again"
        ) from error


def patient_leaks(units: Sequence[str], splits: Sequence[str], *, what: str = "patients") -> dict[str, int]:
    """How many of `units` (a patient or image per row) are in both of two splits: {"patients in train and test": n}."""
    table = pd.DataFrame({"unit": np.asarray(units, object), "split": np.asarray(splits, object)}).drop_duplicates()
    of = {name: set(part["unit"]) for name, part in table.groupby("split")}
    names = [name for name in ("train", "valid", "test") if name in of]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {f"{what} in {a} and {b}": len(of[a] & of[b]) for a, b in pairs}


def finish(
    frame: pd.DataFrame,
    *,
    source: str,
    seed: int,
    failures: Sequence[Failure] = (),
    leaks: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """The frame with label ranks, checked, with `attrs["excluded"]` (from `failures`) and `attrs["leaks"]`."""
    defaults = {"findings": "", "impression": "", "boxes": "", "masks": ""}
    frame = frame.assign(**{name: value for name, value in defaults.items() if name not in frame})
    checked = validate(assign_label_ranks(frame.reset_index(drop=True), seed=seed), source=source)
    checked.attrs["excluded"] = ExcludedRows.of(failures)
    checked.attrs["leaks"] = dict(leaks or {})
    return checked


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


ViewRule = Literal["frontal", "AP", "PA", "lateral", "all"]
VIEW_RULES = ("frontal", "AP", "PA", "lateral", "all")
Unit = Literal["study", "image"]
UNITS = ("study", "image")


def wanted_views(view: pd.Series, rule: ViewRule) -> np.ndarray:
    """(n,) bool: which images a rule keeps, from their manifest views (PA, AP, FRONTAL, LATERAL)."""
    lateral = (view == "LATERAL").to_numpy(bool)
    named = {"all": np.ones(len(view), bool), "frontal": ~lateral, "lateral": lateral}
    return named[rule] if rule in named else (view == rule).to_numpy(bool)


def unseen_studies(table: pd.DataFrame, kept: np.ndarray, *, column: str, reason: str) -> list[Failure]:
    """A Failure for each study of which no image is `kept` (bool, a row each); it names the study's first row."""
    left = table[~table["study"].isin(table["study"][kept])].drop_duplicates("study")
    return [
        Failure(str(study), int(index) + 2, column, repr(cell), reason)
        for index, study, cell in zip(left.index, left["study"], left[column], strict=True)
    ]


def group_studies(images: pd.DataFrame, *, keep: Sequence[str]) -> pd.DataFrame:
    """One row a study, in the order of the study ids, from a row an image.

    `images` has study, patient, image (path) and view. A study's images stand frontal first, then by path; its other
    columns `keep` are those of its first image. Returns study_id, patient_id, images, views and `keep`.
    """
    lateral = (images["view"] == "LATERAL").to_numpy(bool)
    ordered = images.iloc[np.lexsort([images["image"].to_numpy(str), lateral, images["study"].to_numpy(str)])]
    first = ordered.drop_duplicates("study")
    # most studies have one image: only the others need to be joined
    several = ordered[ordered["study"].duplicated(keep=False)]
    joined = several.groupby("study", sort=False)[["image", "view"]].agg(";".join)
    columns = {"study_id": first["study"].to_numpy(), "patient_id": first["patient"].to_numpy()}
    for ours, theirs in (("images", "image"), ("views", "view")):
        cells = (
            first["study"].map(joined[theirs]) if len(joined) else pd.Series(np.nan, index=first.index, dtype=object)
        )
        columns[ours] = cells.where(cells.notna(), first[theirs]).to_numpy()
    return pd.DataFrame({**columns, **{name: first[name].to_numpy() for name in keep}})


SIZE_THREADS = 8
"""Files whose headers are read at once."""
DICOM = (".dcm", ".dicom")
PICTURES = (".png", ".jpg", ".jpeg")


def locate(root: Path, names: pd.Series, folders: Sequence[str], suffixes: Sequence[str]) -> pd.Series:
    """For each id the path of its file, relative to `root`, "" where there is none; each folder is listed once.

    folders: below the root, "" is the root itself. suffixes: with their point, tried as written.
    Raises ManifestError for an id that has several files.
    """
    ends = [(f"{folder}/" if folder else "", suffix) for folder in folders for suffix in suffixes]
    there = existing(root, [f"{start}{name}{suffix}" for name in names.unique() for start, suffix in ends])
    found = {}
    for name in names.unique():
        files = [path for start, suffix in ends if (path := f"{start}{name}{suffix}") in there]
        if len(files) > 1:
            raise ManifestError(f"{root}: image {name!r} is there twice, {files[0]} and {files[1]}; remove one")
        found[name] = files[0] if files else ""
    return names.map(found).astype(str)


def file_sizes(root: Path, paths: Sequence[str]) -> dict[str, tuple[int, int] | None]:
    """Path -> (width, height) from the file's header; None for a file that has none."""
    wanted = sorted(set(paths))
    with ThreadPoolExecutor(SIZE_THREADS) as pool:
        return dict(zip(wanted, pool.map(lambda path: _size(root / path), wanted), strict=True))


def scaled(box: Sequence[float], size: tuple[int, int], original: tuple[int, int]) -> list[float]:
    """A box [x, y, w, h] in pixels of `original` (width, height), in pixels of a file of `size`."""
    across, down = size[0] / original[0], size[1] / original[1]
    x, y, w, h = map(float, box)
    return [round(x * across, 3), round(y * down, 3), round(w * across, 3), round(h * down, 3)]


def _size(path: Path) -> tuple[int, int] | None:
    try:
        if path.suffix.lower() in DICOM:
            header = dcmread(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
            return int(header.Columns), int(header.Rows)
        with Image.open(path) as image:
            return image.size
    # a damaged header can fail anywhere in either reader
    except Exception:
        return None
