"""Pip packages that carry a model's files: weights, a vocabulary. For places without a hub."""

import importlib.util
from pathlib import Path

PACKAGE = "package:"  # what a parameter begins with that names a pip package instead of a file or a hub model


class PackageError(ValueError):
    """A pip package is not installed or lacks the files that are wanted; the message names the remedy."""


def package_folder(package: str, *names: str) -> Path:
    """The outermost folder of an installed package that holds all these files, found without importing the package.

    Raises PackageError.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PackageError(f"weight package {package!r} is not installed; remedy: pip install {package}")
    first = Path(next(iter(spec.submodule_search_locations))).rglob(names[0])
    for folder in sorted((path.parent for path in first), key=lambda folder: len(folder.parts)):
        if all((folder / name).is_file() for name in names):
            return folder
    raise PackageError(f"package {package!r} holds no folder with {' and '.join(names)}")
