"""Tables in the form of CXR-CLIP-CGMH (https://github.com/porterlin/cxr-clip-cgmh), a fork of CXR-CLIP for devices.

- Training (and validation): `image`, a Python list of paths, and `text_label`, a list of the labels that are present;
  what is not listed is absent.
- Test: `image`, one 0/1 column for each label, and `text`, the report.
- Both may have `index`, or the number column without a name that pandas writes, and `patient_id`.

A list is read as data (`ast.literal_eval`) and never run. The images are Chang Gung Memorial Hospital's and are not
public: everybody brings tables of their own, and with `tasks` labels of their own.
"""

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from pydantic import Field, StringConstraints, TypeAdapter

from gloria_core.data import raw_folder as raw
from gloria_core.data.files import did_you_mean
from gloria_core.data.manifest import ManifestError, OnError, shorten
from gloria_core.data.prompts import NO_FINDING, Kind, PromptError, PromptSet, available_prompts, load_prompts
from gloria_core.data.sources import vocabulary

CGMH_LABELS = tuple(vocabulary("cgmh", "labels"))
# The fork's label list, prompts and tables have the former; both are read, and the manifest has the latter
OTHER_SPELLINGS = {"Pigtail malpositon": "Pigtail malposition"}


_FORK = TypeAdapter(dict[str, dict[Kind, list[str]]])
_STRINGS = TypeAdapter(list[Annotated[str, StringConstraints(strip_whitespace=True)]])


def read_studies(path: Path, root: Path, split: str, tasks: Sequence[str], prefix: str) -> pd.DataFrame:
    """The rows of one table as studies; the index + 2 is the row of the table."""
    header = raw.columns_of(path, ["index", "Unnamed: 0", "patient_id", *OTHER_SPELLINGS])
    index = next((name for name in ("index", "Unnamed: 0") if name in header), "")
    spelt = {name: next((old for old in header if OTHER_SPELLINGS.get(old) == name), name) for name in tasks}
    rule = {"values": raw.BINARY, "fold": True, "remedy": "a label of the test table is 1 present or 0 absent"}
    test = {spelt[name]: raw.Column(name, **rule) for name in tasks}
    wanted = {"image": "image", **(test if split == "test" else {"text_label": "labels"})}
    optional = {name: name for name in ("patient_id", "text")}
    if index:
        optional[index] = raw.Column("index", unique=True)
    remedy = "Rename it, or give the labels of this table as `tasks`"
    table = raw.read_table(path, wanted, optional=optional, remedy=remedy)
    images = _lists(path, "image", table["image"]).explode()
    raw.check_cells(path, "image", images, images.notna(), "a study has at least one image")
    if prefix:
        remedy = f"paths begin with path_prefix {prefix!r}, or leave it out"
        raw.check_cells(path, "image", images, images.str.startswith(prefix), remedy)
        images = images.str.removeprefix(prefix).str.lstrip("/")
    images = images.str.removeprefix(f"{root.absolute().as_posix()}/")
    raw.check_paths(path, "image", images, remedy="path_prefix cuts a common beginning off")
    images = images.groupby(level=0)
    numbers = table["index"] if index else table.index.astype(str).to_series(table.index)
    ids = f"{path.name.partition('.')[0]}-" + numbers
    if split != "test":
        present = _lists(path, "text_label", table["labels"]).explode().replace(OTHER_SPELLINGS)
        for index, name in present[present.notna() & ~present.isin([*tasks, NO_FINDING])].items():
            hint = did_you_mean(name, tasks)
            remedy = f"is none of the tasks.{hint} Other labels are given as `tasks`"
            raise ManifestError(f"{path}, row {index + 2}, column 'text_label': label {name!r} {remedy}")
        for name in tasks:
            table[name] = (present == name).groupby(level=0).any().astype(float)
    return table.assign(
        study_id=ids,
        patient_id=table["patient_id"].str.strip() if "patient_id" in header else ids,
        split=split,
        images=images.agg(";".join),
        views=images.agg(lambda paths: ";".join(["FRONTAL"] * len(paths))),
        impression=table["text"] if split == "test" else "",
    )


def _lists(path: Path, column: str, cells: pd.Series) -> pd.Series:
    """The cells as lists of texts: list literals of strings, or strings without brackets, as the fork reads both."""
    lists = []
    for index, cell in cells.str.strip().items():
        try:
            values = ast.literal_eval(cell or "None") if cell[:1] in ("[", "(", "") else [cell]
            lists.append(_STRINGS.validate_python(values))
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            remedy = "is no list of texts; write it as ['first', 'second'], [] for one without entries"
            raise ManifestError(f"{path}, row {index + 2}, column {column!r}: {shorten(cell)} {remedy}") from error
    return pd.Series(lists, cells.index, dtype=object)


def prepare(
    root: Path,
    *,
    train: str = "train.csv",
    valid: str = "",
    test: str = "test.csv",
    tasks: Annotated[Sequence[str], Field(min_length=1)] = CGMH_LABELS,
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
    tasks = [OTHER_SPELLINGS.get(name, name) for name in tasks]
    if len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks must name each label once, they are {tasks}")
    named = {split: name for split, name in (("train", train), ("valid", valid), ("test", test)) if name}
    if not named:
        raise ValueError("give at least one of train, valid and test")
    folder, parts = raw.RawFolder(root, "cgmh"), []
    needs = {name: f"the table of {split}; option {split} names another, or none" for split, name in named.items()}
    for split, path in zip(named, folder.require(needs), strict=True):
        rows = raw.Rows(read_studies(path, root, split, tasks, path_prefix), source=path, cell=("images", "images"))
        rows.exclude_missing(folder.complete(rows.table["images"]), on_error)
        parts.append(rows)
    rows = raw.Rows.concat(parts, source=f"{root} ({', '.join(named.values())}, in this order)")
    frame = raw.manifest_frame(rows.table, tasks)
    if not valid:
        frame = raw.draw_valid(frame, fraction=0.1, seed=seed)
    if prompts:
        frame = _with_texts(frame, _prompts(prompts, root), tasks, seed=seed, n_negative=n_negative)
    rows.table = frame
    return raw.finish(folder, rows, tasks, seed=seed)


def _prompts(given: str | PromptSet, root: Path) -> PromptSet:
    """A prompt set by name, or from a file in our form or in the fork's, where an empty sentence stands for none."""
    if isinstance(given, PromptSet):
        return given
    if given in available_prompts():
        return load_prompts(given)
    path = root / given
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = {} if "classes" in content else _FORK.validate_python(content)
    except (OSError, ValueError, TypeError) as error:
        sets = f"a prompt file is {{label: {{pos, neg, unc: [...]}}}}; names of sets: {', '.join(available_prompts())}"
        raise PromptError(f"prompts {given!r}: {path} cannot be read ({error}); {sets}") from error
    if not classes:
        return load_prompts(path)
    for kinds in classes.values():
        for texts in kinds.values():
            texts[:] = filter(str.strip, texts)
    return PromptSet(path.stem, {OTHER_SPELLINGS.get(label, label): kinds for label, kinds in classes.items()})


def _with_texts(
    frame: pd.DataFrame, prompts: PromptSet, tasks: list[str], *, seed: int, n_negative: int
) -> pd.DataFrame:
    """A copy whose empty impressions say the labels."""
    empty = frame["impression"].str.strip() == ""
    studies = frame[empty].copy()
    # an absent label without a negative sentence is passed over, as its empty sentence is in the released code
    silent = [name for name in tasks if not prompts.classes.get(name, {}).get("neg")]
    studies[silent] = studies[silent].replace(0, np.nan)
    texts = raw.label_texts(studies, tasks, prompts, seed=seed, n_negative=n_negative)
    written = pd.Series([text for text, _ in texts], studies.index)
    return frame.assign(impression=frame["impression"].mask(empty, written))
