"""Decoded images in one memory-mapped file, so that training reads bytes instead of decoding files every epoch.

One cache holds every image of a frame, resized to one size, as uint8 (n, size, size), beside an index with the
original size of each image. Its name depends on the image paths, the size, the behavior and the format version, never
on the root folder. It appears whole or not at all: the index is written last, by an atomic rename. A killed build is
taken up where it stopped; of two processes that build the same cache at once, one builds and the other waits for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from gloria_core.data.cache_build import Task, ensure
from gloria_core.data.cache_files import FORMAT, CacheError, Entry, checksum, read_index, remedy
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError
from gloria_core.types import Behavior

__all__ = ["CacheError", "ImageCache", "cache_key", "image_paths"]

_LISTED = 10  # bad images spelled out in an error; the rest is counted


def image_paths(frame: pd.DataFrame) -> list[str]:
    """The different image paths of a manifest frame, sorted."""
    return sorted({path for cell in frame["images"] for path in cell.split(";")})


def cache_key(frame: pd.DataFrame, size: int, *, behavior: Behavior = "corrected") -> str:
    """16 hex digits that name the cache of these images at this size; the same under every root folder."""
    content = [FORMAT, size, behavior, image_paths(frame)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class ImageCache:
    """Read access to a finished cache; `build` makes or finds one. Pickles as a path, so workers open their own map.

    Attributes:
        index: path of the index file; size: side of the squares in pixels; behavior: that of the geometry
        paths: the cached image paths, sorted; their position is the row
        excluded: one dict (study_id, row, column, reason) for each study of the frame given to `build` that has an
            image which cannot be used; always empty with on_error="raise"
    """

    def __init__(self, index: str | Path) -> None:
        """Open the cache of this index file. Raises: CacheError if it is missing, damaged or of another version."""
        self.index = Path(index)
        self.excluded: list[dict] = []
        body = read_index(self.index)
        self.size: int = body["size"]
        self.behavior: Behavior = body["behavior"]
        self.paths: tuple[str, ...] = tuple(body["path"])
        self._heights, self._widths = body["height"], body["width"]
        self._bad: dict[str, str] = {item["path"]: item["reason"] for item in body["bad"]}
        self._rows = {path: row for row, path in enumerate(self.paths)}
        self._checksums = body["pixels_crc"]
        shape = (len(self.paths), self.size, self.size)
        self._pixels = np.memmap(self.index.parent / body["pixels"], np.uint8, mode="r", shape=shape)

    @classmethod
    def build(
        cls,
        frame: pd.DataFrame,
        root: str | Path,
        *,
        size: int,
        folder: str | Path,
        behavior: Behavior = "corrected",
        workers: int = 2,
        on_error: Literal["raise", "exclude"] = "raise",
        progress: bool | Callable[[int, int], None] = True,
        known: Callable[[str, Path], tuple[Entry, NDArray[np.uint8]] | None] | None = None,
    ) -> ImageCache:
        """The cache of a frame's images: opened if there is a valid one in `folder`, made otherwise.

        A cache whose source files have changed since is made anew. `workers` are threads: decoding runs outside
        Python's lock. `progress` prints a line every few seconds, or calls `progress(done, total)` after each block.
        `known(path, file)` gives the index entry and pixels of an image that was decoded before, or None; all threads
        ask it (`gloria_core.data.shares.Shares.find`).

        Raises:
            ImageError: images cannot be used and on_error="raise" (all are counted, the first ten listed with study,
                row and file), or none can be used at all.
            CacheError: the cache in `folder` is damaged.
            ValueError: unknown options, or a frame without images.
        """
        if on_error not in ("raise", "exclude"):
            raise ValueError(f"on_error={on_error!r} is unknown: use 'raise' or 'exclude'")
        paths = image_paths(frame)
        if not paths:
            raise ValueError("the frame has no images: an image cache needs at least one row")
        if size < 1 or workers < 1:
            raise ValueError(f"size={size} and workers={workers} must both be at least 1")
        key = cache_key(frame, size, behavior=behavior)
        task = Task(Path(root), Path(folder), key, size, behavior, workers, progress, known)
        bad = ensure(task, paths, keep_bad=on_error == "exclude")
        excluded = _excluded(frame, bad)
        if bad and on_error == "raise":
            raise ImageError(_complaint(excluded, bad, len(paths), root))
        if len(bad) == len(paths):
            raise ImageError(f"none of the {len(paths)} images under {root} can be used: {next(iter(bad.values()))}")
        cache = cls(task.index)
        cache.excluded = excluded
        return cache

    def __len__(self) -> int:
        """Number of cached images."""
        return len(self.paths)

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def __getitem__(self, item: str | int) -> NDArray[np.uint8]:
        """One image by path or row. Shape: (size, size) uint8, read-only."""
        return np.asarray(self._pixels[self.row(item) if isinstance(item, str) else item])

    def image(self, path: str) -> NDArray[np.uint8]:
        """One image by path. Shape: (size, size) uint8, read-only. Raises: CacheError for an unknown path."""
        return self[path]

    def rows(self, paths: Sequence[str]) -> NDArray[np.uint8]:
        """Several images, copied. Shape: (len(paths), size, size) uint8."""
        return np.asarray(self._pixels[[self.row(path) for path in paths]])

    def row(self, path: str) -> int:
        """Position of an image in the cache. Raises: CacheError if it is not there, with the reason if it is known."""
        try:
            return self._rows[path]
        except KeyError:
            reason = self._bad.get(path, "it was not in the frame that the cache was built from")
            raise CacheError(
                f"image {path!r} is not in the cache {self.index.name}: {reason}. Build one for this frame"
            ) from None

    def geometry(self, path: str) -> Geometry:
        """How the original pixels of an image lie in its square."""
        row = self.row(path)
        return Geometry.fit(self._heights[row], self._widths[row], self.size, behavior=self.behavior)

    def usable(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame without studies that have an unusable image; what was left out is added to attrs["excluded"].

        Raises: CacheError if an image is neither cached nor known as unusable.
        """
        for path in image_paths(frame):
            if path not in self._bad:
                self.row(path)
        keep = [not any(path in self._bad for path in cell.split(";")) for cell in frame["images"]]
        kept = frame[keep].copy()
        kept.attrs["excluded"] = [*frame.attrs.get("excluded", []), *_excluded(frame, self._bad)]
        return kept

    def verify(self) -> None:
        """Compare all pixels with the checksums of the build. Raises: CacheError naming the first that differs."""
        for row, path in enumerate(self.paths):
            if checksum(self[row]) != self._checksums[row]:
                raise CacheError(f"image {path!r} in {self.index} is damaged. {remedy(self.index)}")

    def __getstate__(self) -> dict:
        return {"index": self.index, "excluded": self.excluded}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["index"])
        self.excluded = state["excluded"]


def _excluded(frame: pd.DataFrame, bad: dict[str, str]) -> list[dict]:
    """Studies with a bad image, in the form of the manifest's exclusions; the CSV's header is row 1."""
    if not bad:
        return []
    found = []
    for place, (label, study, cell) in enumerate(zip(frame.index, frame["study_id"], frame["images"], strict=True)):
        reasons = [bad[path] for path in cell.split(";") if path in bad]
        if reasons:
            # a frame cut from a manifest keeps its integer labels, and with them the row of the CSV
            row = (int(label) if isinstance(label, int | np.integer) else place) + 2
            found.append({"study_id": study, "row": row, "column": "images", "reason": "; ".join(reasons)})
    return found


def _complaint(excluded: list[dict], bad: dict[str, str], total: int, root: str | Path) -> str:
    lines = [f"{len(bad)} of {total} images under {root} cannot be used:"]
    lines += [f"  study {item['study_id']}, row {item['row']}: {item['reason']}" for item in excluded[:_LISTED]]
    if len(excluded) > _LISTED:
        lines.append(f"  ... and {len(excluded) - _LISTED} more studies")
    lines.append(
        "Repair them and build again (what is done is kept), or leave the studies out with on_error='exclude'."
    )
    return "\n".join(lines)
