"""A part of a dataset as a folder of its own: the files of listed studies under the same names, and their manifest."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from gloria_core.data.manifest import ManifestError, masks_of, write_manifest

# Columns by which a list may name studies: their id, or the path of one of their images (CheXpert's is `Path`).
LISTS = ("study_id", "images", "Path", "path", "image")


def copy_studies(frame: pd.DataFrame, root: str | Path, target: str | Path, *, listed: pd.DataFrame) -> pd.DataFrame:
    """Copies images and masks of the listed studies from `root` to `target/`, writes `target/manifest.csv`; returns it.

    `listed` names studies in a column of `LISTS`; a path counts with or without its leading folders (CheXpert's tables
    begin with `CheXpert-v1.0/`). Studies keep their order, split and label rank. A second call completes a first that
    was cut; a file of the same length and time is not copied again.
    Raises ManifestError, before anything is copied, for names that no study or several have, for files that are not
    there, and for a target inside the root, around it, or with a manifest of other studies.
    """
    root, target = Path(root).resolve(), Path(target).resolve()
    if target == root or root in target.parents or target in root.parents:
        raise ManifestError(f"{target} and the dataset's root {root} hold each other; copy to a folder beside it")
    rows = frame[frame["study_id"].isin(_named(frame, listed))].reset_index(drop=True)
    masks = {mask["path"] for row in rows.to_dict("records") for mask in masks_of(row)}
    files = sorted(masks.union(*(cell.split(";") for cell in rows["images"])))
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        remedy = "complete the download, or take these studies off the list"
        raise ManifestError(f"{len(missing)} of {len(files)} files are not below {root}: {_shown(missing)}; {remedy}")
    manifest = target / "manifest.csv"
    if manifest.is_file():
        there = set(pd.read_csv(manifest, dtype=str, usecols=["study_id"])["study_id"])
        if there != set(rows["study_id"]):
            raise ManifestError(f"{manifest} lists {len(there)} other studies; choose a new folder")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: _copy(root / file, target / file), files))
    write_manifest(rows, manifest)  # last: a folder with a manifest is whole
    return rows


def _named(frame: pd.DataFrame, listed: pd.DataFrame) -> set[str]:
    """The ids of the studies that the list names."""
    column = next((name for name in LISTS if name in listed), None)
    if column is None:
        names = ", ".join(map(str, listed))
        raise ManifestError(f"the list has the columns {names}; it needs one of {', '.join(LISTS)}")
    names = list(dict.fromkeys(name for cell in listed[column].dropna().astype(str) for name in cell.split(";")))
    if not names:
        raise ManifestError(f"column {column!r} of the list is empty")
    owners = {study: [study] for study in frame["study_id"]} if column == "study_id" else _by_path(frame, names)
    unknown = [name for name in names if not owners.get(name)]
    if unknown:
        raise ManifestError(f"{len(unknown)} of {len(names)} names of the list are no {column} here: {_shown(unknown)}")
    several = [name for name in names if len(owners[name]) > 1]
    if several:
        remedy = "give more of the path, or a list of study_id"
        raise ManifestError(f"{len(several)} paths of the list name several studies: {_shown(several)}; {remedy}")
    return {owners[name][0] for name in names}


def _by_path(frame: pd.DataFrame, names: list[str]) -> dict[str, list[str]]:
    """For each path of the list its studies, whichever of list and manifest has more leading folders."""
    table = frame[["study_id", "images"]].assign(path=frame["images"].str.split(";")).explode("path")
    table = table.assign(ending=table["path"].map(_endings)).explode("ending")
    exact, shortened = (table.groupby(column)["study_id"].agg(set).to_dict() for column in ("path", "ending"))
    return {
        name: sorted(next((exact[end] for end in _endings(name) if end in exact), shortened.get(name, ())))
        for name in names
    }


def _endings(path: str) -> list[str]:
    """The path, and the path without its first, first two, ... folders."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def _copy(source: Path, target: Path) -> None:
    """Copy with the time, unless a file of the same length and time is there; an interrupted copy has another name."""
    stat = source.stat()
    if target.is_file() and (target.stat().st_size, target.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    shutil.copy2(source, temporary)
    temporary.replace(target)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
