"""How an image cache comes to be on disk; `gloria_core.data.cache` is the door to it.

The journal line of an image is written after its pixels and carries their checksum, so a build that was killed, even by
a power cut, is resumed with only what is proven to be there. The index appears last.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gloria_core.data.cache_files import (
    FORMAT,
    Entry,
    checksum,
    digest,
    read_index,
    same_source,
    write_index,
    write_journal,
)
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError, decode_gray, read_bytes
from gloria_core.types import Behavior

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
