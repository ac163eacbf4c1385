"""Pip packages that carry a model's files: weights, a vocabulary. For places without a hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "package:"
"""What a parameter begins with that names a pip package instead of a file or a hub model."""


def installed_folder(package: str) -> Path:
    """Folder of an installed Python package, found without importing it. Raises ModuleNotFoundError with the remedy."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"weight package {package!r} is not installed; remedy: pip install {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def folder_with(package: str, *names: str) -> Path | None:
    """The outermost folder of an installed package that holds all these files, None where no folder does."""
    found = sorted(installed_folder(package).rglob(names[0]), key=lambda path: len(path.parts))
    return next((path.parent for path in found if all((path.parent / name).is_file() for name in names)), None)
