"""A dataset's folder as its owner ships it: find the files, read and check the tables, turn their rows into a manifest.

What the adapters in `data/sources/` share:

- `RawFolder`: the paths of tables, folders and images, with one error for all that is missing
- `Column`, `read_table`, `check_cells`, `check_boxes`: text cells under our names, with their rules; errors name the
  file, the row (the header is row 1) and the remedy. The index of a table + 2 is the row of the file
- `Rows`: the rows that a source uses, and why it leaves the others out
- `cell`, `ap_view`, `male`, `group_studies`, `manifest_frame`, `finish`: the columns of the manifest
- `draw_valid`, `tear`: splits, and what a published split leaks

All errors are ManifestError.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd
from PIL import Image
from pydicom import dcmread

from gloria_core.data.files import did_you_mean
from gloria_core.data.manifest import (
    LABEL_CELLS,
    META,
    ExcludedRows,
    Failure,
    ManifestError,
    OnError,
    path_problem,
    raise_failures,
    shorten,
    validate,
)
from gloria_core.data.prompts import PromptError, PromptSet, report_from_labels
from gloria_core.data.splits import assign_label_ranks, assign_splits, count_leaks, ids_by_split

SplitRule = Literal["patient", "published"]
ViewRule = Literal["frontal", "AP", "PA", "lateral", "all"]
Unit = Literal["study", "image"]

DICOM = (".dcm", ".dicom")
PICTURES = (".png", ".jpg", ".jpeg")
ORIGINAL_SIDE = 1024  # pixels of the images that NIH published, on which NIH and RSNA drew their boxes
THREADS = 8  # folders or headers read at once; network disks answer slowly, but many at a time
BINARY = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0}


# ------------------------------------------------------------------------------------------------ files and folders


class RawFolder:
    """The folder `root` of a `dataset`. A folder below it is listed once, several at a time.

    Patterns of `require` and `optional` are globs below the root; alternatives are separated by "|". A csv may be
    packed (.gz, .zip), and capitals do not matter. A pattern that ends in "/" is a folder. ManifestError is raised for
    a root that is no folder, and where a pattern fits several files.
    """

    def __init__(self, root: Path | str, dataset: str) -> None:
        self.root, self.dataset = Path(root), dataset
        self.named: set[str] = set()  # the files that tables name
        self._tables: set[Path] = set()
        self._names: dict[str, set[str]] = {}
        if not self.root.is_dir():
            raise ManifestError(f"{dataset}: the root {root} is not a folder; give the folder of its tables and images")

    def require(self, needs: Mapping[str, str]) -> list[Path]:
        """The path of each needed file or folder; one ManifestError that names everything missing.

        needs: pattern -> what it is and where it comes from.
        """
        paths = {pattern: self._match(pattern) for pattern in needs}
        missing = [f"  {name.replace('|', ' or ')}: {needs[name]}" for name, path in paths.items() if path is None]
        if missing:
            here = sorted(path.name for path in self.root.iterdir())
            shown = ", ".join(here[:12]) + (f" and {len(here) - 12} more" if len(here) > 12 else "")
            text = "\n".join([f"{self.dataset}: {self.root} lacks", *missing, f"it has: {shown or 'nothing'}"])
            raise ManifestError(text)
        return list(paths.values())

    def optional(self, pattern: str, *, without: str = "") -> Path | None:
        """The path of a file that may be missing; a warning names a table with a similar name, here or in a folder.

        without: what the manifest then lacks, which is said in a warning, too.
        """
        path = self._match(pattern)
        if path is None:
            end = r"\.(csv|tsv|txt|json|xlsx?)(\.\w+)?$"
            stems = [re.sub(end, "", name.split("/")[-1]).replace("*", "").lower() for name in pattern.split("|")]
            files = {path for form in ("*.*", "*/*.*") for path in self.root.glob(form)} - self._tables
            tables = [path for path in sorted(files) if re.search(end, path.name.lower()) and path.name[0] != "."]
            names = {path: re.sub(end, "", path.name.lower()) for path in tables}
            inside = [path for path, name in names.items() if any(len(stem) > 5 and stem in name for stem in stems)]
            near = inside or [path for path, name in names.items() if did_you_mean(name, stems, cutoff=0.7)]
            if near:
                warnings.warn(f"{near[0]} is not read: {self.dataset} looks for {pattern}; rename it", stacklevel=3)
            elif without:
                name = pattern.split("|")[0]
                warnings.warn(f"{self.dataset}: {self.root} has no {name}, so there are no {without}", stacklevel=3)
        return path

    def _match(self, patterns: str) -> Path | None:
        """The one path that fits any of the alternatives."""
        found: dict[Path, None] = {}
        for pattern in patterns.split("|"):
            wanted = Path.is_dir if pattern.endswith("/") else Path.is_file
            packed = ("", ".gz", ".zip") if pattern.endswith((".csv", ".txt", ".json")) else ("",)
            for form in (pattern.rstrip("/") + end for end in packed):
                anycase = re.sub("[a-zA-Z]", lambda m: f"[{m[0].lower()}{m[0].upper()}]", form)
                found |= dict.fromkeys(path for path in sorted(self.root.glob(anycase)) if wanted(path))
        if len(found) > 1:
            names = ", ".join(path.relative_to(self.root).as_posix() for path in [*found][:5])
            what = f"several files {patterns.replace('|', ' or ')}: {names}; keep or name one of them"
            raise ManifestError(f"{self.dataset}: {self.root} has {what}")
        self._tables.update(found)
        return next(iter(found), None)

    def _list(self, folders: Iterable[str]) -> None:
        """Remember the names of the files in the folders ("" is the root)."""

        def names(folder: str) -> set[str]:
            try:
                with os.scandir(self.root / folder) as entries:
                    # macOS leaves "._name.png" beside "name.png"
                    return {entry.name for entry in entries if entry.name[0] != "." and entry.is_file()}
            except (FileNotFoundError, NotADirectoryError):
                return set()

        new = list(set(folders) - self._names.keys())
        with ThreadPoolExecutor(THREADS) as pool:
            self._names |= dict(zip(new, pool.map(names, new), strict=True))

    def existing(self, paths: Collection[str]) -> set[str]:
        """Those of `paths` (below the root) that are files."""
        parts = {path: path.rpartition("/")[::2] for path in paths}
        self.named.update(parts)
        self._list(folder for folder, _ in parts.values())
        return {path for path, (folder, name) in parts.items() if name in self._names[folder]}

    def complete(self, cells: pd.Series) -> pd.Series:
        """Bool for each cell: all its paths (";" between them) are files."""
        paths = cells.str.split(";")
        return paths.map(self.existing(paths.explode()).issuperset).astype(bool)

    def first_existing(self, candidates: Sequence[pd.Series]) -> pd.Series:
        """For each row the first of its candidate paths that is a file, "" where none is."""
        place = pd.Series("", index=candidates[0].index)
        for paths in candidates:
            open_rows = place == ""
            if open_rows.any():
                there = paths.isin(self.existing(paths[open_rows].tolist()))
                place = place.where(~(open_rows & there).to_numpy(), paths.to_numpy())
        return place

    def by_stem(self, folders: Sequence[str], suffixes: Sequence[str]) -> dict[str, list[str]]:
        """Name without suffix -> paths of the files in the folders."""
        self._list(folders)
        files: dict[str, list[str]] = {}
        for folder in folders:
            for name in sorted(self._names[folder]):
                if name.lower().endswith(tuple(suffixes)):
                    files.setdefault(name.rpartition(".")[0], []).append(f"{folder}/{name}" if folder else name)
        return files

    def locate(self, names: pd.Series, folders: Sequence[str], suffixes: Sequence[str]) -> pd.Series:
        """For each id (a file name without suffix) the path of its file, "" where there is none.

        Raises ManifestError for an id that has several files.
        """
        files = self.by_stem(folders, suffixes)
        for name in names.unique():
            if len(paths := files.get(name, [])) > 1:
                text = f"{self.root}: image {name!r} occurs twice, {paths[0]} and {paths[1]}; remove one"
                raise ManifestError(text)
        places = names.map(lambda name: files.get(name, [""])[0]).astype(str)
        self.named.update(places)
        return places

    def warn_of_unnamed(self, table: object) -> None:
        """Count, in a warning, the images that no row of the `table` names in the folders that were looked into."""
        pictures = self.by_stem(sorted(self._names), (*DICOM, *PICTURES)).values()
        if rest := sorted({path for paths in pictures for path in paths} - self.named):
            shown = ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else "")
            text = f"{self.root}: {len(rest)} images are in no row of {table} and are not used ({shown})"
            warnings.warn(text, stacklevel=3)

    def sizes(self, paths: Iterable[str]) -> dict[str, tuple[int, int] | None]:
        """Path -> (width, height) from the file's header; None for a file that has none."""

        def size(name: str) -> tuple[int, int] | None:
            try:
                if name.lower().endswith(DICOM):
                    header = dcmread(self.root / name, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
                    return int(header.Columns), int(header.Rows)
                with Image.open(self.root / name) as image:
                    return image.size
            # a damaged header can fail anywhere in either reader
            except Exception:
                return None

        wanted = sorted(set(paths))
        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(wanted, pool.map(size, wanted), strict=True))


# ------------------------------------------------------------------------------------------------------------ tables


@dataclass(frozen=True)
class Column:
    """Our name of an owner's column, and what its cells may be.

    values: the allowed cells; a mapping also translates them. fold: capitals and blanks around a cell do not matter.
    strip: blanks around a cell are cut off. pattern: a regular expression for the whole cell.
    filled: no blank cell. unique: no cell twice. path: a plain path below the root (blank cells only if not `filled`).
    remedy: the end of the error message.
    """

    name: str
    values: Collection[str] | None = None
    fold: bool = False
    strip: bool = False
    pattern: str = ""
    filled: bool = False
    unique: bool = False
    path: bool = False
    remedy: str = ""

    def checked(self, path: Path, column: str, cells: pd.Series) -> pd.Series:
        """The cells, translated. Raises ManifestError naming file, column, rows and remedy."""
        cells = cells.str.strip() if self.strip else cells
        if self.filled:
            check_cells(path, column, cells, cells.str.strip() != "", self.remedy or "fill in the cell")
        if self.path:
            check_paths(path, column, cells if self.filled else cells[cells != ""])
        if self.pattern:
            check_cells(path, column, cells, cells.str.fullmatch(self.pattern), self.remedy)
        if self.unique:
            check_cells(path, column, cells, ~cells.duplicated(), "it occurs twice; keep one row of it")
        if self.values is None:
            return cells
        allowed = ", ".join(value or "blank" for value in self.values)
        names = cells.str.strip().str.lower() if self.fold else cells
        check_cells(path, column, cells, names.isin(list(self.values)), self.remedy or f"allowed are: {allowed}")
        return names.map(self.values) if isinstance(self.values, Mapping) else names


# rules of a label column: Column(name, **LABEL)
LABEL = {"values": LABEL_CELLS, "remedy": "a label is 1.0, 0.0, -1.0 or blank"}


def read_table(
    path: Path | str,
    columns: Mapping[str, str | Column],
    *,
    optional: Mapping[str, str | Column] | None = None,
    separator: str = "",
    remedy: str = "Give the table the names that its owner published",
) -> pd.DataFrame:
    """Columns (theirs -> ours, with rules) of a table as text, blank cells as "". The index + 2 is the row of the file.

    Read are UTF-8 and UTF-16 with or without byte order mark, else Windows-1252 (with a warning), .gz and .zip of one
    table, the separators , ; tab and | (the one that gives most of the columns, unless `separator` is given). Capitals
    and blanks in the header do not matter. `optional` columns are "" throughout where the file lacks them.
    Raises ManifestError for an unreadable table, for a missing column with the nearest name, and for bad cells.
    """
    path, optional = Path(path), optional or {}
    table = _cells_of(path, [*columns, *optional], separator)
    folded: dict[str, list[str]] = {}
    for name in table.columns:
        folded.setdefault(_folded(name), []).append(name)
    theirs = {}
    for name in (*columns, *optional):
        near = [name] if name in table.columns else folded.get(_folded(name), [])
        if len(near) > 1:
            raise ManifestError(f"{path}: row 1 (the header) has {near[0]!r} and {near[1]!r}; keep one, as {name!r}")
        if not near and name in columns:
            shown = ", ".join(map(str, table.columns[:30]))
            hint = did_you_mean(name, table.columns)
            raise ManifestError(f"{path}: row 1 (the header) lacks column {name!r}.{hint} It has: {shown}. {remedy}")
        theirs[name] = near[0] if near else None
    if table.empty:
        raise ManifestError(f"{path}: the table has no rows below its header; get it again")
    picked = {}
    for name, rule in (*columns.items(), *optional.items()):
        rule = Column(rule) if isinstance(rule, str) else rule
        if theirs[name] is None:
            blank = rule.values.get("", "") if isinstance(rule.values, Mapping) else ""
            picked[rule.name] = pd.Series(blank, index=table.index)
        else:
            picked[rule.name] = rule.checked(path, theirs[name], table[theirs[name]].fillna(""))
    read = pd.DataFrame(picked)
    read.attrs = table.attrs
    return read


def columns_of(path: Path, names: Sequence[str], separator: str = "") -> dict[str, str]:
    """Those of `names` that are columns of a table -> as the table spells them; capitals and blanks do not matter."""
    header = {_folded(name): name for name in header_of(path, separator)}
    return {name: header[_folded(name)] for name in names if _folded(name) in header}


def header_of(path: Path, separator: str = "") -> list[str]:
    """The names in row 1 of a table, without blanks around them."""
    return [str(name).strip() for name in _cells_of(Path(path), [], separator, rows=0).columns]


def _folded(name: object) -> str:
    return "".join(str(name).split()).casefold()


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file, or of the one file in a .gz or .zip, and its encoding.

    That is UTF-8 or UTF-16, with or without byte order mark, else Windows-1252 (with a warning).
    Raises ManifestError for a file that cannot be read as text.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        elif content[:2] == b"PK":
            with zipfile.ZipFile(path) as archive:
                members = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
                if "xl/workbook.xml" in members:
                    raise ValueError("it is an Excel workbook; save it as CSV, UTF-8")
                if len(members) != 1:
                    shown = ", ".join(members[:5])
                    raise ValueError(f"the archive holds {len(members)} files ({shown}), not one table")
                content = archive.read(members[0])
        encodings = ["utf-8-sig", "cp1252"]
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            encodings = ["utf-16"]
        elif b"\0" in content[:2]:
            encodings = ["utf-16-be" if content[:1] == b"\0" else "utf-16-le"]
        for encoding in encodings:
            with contextlib.suppress(UnicodeDecodeError):
                text = content.decode(encoding)
                break
        else:
            raise ValueError("its encoding is neither UTF-8, UTF-16 nor Windows-1252; save it as UTF-8")
    except (ValueError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ManifestError(f"{path}: cannot be read as a table or list ({error}); get or save it again") from error
    if encoding == "cp1252":
        warnings.warn(f"{path} is not UTF-8 and is read as Windows-1252; look at its accents", stacklevel=5)
    return text, encoding


def _cells_of(path: Path, names: Sequence[str], separator: str, *, rows: int | None = None) -> pd.DataFrame:
    """All cells as text. The separator is the one that finds most of the `names` in the header, or most cells."""
    text, encoding = read_text(path)
    wanted, header = {_folded(name) for name in names}, text.lstrip().partition("\n")[0]
    parts = {sign: {_folded(name).strip('"') for name in header.split(sign)} for sign in ",;\t|"}
    separator = separator or max(parts, key=lambda sign: len(parts[sign] & (wanted or parts[sign])))
    try:
        with warnings.catch_warnings():
            # pandas only warns where it cuts rows that are longer than the header
            warnings.simplefilter("error", pd.errors.ParserWarning)
            options = {"dtype": str, "keep_default_na": False, "index_col": False, "nrows": rows}
            table = pd.read_csv(io.StringIO(text), sep=separator, **options)
    except pd.errors.ParserWarning as error:
        remedy = "put texts with the separator in quotes, and end no row with it"
        raise ManifestError(f"{path}: rows have more cells than row 1 (the header); {remedy}") from error
    except ValueError as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error}); get or save it again") from error
    table.attrs["encoding"] = encoding
    return table


def check_cells(path: Path | str, column: str, values: pd.Series, good: object, remedy: str) -> None:
    """Raise ManifestError with the first cells of `values` that are not `good` (bool, same length) and their number."""
    bad = values[~np.asarray(good, bool)]
    if len(bad):
        rows = ", ".join(f"row {index + 2}: {shorten(value)}" for index, value in bad.iloc[:5].items())
        raise ManifestError(f"{path}, column {column!r}: {len(bad)} bad value{'s'[: len(bad) > 1]} ({rows}); {remedy}")


def check_paths(path: Path | str, column: str, values: pd.Series, *, remedy: str = "") -> None:
    """Raise ManifestError where a cell is no plain relative path below the root, or has a ";" (it separates images)."""
    # most tables are clean: one vectorised pass first, the exact reason only for what looks odd
    odd = values.str.contains(r"\\|;|//|(?:^|/)\.{1,2}(?:/|$)|^[/~]|^.:|^\s|\s$|/$", regex=True) | (values == "")
    for index, cell in values[odd].items():
        problem = "has a ';', which separates images" if ";" in cell else path_problem(cell)
        if problem:
            remedy = f"; {remedy}" if remedy else ""
            raise ManifestError(f"{path}, row {index + 2}, column {column!r}: path {cell!r} {problem}{remedy}")


def check_boxes(
    path: Path | str,
    table: pd.DataFrame,
    columns: Mapping[str, str],
    *,
    marked: object = True,
    remedy: str = "a box is x, y >= 0 and w, h > 0 in pixels",
    side: int = 0,
) -> pd.DataFrame:
    """Columns x, y, w, h ... as numbers: x, y >= 0, the others > 0; rows that are not `marked` must be blank.

    columns: theirs -> ours. side: of the square images that the boxes lie in, if known.
    """
    marked = np.broadcast_to(np.asarray(marked, bool), len(table))
    numbers = {}
    for theirs, ours in columns.items():
        values = pd.to_numeric(table[ours], errors="coerce")
        good = np.isfinite(values) & ((values >= 0) if ours in ("x", "y") else (values > 0))
        check_cells(path, theirs, table[ours], np.where(marked, good, table[ours] == ""), remedy)
        numbers[ours] = values.astype(float)
    table = table.assign(**numbers)
    if side:
        check_inside(path, table, side, side)
    return table


def check_inside(path: Path | str, boxes: pd.DataFrame, width: object, height: object) -> None:
    """Raise ManifestError where a box (x, y, w, h) ends more than a pixel outside its image (width, height)."""
    outside = boxes[(boxes["x"] + boxes["w"] > width + 1) | (boxes["y"] + boxes["h"] > height + 1)]
    cells = pd.Series(outside[["x", "y", "w", "h"]].to_numpy().tolist(), outside.index, dtype=object)
    remedy = "a box ends outside its image: take the images that it was drawn on, or correct the row"
    check_cells(path, "x, y, w, h", cells, np.zeros(len(cells), bool), remedy)


# -------------------------------------------------------------------------------------------------------------- rows


Cell = tuple[str, str] | None


class Rows:
    """The rows of an owner's table that a source uses (`table`), and a failure for each left out (`failures`).

    source: the file, for messages. cell: (the owner's column that a failure shows, our name of it). key: the column
    with the study's name. The index of the table + 2 is the row of the file; it may repeat where tables are joined.
    """

    def __init__(self, table: pd.DataFrame, *, source: object, cell: tuple[str, str], key: str = "study_id") -> None:
        self.table, self.source, self.cell, self.key = table, source, cell, key
        self.failures: list[Failure] = []
        self._missing: list[Failure] = []

    @classmethod
    def concat(cls, parts: Sequence[Self], *, source: object) -> Self:
        """The rows of several tables, and their failures."""
        rows = cls(pd.concat([part.table for part in parts]), source=source, cell=parts[0].cell, key=parts[0].key)
        rows.failures = [failure for part in parts for failure in part.failures]
        return rows

    def exclude(self, bad: object, reason: str, *, cell: Cell = None, by_study: bool = False) -> None:
        """Leave out the rows where `bad` (bool). by_study: a failure for the first row of each study only."""
        bad = np.broadcast_to(np.asarray(bad, bool), len(self.table))
        rows, (column, shown) = self.table[bad], cell or self.cell
        self.table = self.table[~bad]
        rows, key = (rows.drop_duplicates("study_id"), "study_id") if by_study else (rows, self.key)
        self.failures += [
            Failure(str(study), int(index) + 2, column, shorten(value), reason)
            for index, study, value in zip(rows.index, rows[key], rows[shown], strict=True)
        ]

    def exclude_missing(
        self, there: object, on_error: str | None, *, reason: str = "no such image file", cell: Cell = None
    ) -> None:
        """Leave out the rows that are not `there` (bool); raise for them unless on_error is "exclude" and rows remain.

        on_error=None waits: the next call raises for the missing of both.
        """
        before = len(self.failures)
        self.exclude(~np.broadcast_to(np.asarray(there, bool), len(self.table)), reason, cell=cell)
        self._missing += self.failures[before:]
        if on_error == "raise":
            remedy = "an incomplete copy? on_error='exclude' keeps what is there"
            raise_failures(self._missing, source=f"{self.source} ({remedy})")
        if on_error and self.table.empty:
            raise_failures(self._missing, source=f"{self.source}: nothing is left; check the root")

    def keep_views(self, rule: ViewRule, *, known: str = "") -> None:
        """Keep the images of a view, by column "view"; list the studies of which no image is left by their first row.

        known: a bool column; images whose view is not known are kept with "all" only.
        """
        view = self.table["view"]
        kept = {"all": view == view, "frontal": view != "LATERAL", "lateral": view == "LATERAL"}.get(rule, view == rule)
        if known and rule != "all":
            kept &= self.table[known]
        seen, whole = self.table[kept.to_numpy(bool)], self.table
        self.table = whole[~whole["study_id"].isin(seen["study_id"])]
        self.exclude(True, f"no image of view {rule!r}", by_study=True)
        self.table = seen

    def place_boxes(self, boxes: pd.DataFrame, folder: RawFolder, on_error: OnError, *, key: str = "study_id") -> None:
        """Set the column "boxes" from a row a box (study_id, label, x, y, w, h): JSON, in pixels of the image files.

        The numbers of `boxes` count pixels of originals of ORIGINAL_SIDE; its study_id is our column `key`. Rows with
        boxes whose picture cannot be read are left out as by `exclude_missing`; a DICOM file without a readable header
        counts as an original.
        """
        boxed = self.table[key].isin(boxes["study_id"])
        read = folder.sizes(self.table.loc[boxed, "images"])
        sizes = {study: read.get(path) for study, path in zip(self.table[key], self.table["images"], strict=True)}
        known = self.table["images"].map(read).notna() | self.table["images"].str.endswith(DICOM)
        reason = "its image cannot be read, and boxes follow its size; copy it again"
        self.exclude_missing(~boxed | known, on_error, reason=reason)
        entries: dict[str, list[dict]] = {}
        for box in boxes[boxes["study_id"].isin(self.table[key])].itertuples():
            original = [ORIGINAL_SIDE] * 2
            xywh = scaled((box.x, box.y, box.w, box.h), original, sizes[box.study_id] or original)
            entries.setdefault(box.study_id, []).append({"label": box.label, "xywh": xywh})
        self.table["boxes"] = [cell(entries.get(study, [])) for study in self.table[key]]

    def check_rest(self, remedy: str) -> None:
        """Raise ManifestError where no row is left."""
        if self.table.empty:
            raise ManifestError(f"{self.source}: nothing is left ({len(self.failures)} rows left out); {remedy}")


# ------------------------------------------------------------------------------------------------------ the manifest


def ap_view(view: pd.Series) -> pd.Series:
    """1 for AP, 0 for PA, NaN for others."""
    return view.map({"AP": 1.0, "PA": 0.0}).astype(float)


def male(sex: pd.Series) -> pd.Series:
    """1 for M and Male, 0 for F and Female, NaN for others."""
    return sex.map({"M": 1.0, "Male": 1.0, "F": 0.0, "Female": 0.0}).astype(float)


def cell(entries: Sequence[Mapping[str, object]]) -> str:
    """The JSON cell of boxes or masks of image 0, "" for none. An entry has label, xywh or path, and more."""
    full = [{"label": entry["label"], "image": 0, **entry} for entry in entries]
    return json.dumps(full) if full else ""


def scaled(xywh: Iterable[float], original: Sequence[float], size: Sequence[float]) -> list[float]:
    """A box on an image of `original` (width, height) pixels, in those of a file of `size`."""
    factors = (size[0] / original[0], size[1] / original[1]) * 2
    return [round(value * factor, 3) for value, factor in zip(xywh, factors, strict=True)]


def mask_cells(label: str, paths: Sequence[str]) -> list[str]:
    """A cell for each path of a mask, "" for "" """
    return [cell([{"label": label, "path": path}] if path else []) for path in paths]


def label_texts(
    frame: pd.DataFrame, labels: Sequence[str], prompts: PromptSet, *, seed: int, n_negative: int
) -> Iterator[tuple[str, np.random.Generator | None]]:
    """For each study a text that says its labels, and the generator it was drawn with, for more draws.

    A training study has its own generator (seed, study_id), so neither the order of the rows nor other studies matter;
    other texts are fixed, without negatives (None).
    """
    values = frame[list(labels)].to_numpy(float).tolist()
    for study, split, row in zip(frame["study_id"], frame["split"], values, strict=True):
        key = hashlib.blake2b(f"{seed}|{study}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(key)) if split == "train" else None
        try:
            known = dict(zip(labels, row, strict=True))
            yield report_from_labels(known, prompts, rng=rng, n_negative=n_negative), rng
        except PromptError as error:
            raise PromptError(f"study {study}: {error}") from error


def group_studies(images: pd.DataFrame) -> pd.DataFrame:
    """One row a study, in the order of the study ids, from a row an image.

    `images` has study_id, images (one path) and view. A study's images are frontal first, then by path; its other
    columns are those of its first image.
    """
    lateral = (images["view"] == "LATERAL").to_numpy(bool)
    ordered = images.iloc[np.lexsort([images["images"].to_numpy(str), lateral, images["study_id"].to_numpy(str)])]
    ordered = ordered.assign(views=ordered["view"])
    first = ordered.drop_duplicates("study_id").set_index("study_id", drop=False)
    # most studies have one image: only the others are joined
    several = ordered[ordered["study_id"].duplicated(keep=False)]
    if len(several):
        joined = several.groupby("study_id", sort=False)[["images", "views"]].agg(";".join)
        first.loc[joined.index, ["images", "views"]] = joined
    return first.reset_index(drop=True)


def manifest_frame(table: pd.DataFrame, labels: Sequence[str] = ()) -> pd.DataFrame:
    """The columns of `table` that a manifest has, `labels` among them; defaults for what it lacks, index 0..n-1."""
    blank = dict.fromkeys(("findings", "impression", "boxes", "masks"), "")
    defaults = {"patient_id": table["study_id"], "views": "FRONTAL", **blank}
    table = table.assign(**{name: value for name, value in defaults.items() if name not in table})
    known = [name for name in ("split", "label_rank") if name in table]
    head = ["study_id", "patient_id", *known, "images", "views"]
    names = [*head, "findings", "impression", *labels, "boxes", "masks", *(n for n in table if n.startswith(META))]
    return table[names].reset_index(drop=True).rename_axis(columns=None)


def finish(
    folder: RawFolder | None,
    rows: Rows,
    labels: Sequence[str] = (),
    *,
    seed: int,
    draw: Literal["", "valid", "all"] = "",
    fraction: float = 1 / 8,
    leaks: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """The checked manifest of the rows, with label ranks unless they have some.

    draw: the splits that are drawn by `seed`, patient-disjoint and stratified by `labels`: "all" (70/10/20 %), "valid"
        (a `fraction` of train), or none.
    `attrs["excluded"]` are the failures of the rows. Images of the folder that no row names are counted in a warning,
    unless it is None.
    """
    if folder is not None:
        folder.warn_of_unnamed(rows.source)
    frame = manifest_frame(rows.table, labels)
    if draw == "all":
        frame = assign_splits(frame, seed=seed)
    elif draw == "valid":
        frame = draw_valid(frame, seed=seed, fraction=fraction)
    frame = frame if "label_rank" in frame else assign_label_ranks(frame, seed=seed)
    checked = validate(frame, source=f"manifest of {rows.source}")
    checked.attrs["excluded"] = ExcludedRows.of(rows.failures)
    checked.attrs["leaks"] = dict(leaks or {})
    return checked


# ------------------------------------------------------------------------------------------------------------ splits


def draw_valid(frame: pd.DataFrame, *, seed: int, fraction: float = 1 / 8) -> pd.DataFrame:
    """The frame with a fraction of its training patients in valid, stratified by the labels."""
    train = (frame["split"] == "train").to_numpy()
    if not train.any():
        return frame
    split = np.array(frame["split"], object)
    split[train] = assign_splits(frame[train], fractions={"train": 1 - fraction, "valid": fraction}, seed=seed)["split"]
    return frame.assign(split=split)


def tear(units: pd.Series, splits: Sequence[str], *, rows: str, unit: str) -> tuple[pd.Series, dict[str, int]]:
    """Ids for a published split that is not disjoint in `units` ("p (train)", "p (test)"), and its leaks, counted."""
    return ids_by_split(units, splits), count_leaks(units, splits, unit=unit, rows=rows)
