"""Masks that a dataset describes in numbers, written once as PNG files below its root: manifests name files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gloria_core.data.manifest import ManifestError


def write_mask(root: Path, path: str, make: Callable[[], NDArray[np.bool_]]) -> str:
    """Write `make()` (H, W) bool to `root/path` as 1-bit PNG unless that file is there; returns `path`.

    Written beside its place first, so a killed run leaves no half mask. Raises ManifestError for a root that cannot be
    written to.
    """
    target = root / path
    if target.is_file():
        return path
    mask = Image.fromarray(np.asarray(make(), bool))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
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
