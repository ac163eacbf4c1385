"""Tables in the form of CXR-CLIP-CGMH (https://github.com/porterlin/cxr-clip-cgmh), a fork of CXR-CLIP for devices.

- Training (and validation): `image`, a Python list of paths, and `text_label`, a list of the labels that are present;
  what is not listed is absent.
- Test: `image`, one 0/1 column for each label, and `text`, the report.
- Both may have `index`, or the number column without a name that pandas writes, and `patient_id`.

A list is read as data (`ast.literal_eval`) and never run. The images are Chang Gung Memorial Hospital's and are not
public: everybody brings tables of their own, and with `tasks` labels of their own.

The tables of CXR-CLIP-CGMH, read and checked: one study a row, with lists written as Python writes them.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import (
    ExcludedRows,
    Failure,
    ManifestError,
    OnError,
    file_failures,
    path_problem,
    raise_failures,
    validate,
)
from gloria_core.data.prompts import (
    KINDS,
    NO_FINDING,
    PromptError,
    PromptSet,
    available_prompts,
    load_prompts,
    report_from_labels,
)
from gloria_core.data.splits import assign_label_ranks, assign_splits

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


def prepare(
    root: Path | str,
    *,
    train: str = "train.csv",
    valid: str = "",
    test: str = "test.csv",
    tasks: Sequence[str] = CGMH_LABELS,
    prompts: str | PromptSet = "cgmh",
    n_negative: int = 0,
    path_prefix: str = "",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest of the tables under `root`, one study a row; study ids are "<table>-<index>".

    train, valid, test: tables, relative to `root`; "" for one that is not there. Without a validation table a tenth of
        the training studies becomes it, patient-disjoint and stratified, drawn with `seed`. Without `patient_id` every
        study is a patient of its own: then only the makers of the tables can keep patients apart.
    tasks: the labels; each is a column of the test table.
    prompts: sentences to write the `impression` of studies without a report from: a set of the package, a JSON file
        (ours, or the fork's {label: {"pos", "neg", "unc"}}) relative to `root` or absolute. Training texts are drawn
        once with `seed`, with sentences on `n_negative` absent labels that have one; validation texts are fixed. ""
        leaves them empty, for `StudyDataset(prompts=...)` to draw anew in every epoch, as the released code does.
    path_prefix: the beginning of the tables' image paths that is to be cut off, such as the folder on another machine.
    on_error: "exclude" leaves out studies whose image files are not there and lists them in `attrs["excluded"]`.
    The tables do not name projections, so every view is "FRONTAL".
    Raises ManifestError naming file, row, column and remedy; PromptError naming study or file.
    """
    root, tasks = Path(root), [OTHER_SPELLINGS.get(name, name) for name in tasks]
    if on_error not in ("raise", "exclude"):
        raise ValueError(f"on_error must be 'raise' or 'exclude', not {on_error!r}")
    if not root.is_dir():
        raise ManifestError(f"the dataset's root {root} is not a folder; give the folder that the tables lie in")
    if len(set(tasks)) != len(tasks) or not tasks:
        raise ValueError(f"tasks must name each label once, they are {tasks}")
    tables = {"train": train, "valid": valid, "test": test}
    parts, missing = [], []
    for split, name in tables.items():
        if name:
            part = read_studies(root / name, root, split, tasks, path_prefix)
            part, failures = _with_files(part, root, name, on_error)
            parts.append(part)
            missing += failures
    if not parts:
        raise ValueError("give at least one of train, valid and test")
    frame = pd.concat(parts, ignore_index=True)
    learn = frame["split"] == "train"
    if learn.any() and not valid:
        drawn = assign_splits(frame[learn], fractions={"train": 0.9, "valid": 0.1}, seed=seed)
        frame.loc[learn, "split"] = drawn["split"]
    frame = assign_label_ranks(frame, seed=seed)
    if prompts:
        frame = _with_texts(frame, _prompts(prompts, root), tasks, seed=seed, n_negative=n_negative)
    frame = validate(frame, source=f"manifest of {root} ({', '.join(filter(None, tables.values()))}, in this order)")
    frame.attrs["excluded"] = ExcludedRows.of(missing)
    return frame


def _with_files(frame: pd.DataFrame, root: Path, name: str, on_error: OnError) -> tuple[pd.DataFrame, list[Failure]]:
    """The studies whose images are there, and a failure for each missing file, by the rows of the table."""
    failures = file_failures(frame, root, skip=set())
    gone = frame["study_id"].isin({failure.study_id for failure in failures})
    if on_error == "raise" or gone.all():
        raise_failures(failures, source=f"{root / name} (an incomplete copy? on_error='exclude' keeps what is there)")
    return frame[~gone], failures


def _prompts(given: str | PromptSet, root: Path) -> PromptSet:
    """A prompt set by name, or from a file in our form or in the fork's, where an empty sentence stands for none."""
    if isinstance(given, PromptSet):
        return given
    if given in available_prompts():
        return load_prompts(given)
    path = root / given
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        names = ", ".join(available_prompts())
        raise PromptError(f"prompts {given!r}: {path} cannot be read ({error}); names of sets: {names}") from error
    if isinstance(content, dict) and "classes" in content:
        return load_prompts(path)
    return PromptSet(path.stem, _fork_classes(content, path))


def _fork_classes(content: object, path: Path) -> dict[str, dict[str, list[str]]]:
    remedy = 'a prompt file is {label: {"pos": [...], "neg": [...], "unc": [...]}}'
    classes: dict[str, dict[str, list[str]]] = {}
    for label, kinds in content.items() if isinstance(content, dict) else [("", content)]:
        lists = [kinds.get(kind, []) for kind in KINDS] if isinstance(kinds, dict) and set(kinds) <= set(KINDS) else [0]
        if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in lists):
            raise PromptError(f"{path}: label {label!r} holds {kinds!r:.60}; {remedy}")
        kept = ([sentence for sentence in values if sentence.strip()] for values in lists)
        classes[OTHER_SPELLINGS.get(label, label)] = dict(zip(KINDS, kept, strict=True))
    return classes


def _with_texts(
    frame: pd.DataFrame, prompts: PromptSet, tasks: list[str], *, seed: int, n_negative: int
) -> pd.DataFrame:
    """A copy whose empty impressions say the labels. Every training study has its own generator (seed, study_id)."""
    silent = [name for name in tasks if not prompts.classes.get(name, {}).get("neg")]
    texts = []
    for row in frame[["study_id", "split", "impression", *tasks]].to_dict("records"):
        # an absent label without a negative sentence is passed over, as its empty sentence is in the released code
        labels = {name: np.nan if row[name] == 0 and name in silent else row[name] for name in tasks}
        text = row["impression"]
        try:
            if not text.strip() and row["split"] == "train":
                key = hashlib.blake2b(f"{seed}|{row['study_id']}".encode(), digest_size=8).digest()
                rng = np.random.default_rng(int.from_bytes(key))
                text = report_from_labels(labels, prompts, rng=rng, n_negative=n_negative)
            elif not text.strip():
                text = report_from_labels(labels, prompts, deterministic=True)
        except PromptError as error:
            raise PromptError(f"study {row['study_id']}: {error}") from error
        texts.append(text)
    return frame.assign(impression=texts)
