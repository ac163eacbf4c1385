"""Decoded images in one memory-mapped file, so that training reads bytes instead of decoding files every epoch.

One cache holds every image of a frame, resized to one size, as uint8 (n, size, size), beside an index with the
original size of each image. Its name depends on the image paths, the size, the behavior and the format version, never
on the root folder. It appears whole or not at all: the index is written last, by an atomic rename. A killed build is
taken up where it stopped; of two processes that build the same cache at once, one builds and the other waits for it.

The files of an image cache on disk: index, journal lines, checksums.

Files in the cache folder, for a cache named KEY:

    KEY.json            the index; while it is absent there is no cache
    KEY-CONTENT.u8      the pixels, uint8 (n, size, size), named by their checksums
    .KEY.lock           held by the process that builds; the system frees it when the process dies
    .KEY.part.u8, .KEY.part.jsonl   pixels so far and one line for each image that is done

How an image cache comes to be on disk; `gloria_core.data.cache` is the door to it.

The journal line of an image is written after its pixels and carries their checksum, so a build that was killed, even by
a power cut, is resumed with only what is proven to be there. The index appears last.

Decoding the images of one dataset on several machines that see the same disk.

    python -m gloria_core.data.cache --dataset chexpert --data-root /data/chexpert --size 256
        --folder /disk/shares --part 2/8 [--option views=all] [--workers 16]

decodes the 2nd of every 8 images into an image cache of its own in `--folder`; parts may run at once, in any order, and
a part that was killed goes on when the command is given again. Then notebook 01 with `shares: /disk/shares` (or
`save_dataset(..., shares=...)`) takes its images from there and decodes what is missing: the result has the same bytes
as without shares. Give the options that notebook 01 is given, so that both find the same images.

Exit codes: 0 the part is finished; 2 the command, the dataset or all images of the part are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import IO, Literal, NamedTuple

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from gloria_core.data import sources
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError, decode_gray, read_bytes
from gloria_core.types import Behavior

FORMAT = 1


class CacheError(ValueError):
    """A cache that is damaged or does not hold what was asked; the message names the file and the remedy."""


@dataclass(frozen=True)
class Entry:
    """One image that is done: its original size (pixels), its file (bytes, time, checksum), its pixels' checksum."""

    path: str
    height: int
    width: int
    bytes: int
    mtime_ns: int
    source_crc: int
    pixels_crc: int


def checksum(data: bytes | NDArray[np.uint8]) -> int:
    """CRC-32: guards against accidents, not against people."""
    return zlib.crc32(data if isinstance(data, bytes) else np.ascontiguousarray(data))


def remedy(index: Path) -> str:
    """What to tell somebody whose cache is damaged."""
    return f"Delete {index} and build the cache again"


def read_index(index: Path) -> dict:
    """The index's content. Raises: CacheError if it is missing, damaged, of another version, or its pixels are."""
    try:
        whole = json.loads(index.read_bytes())
        body = whole["body"]
        intact = whole["checksum"] == digest(body)
    except FileNotFoundError:
        raise CacheError(f"{index}: no such image cache. Make it with ImageCache.build") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CacheError(f"{index}: the index is damaged (its checksum differs). {remedy(index)}")
    if body["format"] != FORMAT:
        raise CacheError(f"{index}: cache format {body['format']}, this version reads {FORMAT}. {remedy(index)}")
    pixels = index.parent / body["pixels"]
    expected = len(body["path"]) * body["size"] ** 2
    found = pixels.stat().st_size if pixels.exists() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes instead of {expected}"
        raise CacheError(f"{pixels}: the pixel file {state}. {remedy(index)}")
    return body


def write_index(index: Path, body: dict) -> None:
    """Write the index beside its place, make it durable, then rename it there."""
    temporary = index.with_name(f".{index.name}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        json.dump({"checksum": digest(body), "body": body}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(index)


def same_source(file: Path, entry: Entry) -> bool:
    """Whether a file is still the one that was decoded; its content is only read if its time has changed."""
    try:
        status = file.stat()
        if status.st_size != entry.bytes:
            return False
        return status.st_mtime_ns == entry.mtime_ns or checksum(file.read_bytes()) == entry.source_crc
    except OSError:
        return False


def write_journal(journal: IO[str], entries: Iterable[Entry]) -> None:
    """Append one line for each image that is done."""
    journal.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
    journal.flush()


def digest(content: object) -> str:
    """SHA-256 (hex) of JSON content, the same for equal content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_BLOCK = 128  # images between two journal flushes
_PRINT_EVERY = 5.0  # seconds


class Task(NamedTuple):
    """What to build from where to where."""

    root: Path
    folder: Path
    key: str
    size: int
    behavior: Behavior
    workers: int
    progress: bool | Callable[[int, int], None]
    known: Callable[[str, Path], tuple[Entry, NDArray[np.uint8]] | None] | None = None  # images decoded before

    @property
    def index(self) -> Path:
        return self.folder / f"{self.key}.json"


def ensure(task: Task, paths: Sequence[str], *, keep_bad: bool) -> dict[str, str]:
    """Make sure that the cache of these paths exists and is up to date; returns the reasons of the unusable images.

    With unusable images the cache is only finished if `keep_bad`; the work done is kept for the next build either way.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    if task.index.exists() and not os.access(task.folder, os.W_OK):
        # somebody else's finished cache on a read-only disk: nothing can be locked, and nothing needs to be
        return {item["path"]: item["reason"] for item in read_index(task.index)["bad"]}
    with _alone(task) as part:
        if task.index.exists():
            body = read_index(task.index)
            if _up_to_date(task, body):
                for leftover in _unfinished(part):  # of a build that was killed after its last useful step
                    leftover.unlink(missing_ok=True)
                return {item["path"]: item["reason"] for item in body["bad"]}
            _say(task, "source images have changed: building the image cache again")
        return _build(task, paths, part, keep_bad=keep_bad)


def _build(task: Task, paths: Sequence[str], part: Path, *, keep_bad: bool) -> dict[str, str]:
    pixels, journal = _unfinished(part)
    done = _resume(task, paths, pixels, journal)
    bad: dict[str, str] = {}
    todo = [row for row, path in enumerate(paths) if path not in done]
    report = _reporter(task, len(paths))
    with (
        ThreadPoolExecutor(task.workers) as pool,
        pixels.open("r+b" if pixels.exists() else "w+b") as pixel_file,
        journal.open("w") as journal_file,
    ):
        # the journal starts with what was proven, so that a torn last line of the killed build is gone
        write_journal(journal_file, done.values())
        for start in range(0, len(todo), _BLOCK):
            rows = todo[start : start + _BLOCK]
            results = pool.map(lambda row: _decode(task, paths[row]), rows)
            fresh = []
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, ImageError):
                    bad[paths[row]] = str(result)
                    continue
                entry, image = result
                pixel_file.seek(row * task.size**2)
                pixel_file.write(image)
                done[entry.path] = entry
                fresh.append(entry)
            pixel_file.flush()
            write_journal(journal_file, fresh)
            report(len(paths) - len(todo) + start + len(rows))
    if len(bad) < len(paths) and (keep_bad or not bad):
        _commit(task, [done.get(path) for path in paths], bad, pixels)
        journal.unlink()
    return bad


def _unfinished(part: Path) -> tuple[Path, Path]:
    """The pixel file and the journal of a build that is under way."""
    return part.with_name(f"{part.name}.u8"), part.with_name(f"{part.name}.jsonl")


def _decode(task: Task, path: str) -> tuple[Entry, NDArray[np.uint8]] | ImageError:
    """One image file to its square and its journal entry; an error is returned, not raised, to count them all."""
    try:
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ImageError(f"{path}: leads out of the root folder. Write paths relative to it, without '..'")
        file = task.root / path
        if task.known and (ready := task.known(path, file)):
            return ready
        data = read_bytes(file, name=path)
        image = decode_gray(data, path)
        try:
            square = Geometry.fit(*image.shape, task.size, behavior=task.behavior).apply(image)
        except ValueError as error:
            raise ImageError(f"{path}: {error}") from None
    except ImageError as error:
        return error
    entry = Entry(path, *image.shape, len(data), file.stat().st_mtime_ns, checksum(data), checksum(square))
    return entry, square


def _resume(task: Task, paths: Sequence[str], pixels: Path, journal: Path) -> dict[str, Entry]:
    """Images of an interrupted build whose pixels are there and whose source is the same."""
    if not (pixels.exists() and journal.exists()):
        return {}
    known = set(paths)
    rows = {path: row for row, path in enumerate(paths)}
    done = {}
    with pixels.open("rb") as file:
        for line in journal.read_text().splitlines():
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                continue  # the line that the kill cut
            if entry.path not in known or not same_source(task.root / entry.path, entry):
                continue
            file.seek(rows[entry.path] * task.size**2)
            if checksum(file.read(task.size**2)) == entry.pixels_crc:
                done[entry.path] = entry
    return done


def _commit(task: Task, entries: Sequence[Entry | None], bad: dict[str, str], pixels: Path) -> None:
    """Close up the gaps of bad images, make the pixels durable, then let the index appear."""
    kept = [entry for entry in entries if entry is not None]
    area = task.size**2
    with pixels.open("r+b") as file:
        for new, old in enumerate(row for row, entry in enumerate(entries) if entry is not None):
            if new != old:
                file.seek(old * area)
                square = file.read(area)
                file.seek(new * area)
                file.write(square)
        file.truncate(len(kept) * area)
        file.flush()
        os.fsync(file.fileno())
    table = {name: [getattr(entry, name) for entry in kept] for name in Entry.__dataclass_fields__}
    content = digest([table["path"], table["pixels_crc"]])[:16]
    final = task.folder / f"{task.key}-{content}.u8"
    body = {"format": FORMAT, "key": task.key, "size": task.size, "behavior": task.behavior, "pixels": final.name}
    body |= table
    body["bad"] = [{"path": path, "reason": reason} for path, reason in sorted(bad.items())]
    pixels.replace(final)
    write_index(task.index, body)
    for old in task.folder.glob(f"{task.key}-*.u8"):
        if old != final:
            # a system that locks open files keeps it until the next build
            with contextlib.suppress(OSError):
                old.unlink()


def _up_to_date(task: Task, body: dict) -> bool:
    """Whether the source files are those of the build; a file that is gone is no change, for its pixels are cached.

    Equal length and time mean equal. With another time (a copied folder) the content decides, and the time is noted.
    """
    if any(not isinstance(_decode(task, item["path"]), ImageError) for item in body["bad"]):
        return False  # what could not be used then can be used now
    touched = False
    columns = (body[name] for name in Entry.__dataclass_fields__)
    for row, values in enumerate(zip(*columns, strict=True)):
        entry = Entry(*values)
        file = task.root / entry.path
        if not file.exists():
            continue
        if not same_source(file, entry):
            return False
        body["mtime_ns"][row] = file.stat().st_mtime_ns
        touched |= body["mtime_ns"][row] != entry.mtime_ns
    if touched:
        write_index(task.index, body)
    return True


@contextlib.contextmanager
def _alone(task: Task) -> Iterator[Path]:
    """Hold the cache's lock; gives the stem of the unfinished files.

    Where the system or the file system has no locks, builders work side by side under names of their own, the last one
    to finish wins, and nothing is resumed: still safe, only slower.
    """
    with (task.folder / f".{task.key}.lock").open("a") as file:
        if not _lock(file, task):
            yield task.folder / f".{task.key}.{uuid.uuid4().hex[:8]}.part"
            return
        for stale in task.folder.glob(f".{task.index.name}.*"):
            stale.unlink()
        yield task.folder / f".{task.key}.part"


def _lock(file: IO[str], task: Task) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say(task, "another process is building this image cache: waiting for it")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a network file system without locks
        return False
    return True


def _reporter(task: Task, total: int) -> Callable[[int], None]:
    """Whole lines, not a bar that redraws itself: they read the same in a terminal, a log and a saved notebook."""
    if callable(task.progress):
        return lambda done: task.progress(done, total)
    start = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= _PRINT_EVERY:
            last = now
            _say(task, f"decoded {done:,} of {total:,} images in {now - start:.0f} s")

    return report


def _say(task: Task, text: str) -> None:
    if task.progress is True:
        print(text, flush=True)


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
        ask it (`gloria_core.data.cache.Shares.find`).

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


COMMAND = "python -m gloria_core.data.cache"


class Shares:
    """The images in the finished shares of a folder; threads may ask at the same time.

    Attributes:
        number: how many shares there are; taken: how many images were given out
        damaged: index file -> what is wrong with it; its images are not given out
    """

    def __init__(self, folder: str | Path, *, size: int, behavior: Behavior = "corrected") -> None:
        """Open the shares of this size (pixels). Raises: CacheError for a folder that has none."""
        self.folder, self.taken, self.damaged = Path(folder), 0, {}
        self._lock, self._bodies, self._pixels = Lock(), [], []
        self._places: dict[str, tuple[int, int]] = {}
        for index in sorted(self.folder.glob("*.json")):
            try:
                body = read_index(index)
            except CacheError as error:
                self.damaged[index] = str(error)
                continue
            if (body["size"], body["behavior"]) == (size, behavior):
                self._add(index, body)
        if not self._bodies and not self.damaged:
            raise CacheError(
                f"{self.folder} has no finished share of {size} pixels{self._others()}; "
                f"make them with {COMMAND} --size {size}, or give no shares"
            )

    def find(self, path: str, file: Path) -> tuple[Entry, NDArray[np.uint8]] | None:
        """Index entry and pixels (size, size) uint8 of an image, None if no share has it as `file` is now."""
        if path not in self._places:
            return None
        share, row = self._places[path]
        index, body = self._bodies[share]
        entry = Entry(*(body[name][row] for name in Entry.__dataclass_fields__))
        square = np.array(self._pixels[share][row])
        if checksum(square) != entry.pixels_crc:
            with self._lock:
                self.damaged.setdefault(index, f"{index}: the pixels of {path!r} are damaged")
            return None
        if not same_source(file, entry):
            return None
        with self._lock:
            self.taken += 1
        return replace(entry, mtime_ns=file.stat().st_mtime_ns), square

    @property
    def number(self) -> int:
        return len(self._bodies)

    def summary(self, total: int) -> str:
        """What was taken for a cache of `total` images, and a line for each damaged share."""
        from_where = f"from {self.number} share{'s'[: self.number != 1]} in {self.folder}"
        lines = [f"took {self.taken:,} of {total:,} images {from_where}; the others were decoded here, now or before"]
        lines += [f"damaged share, decoded here instead: {text}" for text in self.damaged.values()]
        return "\n".join(lines)

    def _add(self, index: Path, body: dict) -> None:
        number = len(self._bodies)
        self._bodies.append((index, body))
        shape = (len(body["path"]), body["size"], body["size"])
        self._pixels.append(np.memmap(index.parent / body["pixels"], np.uint8, mode="r", shape=shape))
        for row, path in enumerate(body["path"]):
            self._places.setdefault(path, (number, row))

    def _others(self) -> str:
        """What there is instead."""
        if not self.folder.is_dir():
            return " (there is no such folder)"
        unfinished = len(list(self.folder.glob(".*.part.jsonl")))
        others = len(list(self.folder.glob("*.json")))
        return f" ({others} of another size, {unfinished} unfinished)" if others or unfinished else ""


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8). Raises ValueError unless it is k/n with 1 <= k <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"part {text!r} is not k/n with 1 <= k <= n: 2/8 is the second of eight")
    return part, parts


def build_share(
    dataset: str,
    root: str | Path,
    *,
    size: int,
    folder: str | Path,
    part: str,
    options: Mapping[str, object] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> ImageCache | None:
    """Decode a part ("2/8") of the images of `sources.prepare(dataset, root, options)` into a cache in `folder`.

    An image that cannot be used is left out: the cache that is built from the shares tells about it. None where there
    are fewer images than parts, and this part has none. Raises what `prepare` raises for the dataset and ImageError
    where no image of the part can be used; ValueError for a part that is none.
    """
    place, parts = parse_part(part)
    known = sources.options_of(dataset)
    for option in options or {}:
        if option not in known:
            raise ValueError(f"dataset {dataset!r} has no option {option!r}; it has: {', '.join(known)}")
    paths = image_paths(sources.prepare(dataset, root, options))[place - 1 :: parts]
    if not paths:
        return None
    frame = pd.DataFrame({"study_id": paths, "images": paths})
    return ImageCache.build(
        frame, root, size=size, folder=folder, workers=workers, on_error="exclude", progress=progress
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        cache = build_share(
            given.dataset,
            given.data_root,
            size=given.size,
            folder=given.folder,
            part=given.part,
            options=dict(_assignment(text) for text in given.option),
            workers=given.workers,
        )
    except ValueError as error:  # ManifestError, ImageError and CacheError are such
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if cache is None:
        print(f"part {given.part}: there are fewer images than parts; nothing to do")
    else:
        unusable = f", {len(cache.excluded)} cannot be used" if cache.excluded else ""
        print(f"part {given.part}: {len(cache):,} images{unusable}, in {cache.index}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Decode a part of a dataset's images.")
    parser.add_argument("--dataset", required=True, help="a module of gloria_core.data.sources, as in notebook 01")
    parser.add_argument("--data-root", required=True, help="the raw folder")
    parser.add_argument("--size", required=True, type=int, help="pixels of the squares: notebook 01's image_size")
    parser.add_argument("--folder", required=True, help="where the shares are put; the same for all machines")
    parser.add_argument("--part", required=True, metavar="K/N", help="which part, such as 2/8")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the dataset; YAML")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="threads")
    return parser


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r} must be written name=value")
    try:
        return name.strip(), yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise ValueError(f"option {text!r}: the value cannot be read; put quotes around text") from None


if __name__ == "__main__":
    sys.exit(main())
