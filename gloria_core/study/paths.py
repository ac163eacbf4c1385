"""Where things lie. Every path of a study is relative to the repository root, the folder that holds `notebooks/`."""

import json
from pathlib import Path
from typing import Any

STUDIES = Path("notebooks/studies")
RUNS = Path("results/runs")
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def repository_root(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: the working directory) that holds `notebooks/`.

    A kernel works inside `notebooks/`, `make` in the root, a test in a temporary folder: each finds its own root. The
    last candidate is the folder of the installed package. Raises `FileNotFoundError` where there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, PACKAGE_PARENT):
        if (folder / "notebooks").is_dir():
            return folder
    raise FileNotFoundError(f"no folder with notebooks/ at or above {start}: start from inside the repository")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} where there is no readable one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
