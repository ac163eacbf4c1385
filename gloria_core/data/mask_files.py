"""Mask files: manifests name them. Masks that a dataset describes in numbers are written once, below its root."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gloria_core.data.images import ImageError, read_gray
from gloria_core.data.manifest import ManifestError


def read_mask(root: Path, path: str, *, shape: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W) bool, true where the file is not black. `shape`: of the image that it was drawn on.

    Raises ManifestError that begins with `where` for a file that cannot be read or has another shape.
    """
    try:
        mask = read_gray(root / path) > 0
    except ImageError as error:
        raise ManifestError(f"{where}, column 'masks': {error}") from None
    if mask.shape != tuple(shape):
        raise ManifestError(
            f"{where}, column 'masks': {path} has {mask.shape[0]} x {mask.shape[1]} pixels, its image "
            f"{shape[0]} x {shape[1]}; a mask is drawn on the pixels of its image file"
        )
    return mask


def write_mask(root: Path, path: str, make: Callable[[], NDArray[np.bool_]]) -> str:
    """Write `make()` (H, W) bool to `root/path` as 1-bit PNG unless that file is there; returns `path`.

    Written beside its place first, so a killed run leaves no half mask. Raises ManifestError for a root that cannot be
    written to.
    """
    target = root / path
    if target.is_file():
        return path
    mask = Image.fromarray(np.asarray(make(), bool))
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mask.save(temporary, format="PNG")
        temporary.replace(target)
    except OSError as error:
        raise ManifestError(
            f"{target} cannot be written ({error.strerror}); let the root be writable, or use masks=False"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
