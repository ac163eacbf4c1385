"""Where a dataset keeps the image that its table calls by an id, and how large that file is.

Owners' tables name images by an id without folder or suffix, and copies of a dataset come in other formats and sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from PIL import Image
from pydicom import dcmread

from gloria_core.data.manifest import ManifestError
from gloria_core.data.owner_folder import existing

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
