"""Files written whole or not at all, their SHA-256 hashes, which of many exist, and the hint for a misspelt name."""

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

THREADS = 8  # folders listed at once
# Name of the file that marks a folder of masks which are drawn from a table, and drawn anew when it changes.
DRAWN = ".drawn_from_a_table"


@contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A new binary file that becomes `path` when the `with` block ends; after an error `path` is as it was before.

    The bytes and the folder entry are synced to disk, so that a power failure leaves the old file or the new one.
    Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600, which other users of a shared folder cannot read
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def atomic_write(path: Path | str, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes to `path`, whole or not at all; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def content_hash(content: object, *, digits: int = 16) -> str:
    """The first `digits` (at most 64) hexadecimal digits of the SHA-256 of bytes, of text, or of JSON-like content.

    JSON-like content is hashed as compact JSON with sorted keys, so equal content has equal hashes.
    """
    if isinstance(content, str):
        content = content.encode()
    elif not isinstance(content, bytes):
        content = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(content).hexdigest()[:digits]


def file_hash(path: Path | str, *, digits: int = 16) -> str:
    """The first `digits` (at most 64) hexadecimal digits of the SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:digits]


def existing(root: Path | str, paths: Iterable[str]) -> set[str]:
    """Those of `paths` (posix, relative to `root`) that are files: each folder is listed once, several at a time.

    One listing per folder instead of one look-up per file: network disks answer slowly, but many at a time.
    """
    root = Path(root)
    wanted: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        wanted.setdefault(folder, set()).add(name)

    def files_of(folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(root / folder) as entries:
                return [prefix + entry.name for entry in entries if entry.name in wanted[folder] and entry.is_file()]
        except (FileNotFoundError, NotADirectoryError):
            return []

    with ThreadPoolExecutor(THREADS) as pool:
        return {path for paths in pool.map(files_of, wanted) for path in paths}


def did_you_mean(name: object, known: Iterable[object], *, cutoff: float = 0.6) -> str:
    """`" Did you mean 'x'?"` with the nearest of the `known` names, or "" where none is as similar as `cutoff` (0..1).

    It begins with a blank and is a sentence of its own: f"Unknown label {name!r}.{did_you_mean(name, labels)} Use ..."
    """
    near = difflib.get_close_matches(str(name), [str(other) for other in known], n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
