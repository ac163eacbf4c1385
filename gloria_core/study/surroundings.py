"""Under what a run was made: the commit of the sources, the interpreter and every installed package."""

from __future__ import annotations

import platform
import subprocess
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gloria_core.study.paths import PACKAGE_PARENT


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
