"""Masks and boxes on radiographs: run-length codes, mask files, and all annotations of one image by label.

Run-length codes (RLE) read an image column by column, top to bottom, as numbers of pixels:

| format | numbers | empty mask | used by |
|---|---|---|---|
| "siim" | pairs (gap since the last run's end, length), from 0 | "-1" | SIIM-ACR Pneumothorax, stages 1 and 2 |
| "kaggle" | pairs (start, length), starts from 1 | "" or blank | most other Kaggle segmentation contests |
| "coco" | lengths of background and foreground in turn | one number | COCO's uncompressed `counts` |

The released SIIM table has a space before the column name and before "-1" (`" EncodedPixels"`, `" -1"`). Spaces are
ignored here; code that compares with "-1" exactly takes every image for a positive one. An image with several lesions
has several rows: unite their masks, and split a dataset by image, never by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from gloria_core.data.files import atomic_file
from gloria_core.data.images import ImageError, read_gray
from gloria_core.data.manifest import ManifestError, boxes_of, masks_of

Format = Literal["siim", "kaggle", "coco"]
SIIM_SIDE = 1024
"""Sides of every image of the SIIM-ACR set, in pixels: its runs make sense on this grid only."""


class RleError(ValueError):
    """Runs that are no mask of this image; the message says what is wrong."""


def decode_rle(text: str | Iterable[int] | float, height: int, width: int, *, format: Format) -> NDArray[np.bool_]:
    """Runs to a mask. Shape: -> (height, width) bool.

    `text`: numbers separated by spaces, or the numbers themselves. "siim" and "kaggle" take "-1", an empty text and a
    blank cell (NaN) for an empty mask.
    Raises: RleError for what is no number, a run outside the image, runs that overlap or are out of order, and for
    "coco" counts that do not sum to the number of pixels.
    """
    _check_format(format)
    size, counts = height * width, _numbers(text, format)  # counts: background and foreground in turn
    if format == "kaggle":
        starts, lengths = counts[::2] - 1, counts[1::2]
        gaps = np.diff(starts, prepend=0) - np.concatenate([[0], lengths])[: len(starts)]
        counts = np.stack([gaps, lengths], axis=1).ravel()
    total = int(counts.sum())
    if format == "coco" and ((counts < 0).any() or total != size):
        raise RleError(f"counts sum to {total}, the image has {height} x {width} = {size} pixels")
    if format != "coco":
        lengths = counts[1::2]
        if (lengths < 1).any():
            raise RleError(f"run {int((lengths < 1).argmax()) + 1} has length {lengths[lengths < 1][0]}")
        if (counts < 0).any():
            raise RleError(f"runs overlap or are out of order in the {format!r} format; is it another format?")
        if total > size:
            raise RleError(f"a run ends at pixel {total}, the image has {height} x {width} = {size}")
    flat = np.repeat(np.arange(len(counts) + 1) % 2 == 1, np.append(counts, size - total))
    return flat.reshape(width, height).T.copy()


def encode_rle(mask: NDArray, *, format: Format) -> str:
    """A mask to runs, numbers separated by spaces: the inverse of `decode_rle`. An empty "siim" mask is "-1".

    Shape: mask (H, W), anything above 0 is foreground
    """
    _check_format(format)
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask has two dimensions (H, W), this one has shape {mask.shape}")
    edges = np.flatnonzero(np.diff(mask.T.ravel() > 0, prepend=False, append=False))
    counts = np.diff(edges, prepend=0)  # gap, length, gap, length, ...
    if format == "coco":
        rest = mask.size - counts.sum()
        counts = np.append(counts, rest) if rest or not len(counts) else counts
    elif not len(edges):
        return "-1" if format == "siim" else ""
    elif format == "kaggle":
        counts[::2] = edges[::2] + 1
    return " ".join(map(str, counts))


def table_of_masks(masks: Mapping[str, NDArray], *, format: Format) -> pd.DataFrame:
    """One row an image, in the order given, with columns ImageId and EncodedPixels: what a contest takes."""
    return pd.DataFrame(
        {"ImageId": list(masks), "EncodedPixels": [encode_rle(mask, format=format) for mask in masks.values()]}
    )


def _check_format(format: str) -> None:
    if format not in ("siim", "kaggle", "coco"):
        raise ValueError(f"format must be one of siim, kaggle, coco, not {format!r}")


def _numbers(text: str | Iterable[int] | float, format: Format) -> NDArray[np.int64]:
    """The numbers of a code, none for an empty mask."""
    if text is None or np.isscalar(text):
        text = "" if pd.isna(text) else str(text).split()
    numbers = np.array(list(text), str)
    if format != "coco" and (not len(numbers) or numbers.tolist() in (["-1"], ["-1.0"], ["nan"])):
        return np.empty(0, np.int64)
    try:
        values = numbers.astype(float)
        if (values % 1).any():
            raise ValueError(f"{values[values % 1 > 0][0]} is none")
    except ValueError as error:
        raise RleError(f"runs are whole numbers separated by spaces ({error})") from None
    if format != "coco" and len(values) % 2:
        raise RleError(f"{len(values)} numbers are no pairs of a position and a length")
    return values.astype(np.int64)


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

    Raises ManifestError for a root that cannot be written to.
    """
    target = root / path
    if target.is_file():
        return path
    mask = Image.fromarray(np.asarray(make(), bool))
    try:
        with atomic_file(target) as file:
            mask.save(file, format="PNG")
    except OSError as error:
        raise ManifestError(
            f"{target} cannot be written ({error.strerror}); let the root be writable, or use masks=False"
        ) from error
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
