"""Under what a run was made: fingerprints of notebook, data and package, the commit, and every installed package.

Fingerprints depend on content, never on place or time: a fresh clone or a copied folder must not look stale.
"""

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from gloria_core.data import source_files
from gloria_core.data.files import content_hash, file_hash
from gloria_core.study.paths import PACKAGE_PARENT


def notebook_fingerprint(notebook: Path) -> str:
    """Changes with the code cells of a notebook, not with its prose, its outputs or its metadata.

    So a spelling mistake can be mended without repeating a training.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return content_hash(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])


def path_fingerprint(root: Path, path: str) -> str:
    """Changes with the content of a file, and of a manifest with the files that it is of; never with its place.

    `path` is relative to `root`, or absolute; the file need not be there.
    """
    place = root / Path(path).expanduser()
    files = [file for file in (place, place.with_name(source_files.NAME)) if file.is_file()]
    return content_hash([_hash(file, file.stat().st_mtime_ns) for file in files])


@cache
def _hash(file: Path, time: int) -> str:
    return file_hash(file)


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
