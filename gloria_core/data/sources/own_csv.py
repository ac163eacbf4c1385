"""Your own images: any CSV with a column of image paths, and columns of text and labels, if you have them.

prepare("own_csv", "my_data", {"table": "studies.csv", "columns": {"image": "file", "impression": "report"},
                               "labels": ["Effusion", "Pneumothorax"]})
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.files import did_you_mean
from gloria_core.data.manifest import FIXED, META, VIEWS, ManifestError, OnError
from gloria_core.data.splits import DEFAULT_FRACTIONS, assign_splits

# What a column can be; each is looked for under its own name unless `columns` gives another
Name = Literal["image", "study", "patient", "split", "view", "findings", "impression"]
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "val", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# How label cells are read, in lower case; anything else is an error that names the row
LABEL_VALUES = {
    **dict.fromkeys(("1", "1.0", "true", "yes", "positive", "present"), 1.0),
    **dict.fromkeys(("0", "0.0", "false", "no", "negative", "absent"), 0.0),
    **dict.fromkeys(("-1", "-1.0", "uncertain"), -1.0),
    **dict.fromkeys(("", "nan", "na", "none", "unknown"), np.nan),
}
LABEL_REMEDY = "a label is 1, 0, -1 or blank (or yes, no, uncertain)"


COLUMNS = {
    "image": raw.Column("image"),
    "study": raw.Column("study_id", unique=True),
    "patient": raw.Column("patient_id", strip=True, filled=True, remedy="give every study its patient"),
    "split": raw.Column("split", values=SPLIT_NAMES, fold=True),
    "view": raw.Column("views"),
    "findings": raw.Column("findings", strip=True),
    "impression": raw.Column("impression", strip=True),
}


def prepare(
    root: Path,
    *,
    table: str = "studies.csv",
    columns: Mapping[Name, str] | None = None,
    labels: Sequence[str] | Mapping[str, str] = (),
    patient_pattern: str = "",
    separator: str = "",
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest of the studies in `root/table`; one study a row.

    columns: what -> your column's name, for image, study, patient, split, view, findings, impression. Only image is
        needed. An image cell is a path below the root, or several with ";" between them (then `view`, too).
    labels: your label columns, or label name -> your column. Cells are 1 / 0 / -1 / blank (uncertain stays -1), or
        words such as yes and no. Columns "meta_..." are taken over as they are.
    separator: of the cells; by default the one of , ; tab and | that fits the header.
    patient_pattern: where no column says the patient, a regular expression whose first group finds it in the image
        path: "(p\\d+)/" in "p17/study3/a.png". Without either, every row is its own patient, and a warning is given:
        images of one person could then stand on both sides of the split.
    split: your column's train / valid / test (val, dev, ... are understood); without it, `fractions` are drawn,
        patient-disjoint and stratified, with `seed`.
    on_error="exclude" leaves out rows whose image is not there and lists them in `attrs["excluded"]`.
    """
    named = {"image": "image", **(columns or {})}
    folder = raw.RawFolder(root, "own_csv")
    (path,) = folder.require({table: "your table of images; option table=... names another"})
    label_of = dict(labels) if isinstance(labels, Mapping) else {name: name for name in labels}
    studies = _read(path, named, label_of, separator)
    source = f"{path} (read as Windows-1252, not UTF-8)" if studies.attrs["encoding"] == "cp1252" else path
    # paths that begin with the root's own path are cut to what is below it
    start = f"{root.absolute().as_posix()}/"
    images = studies["image"].str.split(";").map(lambda paths: [path.strip().removeprefix(start) for path in paths])
    raw.check_paths(path, named["image"], images.explode())
    studies["images"] = images.map(";".join)
    if "patient_id" not in studies:
        studies["patient_id"] = _patients(path, studies, patient_pattern)
    if "study_id" not in studies:
        studies["study_id"] = studies["images"].str.replace(";", "+")
    unknown = images.map(lambda files: ";".join(["FRONTAL"] * len(files)))
    views = studies["views"].str.upper() if "views" in studies else unknown
    studies["views"] = views.where(views.str.strip(";") != "", unknown)
    rows = raw.Rows(studies, source=source, cell=(named["image"], "images"))
    rows.exclude_missing(folder.complete(studies["images"]), on_error)
    if "split" not in studies:
        rows.table = assign_splits(raw.manifest_frame(rows.table, list(label_of)), fractions=fractions, seed=seed)
    return raw.finish(folder, rows, list(label_of), seed=seed)


def _read(path: Path, named: Mapping[str, str], label_of: Mapping[str, str], separator: str) -> pd.DataFrame:
    """The table under our names, checked."""
    clash = [name for name in label_of if name in FIXED or name.startswith(META)]
    if clash:
        raise ManifestError(f"{path}: a label cannot be called {clash[0]!r}; rename it by labels={{name: column}}")
    header = raw.header_of(path, separator)
    wanted = {theirs: COLUMNS[ours] for ours, theirs in named.items()}
    for name, column in label_of.items():
        if column in wanted:
            raise ManifestError(f"{path}: column {column!r} is given as {wanted[column].name} and as label {name!r}")
        wanted[column] = raw.Column(name, values=LABEL_VALUES, fold=True, remedy=LABEL_REMEDY)
    taken, lower = {*named, *map(str.lower, wanted)}, [name.lower() for name in header]
    free = {name: rule for name, rule in COLUMNS.items() if name in lower and name not in taken}
    free |= {name: name for name in header if name.startswith(META) and name not in wanted}
    remedy = "Name your columns by the options columns and labels"
    table = raw.read_table(path, {**wanted, **free}, separator=separator, remedy=remedy)
    if "views" in table:
        good = table["views"].str.upper().str.split(";").map(lambda names: set(names) <= {*VIEWS, ""})
        raw.check_cells(path, named.get("view", "view"), table["views"], good, f"a view is one of {', '.join(VIEWS)}")
    return table


def _patients(path: Path, table: pd.DataFrame, pattern: str) -> pd.Series:
    if not pattern:
        hint = did_you_mean("patient", raw.header_of(path), cutoff=0.5)
        warnings.warn(
            f"{path}: no column says the patient, so every row is one.{hint} If people have several images, name the "
            "column, columns={'patient': ...}, or give patient_pattern",
            stacklevel=3,
        )
        return table.get("study_id", table["images"])
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"patient_pattern {pattern!r} is no regular expression ({error})") from error
    if groups < 1:
        raise ValueError(f"patient_pattern {pattern!r} needs a group, such as '(p[0-9]+)/'")
    patients = table["images"].str.extract(pattern)[0].fillna("")
    remedy = f"patient_pattern {pattern!r} finds no patient in the path"
    raw.check_cells(path, "image", table["images"], patients != "", remedy)
    return patients
