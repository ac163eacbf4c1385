"""Masks and boxes on radiographs: run-length codes, mask files, and all annotations of one image by label.

The run-length code is that of the SIIM-ACR Pneumothorax set (stages 1 and 2): an image is read column by column, top to
bottom, and its runs are pairs (gap since the last run's end, length) in pixels; "-1" is an empty mask.

The released table has a space before the column name and before "-1" (`" EncodedPixels"`, `" -1"`). Spaces are ignored
here; code that compares with "-1" exactly takes every image for a positive one. An image with several lesions has
several rows: unite their masks, and split a dataset by image, never by row.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from gloria_core.data.files import DRAWN, atomic_write
from gloria_core.data.images import ImageError, read_gray
from gloria_core.data.manifest import ManifestError, boxes_of, masks_of

SIIM_SIDE = 1024  # of every image of the SIIM-ACR set, in pixels: its runs make sense on this grid only


class RleError(ValueError):
    """Runs that are no mask of this image; the message says what is wrong."""


def decode_rle(text: str | float, height: int, width: int) -> NDArray[np.bool_]:
    """Runs to a mask. Shape: -> (height, width) bool.

    `text`: numbers separated by spaces; "-1", an empty text and a blank cell (NaN) are an empty mask.
    Raises: RleError for what is no number, a run outside the image, runs that overlap or are out of order.
    """
    words, size = "" if pd.isna(text) else str(text).split(), height * width
    if not words or words == ["-1"]:
        return np.zeros((height, width), bool)
    try:
        counts = np.array(words).astype(np.int64)  # background and foreground in turn
    except ValueError as error:
        raise RleError(f"runs are whole numbers separated by spaces ({error})") from None
    lengths, total = counts[1::2], int(counts.sum())
    if len(counts) % 2:
        raise RleError(f"{len(counts)} numbers are no pairs of a gap and a length")
    if (lengths < 1).any():
        raise RleError(f"run {int((lengths < 1).argmax()) + 1} has length {lengths[lengths < 1][0]}")
    if (counts < 0).any():
        raise RleError("runs overlap or are out of order; are they starts and lengths, as in other contests?")
    if total > size:
        raise RleError(f"a run ends at pixel {total} of {height} x {width} = {size}; are these gaps and lengths?")
    flat = np.repeat(np.arange(len(counts) + 1) % 2 == 1, np.append(counts, size - total))
    return flat.reshape(width, height).T.copy()


def encode_rle(mask: NDArray) -> str:
    """A mask to runs, numbers separated by spaces: the inverse of `decode_rle`. An empty mask is "-1".

    Shape: mask (H, W), anything above 0 is foreground
    """
    if np.ndim(mask) != 2:
        raise ValueError(f"a mask has two dimensions (H, W), this one has shape {np.shape(mask)}")
    edges = np.flatnonzero(np.diff(np.asarray(mask).T.ravel() > 0, prepend=False, append=False))
    return " ".join(map(str, np.diff(edges, prepend=0))) or "-1"  # gap, length, gap, length, ...


def table_of_masks(masks: Mapping[str, NDArray]) -> pd.DataFrame:
    """One row an image, in the order given, with columns ImageId and EncodedPixels: what the contest takes."""
    return pd.DataFrame({"ImageId": list(masks), "EncodedPixels": [encode_rle(mask) for mask in masks.values()]})


def read_mask(root: Path, path: str, *, shape: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """(H, W) bool, true where the file is not black. `shape`: of the image that it was drawn on.

    Raises ManifestError that begins with `where` for a file that cannot be read or has another shape.
    """
    try:
        mask = read_gray(root / path) > 0
    except ImageError as error:
        raise ManifestError(f"{where}, column 'masks': {error}") from None
    if mask.shape != tuple(shape):
        sizes = f"has {mask.shape[0]} x {mask.shape[1]} pixels, its image {shape[0]} x {shape[1]}"
        raise ManifestError(f"{where}, column 'masks': {path} {sizes}; draw it on the pixels of its image file")
    return mask


def write_mask(root: Path, path: str, make: Callable[[], NDArray[np.bool_]]) -> str:
    """Write `make()` (H, W) bool to `root/path` as 1-bit PNG unless that is what the file holds; returns `path`.

    The empty file `DRAWN` beside it says that this folder's masks come from a table. Raises ManifestError for a root
    that cannot be written to.
    """
    target, content = root / path, io.BytesIO()
    Image.fromarray(np.asarray(make(), bool)).save(content, format="PNG")
    try:
        if not target.is_file() or target.read_bytes() != content.getvalue():
            atomic_write(target, content.getvalue())
            (target.parent / DRAWN).touch()
    except OSError as error:
        remedy = "let the root be writable, or use masks=False"
        raise ManifestError(f"{target} cannot be written ({error.strerror}); {remedy}") from error
    return path


@dataclass(frozen=True)
class Annotations:
    """One image (H, W) uint8 with `masks`: label -> (H, W) bool, and `boxes`: label -> [(x, y, width, height)]."""

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]]
    boxes: dict[str, list[tuple[float, float, float, float]]]


def read_annotations(row: Mapping[str, Any], root: str | Path, *, number: int = 0) -> Annotations:
    """All annotations of image `number` of a manifest row, in pixels of its file; masks of one label are united.

    Raises ManifestError for a mask that cannot be read or has another size than its image, ImageError for the image.
    """
    root = Path(root)
    image = read_gray(root / row["images"].split(";")[number])
    masks: dict[str, NDArray[np.bool_]] = {}
    for entry in masks_of(row):
        if entry["image"] == number:
            mask = read_mask(root, entry["path"], shape=image.shape, where=f"study {row['study_id']!r}")
            masks[entry["label"]] = mask | masks.get(entry["label"], False)
    boxes: dict[str, list] = {}
    for entry in boxes_of(row):
        if entry["image"] == number:
            boxes.setdefault(entry["label"], []).append(tuple(map(float, entry["xywh"])))
    return Annotations(image, masks, boxes)
