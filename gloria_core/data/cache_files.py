"""The files of an image cache on disk: index, journal lines, checksums.

Files in the cache folder, for a cache named KEY:

    KEY.json            the index; while it is absent there is no cache
    KEY-CONTENT.u8      the pixels, uint8 (n, size, size), named by their checksums
    .KEY.lock           held by the process that builds; the system frees it when the process dies
    .KEY.part.u8, .KEY.part.jsonl   pixels so far and one line for each image that is done
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

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
