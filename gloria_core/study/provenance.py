"""Under what a run was made: the commit of the sources, the interpreter and every installed package.

Short hashes of what a run depends on, by content: a fresh clone or a copied folder must not look stale.
"""

from __future__ import annotations

import json
import platform
import subprocess
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gloria_core.study.paths import PACKAGE_PARENT

_HEAD = 1 << 20  # bytes read of a big file


def notebook_signature(notebook: Path) -> str:
    """Changes with the code cells of a notebook, not with its prose, its outputs or its metadata.

    So a spelling mistake can be mended without repeating a training.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return _short("\0".join(code).encode("utf-8"))


def path_signature(root: Path, path: str) -> str:
    """Changes with a file's content, or with the names and sizes directly inside a folder; never with its place.

    `path` is relative to `root`, or absolute. A big file is known by its size and its first MiB, a folder of images
    by the tables beside them: reading 45 GB to learn that nothing changed would help nobody.
    """
    place = root / Path(path).expanduser()
    if place.is_dir():
        items = [item for item in place.iterdir() if not item.name.startswith(".")]
        listing = sorted((item.name, item.stat().st_size if item.is_file() else -1) for item in items)
        return _short(json.dumps(listing).encode("utf-8"))
    if place.is_file():
        with place.open("rb") as file:
            return _short(str(place.stat().st_size).encode("ascii") + file.read(_HEAD))
    return "absent"


def _short(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]


def source_state(root: Path) -> dict[str, Any]:
    """Which sources: `commit` of the repository at `root`, `dirty` when files are changed or unknown to git (both None
    without git), and `package`, a hash of the modules of gloria_core."""
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain")
    dirty = None if changes is None else changes != ""
    return {"commit": commit or None, "dirty": dirty, "package": package_hash()}


def package_hash() -> str:
    """16 hex digits that change with any module of gloria_core."""
    digest = sha256()
    for file in sorted((PACKAGE_PARENT / "gloria_core").rglob("*.py")):
        digest.update(file.relative_to(PACKAGE_PARENT).as_posix().encode("utf-8") + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, Any]:
    """`python`, `platform` and the version of each installed package: a list of favourites always misses one."""
    packages = {item.metadata["Name"]: item.version for item in distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
