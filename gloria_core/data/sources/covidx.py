"""COVIDx (Wang, Lin, Wong 2020, https://doi.org/10.1038/s41598-020-76550-z): normal, pneumonia, COVID-19 radiographs.

Read is the folder that the scripts of COVID-Net or Kaggle's covidx-cxr2 give: `train/`, `test/` (and `val/`),
and lists `train_COVIDx9A.txt`, `test_COVIDx9A.txt` of any version: patient, file, class and, in later ones, source,
with spaces between. Versions "A" and up to 5 have normal, pneumonia and COVID-19; "B" has negative and positive.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.raw_folder import absent, check_option, check_paths, existing, finish, patient_leaks, settle
from gloria_core.data.splits import assign_splits, drawn_once, seen_in_training, torn_patients

CLASSES = {
    "normal": ("Normal", "Pneumonia", "COVID-19"),
    "pneumonia": ("Pneumonia", "Normal", "COVID-19"),
    "COVID-19": ("COVID-19", "Normal", "Pneumonia"),
    "negative": (None, "COVID-19"),
    "positive": ("COVID-19",),
}
"""Class of the list -> the label that is 1 (None: none), then those that are 0."""
HOW = "github.com/lindawangg/COVID-Net, docs/COVIDx.md, or Kaggle, andyczhao/covidx-cxr2"
_LINE = re.compile(r"(\S+)\s+(.+?)\s+(normal|pneumonia|COVID-19|negative|positive)(?:\s+(\S+))?")


def prepare(
    root: Path | str,
    *,
    version: str = "",
    split_rule: Literal["patient", "published"] = "patient",
    seed: int = 0,
    on_error: OnError = "raise",
) -> pd.DataFrame:
    """The checked manifest: one study an image, labels "Normal", "Pneumonia" (no COVID-19) and "COVID-19", or the last.

    version: as in the lists' names, "9A" for train_COVIDx9A.txt, "CXR-3A" for train_COVIDx_CXR-3A.txt; needed where the
        root has several. Without a version in the names (`train.txt`, `test.txt`) it is "".
    split_rule: test is the owner's list. "patient" draws an eighth of the other patients as valid (of the owner's
        `val.txt`, if it is there, all) and leaves training images out whose patient is in test; "published" is MGCA's
        (Wang et al. 2022): a fifth of the training rows as valid by scikit-learn; patients torn apart are counted in
        `attrs["leaks"]`. A patient is source and number: sources number theirs independently.
    on_error="exclude" leaves out images that are not there. What is left out is in `attrs["excluded"]`.
    Raises ManifestError naming file, line and remedy.
    """
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("on_error", on_error, ("raise", "exclude"))
    root = Path(root)
    table = pd.concat([_read(path, split) for split, path in _lists(root, version)], ignore_index=True)
    twice = table["name"].duplicated()
    if twice.any():
        row = table[twice].iloc[0]
        raise ManifestError(
            f"{row['list']}, line {row['line']}: file {row['name']!r} is listed twice; keep it in one list"
        )
    leaks: dict[str, int] = {}
    if split_rule == "published":
        learn = (table["split"] == "train").to_numpy()
        table.loc[learn, "split"] = drawn_once(int(learn.sum()), held_out=0.2)
        leaks = patient_leaks(table["patient"], table["split"])
        leaks |= seen_in_training(table["patient"], table["split"], rows="images", unit="patient")
        table["patient"] = torn_patients(table["patient"], table["split"])
    table["file"] = _files(root, table)
    gone = _absent(table, table["file"] != "", "no such image file")
    table = table[table["file"] != ""]
    settle(gone, source=f"{root}: lists of COVIDx", on_error=on_error, left=len(table))
    if split_rule == "patient":
        tested = set(table.loc[table["split"] == "test", "patient"])
        clean = (table["split"] == "test") | ~table["patient"].isin(tested)
        gone += _absent(table, clean, "its patient is in the test list")
        table = _with_valid(table[clean].reset_index(drop=True), seed)
    return finish(_frame(table), source=f"manifest of {root}", seed=seed, failures=gone, leaks=leaks)


def _lists(root: Path, version: str) -> list[tuple[str, Path]]:
    """Split and list file, of one version."""
    if not root.is_dir():
        raise ManifestError(
            f"covidx: the root {root} is not a folder; give the folder that holds train/ and test/; {HOW}"
        )
    found = {
        re.fullmatch(r"train(?:_COVIDx_?)?(.*)\.txt", path.name).group(1): path
        for folder in (root, root / "labels")
        for path in sorted(folder.glob("train*.txt"))
        if re.fullmatch(r"train(?:_COVIDx_?.*)?\.txt", path.name)
    }
    if not found:
        raise ManifestError(f"covidx: {root} lacks train_COVIDx<version>.txt (or train.txt) and its test list; {HOW}")
    if version not in found:
        if version or len(found) > 1:
            raise ManifestError(
                f"covidx: {root} has lists of version {', '.join(sorted(found))}, not {version!r}; name one"
            )
        version = next(iter(found))
    train = found[version]
    parts = [
        (split, train.with_name(train.name.replace("train", word)))
        for split, word in (("test", "test"), ("valid", "val"))
    ]
    if not parts[0][1].is_file():
        raise ManifestError(f"covidx: {parts[0][1]} is missing; it belongs to {train.name}; {HOW}")
    return [("train", train), *[(split, path) for split, path in parts if path.is_file()]]


def _read(path: Path, split: str) -> pd.DataFrame:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ManifestError(
                f"{path}, line {number}: {line.strip()[:80]!r} is not 'patient file class source' with a class of "
                f"{', '.join(CLASSES)}; get the list again"
            )
        patient, name, kind, source = match.groups(default="")
        rows.append((f"{source}-{patient}" if source else patient, name, kind, source, split, number))
    if not rows:
        raise ManifestError(f"{path}: the list is empty; get it again; {HOW}")
    table = pd.DataFrame(rows, columns=["patient", "name", "kind", "source", "split", "line"])
    check_paths(path, "file", table["name"])
    return table.assign(list=str(path), folder={"valid": "val"}.get(split, split))


def _files(root: Path, table: pd.DataFrame) -> pd.Series:
    """Path of each image: in the folder of its list, or below data/, where COVID-Net's scripts put it."""
    places = [table["folder"] + "/" + table["name"], "data/" + table["folder"] + "/" + table["name"]]
    there = existing(root, pd.concat(places).tolist())
    first, second = (place.where(place.isin(there), "") for place in places)
    return first.where(first != "", second)


def _absent(table: pd.DataFrame, good: pd.Series, reason: str) -> list:
    numbered = table.assign(name=table["name"]).set_index(table["line"] - 2)
    return absent(numbered, good.to_numpy(), key="name", value="name", column="file", reason=reason)


def _with_valid(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A split of the owner's that is torn by a patient goes to valid; without the owner's, an eighth is drawn."""
    if (table["split"] == "valid").any():
        held = set(table.loc[table["split"] == "valid", "patient"])
        return table.assign(
            split=table["split"].mask((table["split"] == "train") & table["patient"].isin(held), "valid")
        )
    learn = table["split"] == "train"
    marks = _frame(table[learn]).drop(columns="split")
    parts = assign_splits(marks, fractions={"train": 7 / 8, "valid": 1 / 8}, seed=seed)["split"]
    return table.assign(split=np.where(learn, parts.reindex(table.index), table["split"]))


def _frame(table: pd.DataFrame) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "study_id": table["name"],
            "patient_id": table["patient"],
            "split": table["split"],
            "images": table["file"],
            "views": "FRONTAL",
            "meta_class": table["kind"],
            "meta_source": table["source"],
        }
    )
    for label in ("Normal", "Pneumonia", "COVID-19"):
        known = {kind: float(names[0] == label) for kind, names in CLASSES.items() if label in names}
        values = table["kind"].map(known).astype(float)
        if values.notna().any():
            frame[label] = values
    return frame
