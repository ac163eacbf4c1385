"""Do the files that a manifest names exist, and do they lie under the dataset's root?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest_rules import Failure, ManifestError, failure_at


def _folder_contents(folder: Path, wanted: set[str], real_root: str) -> tuple[set[str], set[str]]:
    """Of the `wanted` names: those that are files of `folder`, and those that a symlink leads out of the root."""
    if not folder.is_dir():
        return set(), set()
    inside = os.path.join(real_root, "")  # noqa: PTH118 - string prefix with a separator at its end
    if not os.path.join(os.path.realpath(folder), "").startswith(inside):  # noqa: PTH118
        return set(), wanted
    files, escaping = set(), set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in wanted or not entry.is_file():
                continue
            leads_out = entry.is_symlink() and not os.path.realpath(entry.path).startswith(inside)
            (escaping if leads_out else files).add(entry.name)
    return files, escaping


def file_failures(frame: pd.DataFrame, root: Path, *, skip: set[int]) -> list[Failure]:
    """Images and masks that do not exist below `root` or that a symlink leads out of it.

    One directory listing per folder instead of one look-up per file: network disks have slow look-ups.
    `skip` holds row positions whose paths are known to be bad.
    """
    if not root.is_dir():
        raise ManifestError(
            f"the dataset's root {root} is not a folder; give the folder that the image paths start from"
        )
    listed: list[tuple[int, str, str]] = []
    for position, cell in enumerate(frame["images"].to_numpy(object)):
        if position not in skip:
            listed += [(position, "images", path) for path in cell.split(";")]
    for position in np.flatnonzero(frame["masks"] != ""):
        if int(position) not in skip:
            listed += [(int(position), "masks", m["path"]) for m in json.loads(frame["masks"].iloc[position])]
    wanted: dict[str, set[str]] = {}
    for _, _, path in listed:
        folder, _, name = path.rpartition("/")
        wanted.setdefault(folder, set()).add(name)
    real_root = os.path.realpath(root)
    state = {folder: _folder_contents(root / folder, names, real_root) for folder, names in wanted.items()}
    failures = []
    for position, column, path in listed:
        folder, _, name = path.rpartition("/")
        files, escaping = state[folder]
        if name in escaping:
            reason = f"{path!r} is a symlink out of the root {root}; copy the file or choose the root it lies under"
        elif name not in files:
            reason = f"file {path!r} not found under {root}; check the root, or read with on_error='exclude'"
        else:
            continue
        failures.append(failure_at(frame, position, column, reason))
    return failures
