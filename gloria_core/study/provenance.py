"""Under what a run was made: fingerprints of notebook, data and package, the commit, and every installed package.

Fingerprints depend on content, never on place or time: a fresh clone or a copied folder must not look stale.
"""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gloria_core.data.files import content_hash
from gloria_core.study.paths import PACKAGE_PARENT

HEAD_BYTES = 1 << 20  # read of a big file


def notebook_fingerprint(notebook: Path) -> str:
    """Changes with the code cells of a notebook, not with its prose, its outputs or its metadata.

    So a spelling mistake can be mended without repeating a training.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return content_hash(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


def path_fingerprint(root: Path, path: str) -> str:
    """Changes with a file's content, or with the names and sizes directly inside a folder; never with its place.

    `path` is relative to `root`, or absolute. Of a file the size and the first MiB count, of a folder of images the
    tables next to them: reading 45 GB to learn that nothing changed would take too long.
    """
    place = root / Path(path).expanduser()
    if place.is_dir():
        items = [item for item in place.iterdir() if not item.name.startswith(".")]
        return content_hash(sorted((item.name, item.stat().st_size if item.is_file() else -1) for item in items))
    if place.is_file():
        with place.open("rb") as file:
            return content_hash(str(place.stat().st_size).encode() + file.read(HEAD_BYTES))
    return "absent"


def package_hash() -> str:
    """16 hex digits that change with any module of gloria_core."""
    files = sorted((PACKAGE_PARENT / "gloria_core").rglob("*.py"))
    return content_hash([(file.relative_to(PACKAGE_PARENT).as_posix(), file.read_text("utf-8")) for file in files])


def provenance(root: Path) -> dict[str, Any]:
    """For run.json: `commit` of the repository at `root` and `dirty`, True when files are changed or unknown to git
    (both None without git); `package`, a hash of gloria_core; `python`, `platform`, and `packages` with versions."""
    changes = _git(root, "status", "--porcelain")
    packages = {item.metadata["Name"]: item.version for item in distributions()}
    return {
        "commit": _git(root, "rev-parse", "HEAD") or None,
        "dirty": None if changes is None else changes != "",
        "package": package_hash(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        return subprocess.check_output(
            ["git", "-C", str(root), *arguments], stderr=subprocess.DEVNULL, text=True, timeout=60
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
