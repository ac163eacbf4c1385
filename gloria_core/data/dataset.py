"""A prepared dataset: the manifest, where its files are, and the decoded-image cache, opened from one path.

Notebook 01 writes `manifest.csv` and, beside it, `dataset.json` (name, root, image size, cache folder). Every later
notebook is given the path of the manifest alone and gets all of it back with `open_dataset`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from gloria_core.data.cache import ImageCache
from gloria_core.data.manifest import (
    COMPETITION_LABELS,
    ManifestError,
    label_columns,
    read_manifest,
    write_manifest,
)
from gloria_core.data.shares import Shares

COMPETITION_SYNONYMS = ("Effusion",)
"""The NIH tables' name for Pleural Effusion."""


@dataclass(frozen=True)
class PreparedDataset:
    """A checked manifest `frame`, the `cache` of its images at `size` pixels, and the `root` of its image paths."""

    name: str
    root: Path
    size: int
    frame: pd.DataFrame
    cache: ImageCache

    @property
    def competition(self) -> list[str]:
        """Label columns that are one of the five findings of the CheXpert competition: what `macro` is the mean of."""
        named = {*COMPETITION_LABELS, *COMPETITION_SYNONYMS}
        return [name for name in label_columns(self.frame) if name in named]

    def without(self, rule: str) -> pd.DataFrame:
        """The frame less the test studies that a rule "column=value" names; training and validation stay whole.

        For judging outside a confound: `without("meta_source=A")`. Raises ManifestError for a rule that names no test
        study, since a comparison with itself would look like a result.
        """
        column, _, value = rule.partition("=")
        if column not in self.frame:
            raise ManifestError(f"rule {rule!r}: the manifest has no column {column!r}")
        named = (self.frame["split"] == "test") & (self.frame[column].astype(str) == value)
        if not named.any():
            there = ", ".join(sorted(set(self.frame[column].astype(str)))[:8])
            raise ManifestError(f"rule {rule!r} names no test study; {column} is one of {there}")
        return self.frame[~named]

    def split(self, name: str) -> pd.DataFrame:
        """Rows of split `name` (train, valid or test); an empty split raises ManifestError."""
        rows = self.frame[self.frame["split"] == name]
        if rows.empty:
            raise ManifestError(f"dataset {self.name!r} has no row in split {name!r}; prepare it with more patients")
        return rows


def save_dataset(
    folder: str | Path,
    frame: pd.DataFrame,
    *,
    name: str,
    root: str | Path,
    size: int,
    on_error: str = "raise",
    shares: str | Path = "",
) -> PreparedDataset:
    """Write `folder/manifest.csv` and `folder/dataset.json`, and build `folder/cache` from the images under `root`.

    `on_error="exclude"` leaves studies with unreadable images out of the manifest; they are listed, with the reason,
    in `folder/excluded.csv`. `shares`: a folder that `gloria_core.data.shares` filled; its images need no decoding.
    Raises ManifestError or ImageError otherwise, CacheError for a folder without shares of this size.
    """
    folder, root = Path(folder), Path(root).resolve()
    found = Shares(shares, size=size) if str(shares) else None
    folder.mkdir(parents=True, exist_ok=True)
    decoded = found.find if found is not None else None
    cache = ImageCache.build(frame, root, size=size, folder=folder / "cache", on_error=on_error, known=decoded)
    if found is not None:
        print(found.summary(len(cache)))
    frame = cache.usable(frame).reset_index(drop=True)
    excluded = frame.attrs["excluded"]
    if excluded:
        pd.DataFrame(excluded).to_csv(folder / "excluded.csv", index=False)
    write_manifest(frame, folder / "manifest.csv")
    # paths inside the folder are kept relative to it, so that it can be moved as a whole
    known = {"name": name, "root": _relative(root, folder), "size": size, "cache": _relative(cache.index, folder)}
    temporary = folder / "dataset.json.tmp"
    temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "dataset.json")
    return PreparedDataset(name, root, size, frame, cache)


def open_dataset(manifest: str | Path) -> PreparedDataset:
    """Open what `save_dataset` wrote, given the path of its `manifest.csv`.

    Raises ManifestError where the manifest, `dataset.json` or the image folder is missing, naming the remedy.
    """
    manifest = Path(manifest)
    description = manifest.with_name("dataset.json")
    for path in (manifest, description):
        if not path.is_file():
            raise ManifestError(f"{path} is missing: run notebooks/01_data_preparation.ipynb, which writes it")
    known = json.loads(description.read_text(encoding="utf-8"))
    root = (manifest.parent / known["root"]).resolve()
    if not root.is_dir():
        raise ManifestError(f"{description} names the image folder {root}, which is not there: prepare the data again")
    frame = read_manifest(manifest)
    cache = ImageCache((manifest.parent / known["cache"]).resolve())
    return PreparedDataset(known["name"], root, known["size"], frame, cache)


def _relative(path: Path, folder: Path) -> str:
    path, folder = Path(path).resolve(), folder.resolve()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
