"""Where things lie. Every path of a study hangs from the repository root, the folder that holds `notebooks/`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

STUDIES = Path("notebooks/studies")
RUNS = Path("results/runs")
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def repository_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the working directory) that holds `notebooks/`.

    A kernel works inside `notebooks/`, `make` in the root, a test in a temporary folder: all find their own root.
    When nothing is found there, the folder of the installed package is asked.
    Raises `FileNotFoundError` when neither has one.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, PACKAGE_PARENT):
        if (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(f"no folder with notebooks/ at or above {start}: start from inside the repository")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is seen whole or not at all, even when the power goes in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; results are read by others
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
