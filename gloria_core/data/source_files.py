"""Which files a dataset was prepared from, so that a later change is seen.

Notebook 01 writes `source_files.json.gz` next to the manifest: every file below the dataset's folder, and those that
its options name elsewhere. A study compares it with the folders before it runs: sizes and times of change, and where
only the time differs the content of tables and reports (`TEXTS` of up to 1 GiB), so that touching or copying one
changes nothing. Every file counts, also one that no table names, because it may be why a row was left out. Not counted
are names that begin with a dot, the results of studies, and masks that we draw from a table (`annotations.write_mask`).
"""

import gzip
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from stat import S_ISDIR

from gloria_core.data.files import DRAWN, THREADS, atomic_write, file_hash

NAME = "source_files.json.gz"
TEXTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xml", ".xlsx", ".gz", ".zip")
HASHED_BYTES = 1 << 30


def files_below(top: Path, skip: Path) -> dict[str, tuple[int, int]]:
    """Path below `top` (posix; "" for a file itself) -> size in bytes and time of change in ns.

    Many folders are read at once, because network disks answer slowly. The folder `skip` is left out.
    """
    if top.is_file():
        return {"": (top.stat().st_size, top.stat().st_mtime_ns)}
    # a folder is read once, whatever links lead to it
    found, seen, level = {}, {_identity(skip.stat())} if skip.is_dir() else set(), [""]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:
            parts = [pair for listed in pool.map(partial(_listed, top), level) for pair in listed]
            found |= {name: (state.st_size, state.st_mtime_ns) for name, state in parts if not S_ISDIR(state.st_mode)}
            folders = {_identity(state): name for name, state in reversed(parts) if S_ISDIR(state.st_mode)}
            level = [name for identity, name in folders.items() if identity not in seen]
            seen |= folders.keys()
    return found


def _listed(top: Path, folder: str) -> list[tuple[str, os.stat_result]]:
    """What a folder holds, by name; nothing for one that cannot be read or that holds drawn masks."""
    try:
        with os.scandir(top / folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
    if any(entry.name == DRAWN for entry in entries):
        return []
    return [(f"{folder}/{entry.name}".lstrip("/"), _state(entry)) for entry in entries if entry.name[0] != "."]


def _state(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat()
    except OSError:  # a link that leads nowhere
        return entry.stat(follow_symlinks=False)


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def record(folder: Path, root: Path, *, named: Iterable[object] = (), skip: Path) -> int:
    """Write `folder`/source_files.json.gz; returns the number of files.

    It holds, for `root` (as "") and for each file or folder outside it that is among the values `named` of options, the
    files below: path -> [size, time, checksum or ""].
    """
    tops = [Path(str(value)).resolve() for value in named if str(value) and Path(str(value)).exists()]
    tops = {"": root} | {str(top): top for top in tops if not top.is_relative_to(root.resolve())}
    content = {}
    for key, top in tops.items():
        found = files_below(top, skip)
        texts = [
            name
            for name, (size, _) in found.items()
            if (top / name).name.lower().endswith(TEXTS) and size <= HASHED_BYTES
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            checksums = dict(zip(texts, pool.map(file_hash, [top / name for name in texts]), strict=True))
        content[key] = {name: [*state, checksums.get(name, "")] for name, state in found.items()}
    atomic_write(folder / NAME, gzip.compress(json.dumps(content).encode(), compresslevel=3, mtime=1))
    return sum(map(len, content.values()))


def changes(folder: Path, root: Path, *, skip: Path) -> list[str]:
    """What is other than `record` wrote it into `folder`, one line a file; [] where nothing is."""
    try:
        content = json.loads(gzip.decompress((folder / NAME).read_bytes()))
    except (OSError, EOFError, ValueError):
        return [f"{folder / NAME} cannot be read"]
    told = []
    for key, before in content.items():
        top = Path(key or root)
        now = files_below(top, skip)
        told += [f"{top / name} is new" for name in now if name not in before]
        told += [f"{top / name} is gone" for name in before if name not in now]
        for name, (size, time, checksum) in before.items():
            if name not in now or now[name] == (size, time):
                continue
            if now[name][0] != size or not checksum or file_hash(top / name) != checksum:
                told.append(f"{top / name} is another")
    return told
