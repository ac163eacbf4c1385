"""Decoded images in one memory-mapped file, so that training reads bytes instead of decoding files every epoch.

A cache holds every image of a frame, resized to one size, as uint8 (size, size). Its name KEY depends on the image
paths, the size and the format version, never on the root folder. It consists of two files:

    KEY.u8      one row for each image: a record (done flag, checksum, original size, length and time of the image
                file) and the pixels. The file has its full length from the start; any process may write any row.
    KEY.json    the image paths, and why images cannot be used. It is written last, by an atomic rename: while it is
                absent there is no cache.

The done flag of a row is set after its record and pixels are on disk, and a build that goes on after a kill or a power
cut compares each row with its checksum first. Builds that run side by side share the work: each takes blocks in an
order of its own and skips what is done. A row begins on a memory page of its own, so that machines that see the same
disk never write the same page for different images.

Several machines can each decode a part of a dataset's images:

    python -m gloria_core.data.cache --dataset chexpert --data-root /data/chexpert --size 256
        --folder /disk/cache --shard 2/8 [--option views=all] [--workers 16]

decodes the 2nd of every 8 images. Shards may run at once, in any order; a killed shard goes on when the command is
given again. Then notebook 01 with `shards: /disk/cache` (or `save_dataset(..., shards=...)`) decodes what is missing
and finishes the cache in that folder. Give the options that notebook 01 is given, so that both find the same images.

Exit codes: 0 the shard is finished; 2 the command, the dataset or all images of the shard are wrong.
"""

import argparse
import json
import os
import random
import re
import sys
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, BinaryIO, Self

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, PositiveInt, validate_call
from tqdm import tqdm

from gloria_core.data import sources
from gloria_core.data.files import atomic_write, content_hash
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError, decode_gray, read_bytes
from gloria_core.data.manifest import ExcludedRows, Failure, OnError, failures_at, listed, path_problem

FORMAT, BEHAVIOR = 2, "corrected"  # of the file, of the geometry
COMMAND = "python -m gloria_core.data.cache"

_RECORD = np.dtype(
    [("done", "<u4"), ("crc", "<u4"), ("height", "<u4"), ("width", "<u4"), ("bytes", "<i8"), ("mtime_ns", "<i8")]
)
_DONE = (1).to_bytes(4, "little")
_PIXELS_AT, _PAGE = 64, 4096  # bytes
_BLOCK = 128  # images between two syncs to disk


class CacheError(ValueError):
    """A cache that is damaged or does not hold what was asked; the message names the file and the remedy."""


def image_paths(frame: pd.DataFrame) -> list[str]:
    """The different image paths of a manifest frame, sorted."""
    return sorted({path for cell in frame["images"] for path in cell.split(";")})


def cache_key(paths: Sequence[str], size: int) -> str:
    """16 hex digits that name the cache of these sorted paths at this size; the same under every root folder."""
    return content_hash([FORMAT, size, BEHAVIOR, list(paths)])


class ImageCache:
    """Read access to a finished cache; `build` makes or finds one. Pickles as a path, so workers open their own map.

    Attributes:
        index: path of KEY.json; size: side of the squares in pixels
        paths: the cached image paths, sorted; bad: image path -> why it cannot be used
    """

    def __init__(self, index: str | Path) -> None:
        """Open the cache of this index file. Raises: CacheError if it is missing, damaged or of another version."""
        self.index = Path(index)
        remedy = f"Delete {self.index} and build the cache again"
        try:
            body = json.loads(self.index.read_bytes())
            version, self.size, listed, self.bad = (body[name] for name in ("format", "size", "paths", "bad"))
            if version == FORMAT and self.index.stem != cache_key(listed, self.size):
                raise ValueError("it does not belong to its name")
        except FileNotFoundError:
            raise CacheError(f"{self.index}: no such image cache. Make it with ImageCache.build") from None
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{self.index}: the index is damaged ({error}). {remedy}") from None
        if version != FORMAT:
            raise CacheError(f"{self.index}: cache format {version}, this version reads {FORMAT}. {remedy}")
        file, dtype = self.index.with_suffix(".u8"), _row_type(self.size)
        expected = len(listed) * dtype.itemsize
        if not file.exists() or file.stat().st_size != expected:
            state = f"has {file.stat().st_size} bytes instead of {expected}" if file.exists() else "is missing"
            raise CacheError(f"{file}: the pixel file {state}. {remedy}")
        self._rows = np.memmap(file, dtype, mode="r", shape=(len(listed),))
        self._row_of = {path: row for row, path in enumerate(listed) if path not in self.bad}
        self.paths: tuple[str, ...] = tuple(self._row_of)

    @classmethod
    @validate_call(config=ConfigDict(arbitrary_types_allowed=True))
    def build(
        cls,
        frame: pd.DataFrame,
        root: str | Path,
        *,
        size: int,
        folder: str | Path,
        workers: int = 2,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> Self:
        """The cache of a frame's images: opened if there is a valid one in `folder`, made or completed otherwise.

        Images whose files have changed since (length or time) are decoded again, in place. `workers` are threads:
        decoding runs outside Python's lock.

        Raises:
            ImageError: images cannot be used and on_error="raise" (all are counted, the first ten listed with study,
                row and file), or none can be used at all.
            CacheError: the cache in `folder` is damaged.
            ValueError: unknown options, or a frame without images.
        """
        paths = image_paths(frame)
        index = Path(folder) / f"{cache_key(paths, size)}.json"
        if index.exists():
            bad = cls(index).bad
        # a finished cache of somebody else's, on a read-only disk, is taken as it is
        if not index.exists() or os.access(folder, os.W_OK):
            bad = fill(paths, root, size=size, folder=folder, workers=workers, progress=progress)
        if len(bad) == len(paths):
            raise ImageError(f"none of the {len(paths)} images under {root} can be used: {next(iter(bad.values()))}")
        if bad and on_error == "raise":
            remedy = "Repair them and build again (what is done is kept), or use on_error='exclude'."
            which = f"{listed(_failures(frame, bad))}\n{remedy}"
            raise ImageError(f"{len(bad)} of {len(paths)} images under {root} cannot be used:\n{which}")
        content = json.dumps({"format": FORMAT, "size": size, "behavior": BEHAVIOR, "paths": paths, "bad": bad})
        if not index.exists() or index.read_text() != content:
            atomic_write(index, content)
        return cls(index)

    def __len__(self) -> int:
        """Number of cached images."""
        return len(self.paths)

    def __reduce__(self) -> tuple:
        return ImageCache, (self.index,)

    def __getitem__(self, path: str) -> NDArray[np.uint8]:
        """One image by path. Shape: (size, size) uint8, read-only. Raises: CacheError for an unknown path."""
        return np.asarray(self._rows["pixels"][self._row(path)])

    def rows(self, paths: Sequence[str]) -> NDArray[np.uint8]:
        """Several images, copied. Shape: (len(paths), size, size) uint8."""
        return np.asarray(self._rows["pixels"][[self._row(path) for path in paths]])

    def geometry(self, path: str) -> Geometry:
        """How the original pixels of an image lie in its square."""
        record = self._rows["record"][self._row(path)]
        return Geometry.fit(int(record["height"]), int(record["width"]), self.size, behavior=BEHAVIOR)

    def usable(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame without studies that have an unusable image; what was left out is added to attrs["excluded"]."""
        kept = frame[[not any(path in self.bad for path in cell.split(";")) for cell in frame["images"]]].copy()
        kept.attrs["excluded"] = [*frame.attrs.get("excluded", []), *ExcludedRows.of(_failures(frame, self.bad))]
        return kept

    def _row(self, path: str) -> int:
        if path in self._row_of:
            return self._row_of[path]
        reason = self.bad.get(path, "it was not in the frame that the cache was built from")
        raise CacheError(f"image {path!r} is not in the cache {self.index.name}: {reason}. Build one for this frame")


@validate_call
def fill(
    paths: Annotated[list[str], Field(min_length=1)],
    root: Path,
    *,
    size: PositiveInt,
    folder: Path,
    shard: tuple[int, int] = (1, 1),
    workers: PositiveInt = 2,
    progress: bool = True,
) -> dict[str, str]:
    """Decode what is missing of shard (k, n), the k-th of every n of the sorted `paths`, into the cache's row file.

    Returns path -> reason of the images of the shard that cannot be used. `ImageCache.build` finishes the cache.
    Raises: ValueError without paths, or for a size or number of workers below 1.
    """
    dtype, bad, target = _row_type(size), {}, folder / f"{cache_key(paths, size)}.u8"
    folder.mkdir(parents=True, exist_ok=True)
    target.touch()
    with target.open("r+b") as file, ThreadPoolExecutor(workers) as pool:
        file.truncate(len(paths) * dtype.itemsize)
        rows = np.memmap(target, dtype, mode="r", shape=(len(paths),))
        index = target.with_suffix(".json")
        finished, mine = index.exists(), range(shard[0] - 1, len(paths), shard[1])
        todo = [row for row in mine if not _is_current(rows[row], root / paths[row], check=not finished)]
        outdated = [row for row in todo if rows["record"]["done"][row]]
        if outdated:  # damaged, or of an image file that has changed
            index.unlink(missing_ok=True)
            _write(file, dtype, dict.fromkeys(outdated, bytes(_RECORD.itemsize)))
        if progress and len(todo) < len(mine):
            print(f"{len(mine) - len(todo):,} of {len(mine):,} images are in the cache already", flush=True)
        blocks = [todo[start : start + _BLOCK] for start in range(0, len(todo), _BLOCK)]
        random.shuffle(blocks)  # builds that run side by side meet rarely
        hidden = not (progress and todo)
        with tqdm(total=len(todo), desc="decode images", unit=" images", mininterval=5, disable=hidden) as bar:
            for block in blocks:
                missing = [row for row in block if not rows["record"]["done"][row]]
                jobs = [pool.submit(_decode, root, paths[row], dtype) for row in missing]
                done = {}
                for row, job in zip(missing, jobs, strict=True):
                    try:
                        done[row] = job.result().tobytes()
                    except ImageError as error:
                        bad[paths[row]] = str(error)
                if done and finished:  # an image was repaired
                    index.unlink(missing_ok=True)
                if done:
                    _write(file, dtype, done)
                    _write(file, dtype, dict.fromkeys(done, _DONE))
                bar.update(len(block))
    return dict(sorted(bad.items()))


def require_shards(frame: pd.DataFrame, folder: str | Path, size: int) -> None:
    """Raises CacheError where no shard of this frame's images at this size was ever begun in `folder`."""
    file = Path(folder) / f"{cache_key(image_paths(frame), size)}.u8"
    if not file.is_file():
        others = len(list(Path(folder).glob("*.u8")))
        there = f"it holds {others} caches of other images, sizes or options" if others else "it is empty or missing"
        remedy = f"make shards with {COMMAND} --size {size} and the dataset's options, or give no shards"
        raise CacheError(f"{folder} has no shard of these images at {size} pixels ({there}); {remedy}")


def _row_type(size: int) -> np.dtype:
    """A row: its record, its pixels (size, size), and padding to whole memory pages."""
    gap, rest = _PIXELS_AT - _RECORD.itemsize, -(_PIXELS_AT + size**2) % _PAGE
    return np.dtype([("record", _RECORD), ("gap", f"V{gap}"), ("pixels", "u1", (size, size)), ("rest", f"V{rest}")])


def _checksum(row: np.void | NDArray) -> int:
    """CRC-32 of the pixels and of the record's fields after the checksum: guards against accidents, not people."""
    return zlib.crc32(row["pixels"], zlib.crc32(row["record"].tobytes()[8:]))


def _is_current(row: np.void, source: Path, *, check: bool) -> bool:
    """Whether a row is done, undamaged (with `check`), and its image file has the length and time of the decoding."""
    record = row["record"]
    if record["done"] != 1 or (check and _checksum(row) != record["crc"]):
        return False
    try:
        status = source.stat()
    except OSError:
        return True  # a file that is gone is no change: its pixels are cached
    return (status.st_size, status.st_mtime_ns) == (record["bytes"], record["mtime_ns"])


def _decode(root: Path, path: str, dtype: np.dtype) -> NDArray:
    """One image file to its row (), done flag not set. Raises ImageError."""
    if problem := path_problem(path):
        raise ImageError(f"path {path!r} {problem}")
    file, row = root / path, np.zeros((), dtype)
    data = read_bytes(file, name=path)
    image = decode_gray(data, path)
    row["pixels"] = Geometry.fit(*image.shape, dtype["pixels"].shape[0], behavior=BEHAVIOR).apply(image)
    row["record"] = (0, 0, *image.shape, len(data), file.stat().st_mtime_ns)
    row["record"]["crc"] = _checksum(row)
    return row


def _write(file: BinaryIO, dtype: np.dtype, content: dict[int, bytes]) -> None:
    """Write bytes at the beginning of rows, and sync them to disk."""
    for row, data in content.items():
        file.seek(row * dtype.itemsize)
        file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _failures(frame: pd.DataFrame, bad: dict[str, str]) -> list[Failure]:
    """Studies with a bad image."""
    found = ([bad[path] for path in cell.split(";") if path in bad] for cell in frame["images"])
    return failures_at(frame, [(i, "images", "; ".join(reasons)) for i, reasons in enumerate(found) if reasons])


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8). Raises ArgumentTypeError unless it is k/n with 1 <= k <= n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not k/n with 1 <= k <= n: 2/8 is the second of eight")
    return int(match[1]), int(match[2])


def _parse_option(text: str) -> tuple[str, object]:
    try:
        name, value = text.split("=", maxsplit=1)
        return name.strip(), yaml.safe_load(value) if value else ""
    except (ValueError, yaml.YAMLError):
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value, and text with signs in quotes") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Decode a shard of a dataset's images.")
    parser.add_argument("--dataset", required=True, help="a module of gloria_core.data.sources, as in notebook 01")
    parser.add_argument("--data-root", required=True, help="the raw folder")
    parser.add_argument("--size", required=True, type=int, help="pixels of the squares: notebook 01's image_size")
    parser.add_argument("--folder", required=True, help="the folder of the cache; the same for all machines")
    parser.add_argument("--shard", required=True, type=parse_shard, metavar="K/N", help="which shard, such as 2/8")
    parser.add_argument("--option", action="append", default=[], type=_parse_option, help="of the dataset: NAME=YAML")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="threads")
    args = parser.parse_args(arguments)
    number, count = args.shard
    try:
        paths = image_paths(sources.prepare(args.dataset, args.data_root, dict(args.option)))
        bad = fill(paths, args.data_root, size=args.size, folder=args.folder, shard=args.shard, workers=args.workers)
        total = len(paths[number - 1 :: count])
        if bad and len(bad) == total:
            raise ImageError(f"none of the {total} images can be used: {next(iter(bad.values()))}")
    except (ValueError, TypeError) as error:  # ManifestError and ImageError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 2
    unusable = f", {len(bad)} cannot be used" if bad else ""
    print(f"shard {number}/{count}: {total - len(bad):,} images{unusable}, in {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
