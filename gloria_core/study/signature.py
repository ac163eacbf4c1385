"""Short hashes of what a run depends on, by content: a fresh clone or a copied folder must not look stale."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

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
