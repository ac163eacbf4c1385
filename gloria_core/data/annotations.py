"""What people drew on a radiograph, put together: the masks of a label as one, the boxes of a label as a list.

A dataset may draw a finding in pieces: one RLE an instance, one file a lung, one box an opacity. Tasks and figures ask
for the finding.

Run-length encoded masks, in and out: SIIM-ACR's relative offsets, Kaggle's absolute positions, COCO's counts.

All of them read an image column by column, top to bottom, as numbers of pixels. They differ in what the numbers are:

| format | numbers | empty mask | used by |
|---|---|---|---|
| "siim" | pairs (gap since the last run's end, length), from 0 | "-1" | SIIM-ACR Pneumothorax, stages 1 and 2 |
| "kaggle" | pairs (start, length), starts from 1 | "" or blank | most other Kaggle segmentation contests |
| "coco" | lengths of background and foreground in turn | one number | COCO's uncompressed `counts` |

The released SIIM table has a space before the column name and before "-1" (`" EncodedPixels"`, `" -1"`). Spaces never
matter here; code that compares with "-1" to the letter takes every image for a positive one.

Mask files: manifests name them. Masks that a dataset describes in numbers are written once, below its root.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from gloria_core.data.images import ImageError, read_gray
from gloria_core.data.manifest import ManifestError, boxes_of, masks_of

Format = Literal["siim", "kaggle", "coco"]
FORMATS = ("siim", "kaggle", "coco")
SIIM_SIDE = 1024
"""Sides of every image of the SIIM-ACR set, in pixels: its runs make sense on this grid only."""
_EMPTY = {"siim": ("", "-1", "nan"), "kaggle": ("", "-1", "nan")}


class RleError(ValueError):
    """Runs that are no mask of this image; the message says what is wrong, and in a table the row."""


def decode_rle(text: str | Iterable[int] | float, height: int, width: int, *, format: Format) -> NDArray[np.bool_]:
    """Runs to a mask. Shape: -> (height, width) bool.

    `text`: numbers separated by spaces, or the numbers themselves. "siim" and "kaggle" take "-1", an empty text and a
    blank cell (NaN) for an empty mask.
    Raises: RleError for what is no number, a run outside the image, runs that overlap or stand out of order, and for
    "coco" counts that do not sum to the number of pixels.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    size, numbers = height * width, _numbers(text, format)
    flat = np.zeros(size, bool)
    if format == "coco":
        if (numbers < 0).any() or numbers.sum() != size:
            raise RleError(f"counts sum to {numbers.sum()}, the image has {height} x {width} = {size} pixels")
        flat = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers)
    elif len(numbers):
        starts, lengths = _runs(numbers, format)
        ends = starts + lengths
        if (lengths < 1).any():
            raise RleError(f"run {int((lengths < 1).argmax()) + 1} has length {lengths[lengths < 1][0]}")
        if (starts[1:] < ends[:-1]).any() or starts[0] < 0:
            raise RleError(f"runs overlap or are out of order in the {format!r} format; is it another format?")
        if ends[-1] > size:
            raise RleError(f"a run ends at pixel {ends[-1]}, the image has {height} x {width} = {size}")
        change = np.zeros(size + 1, np.int8)
        change[starts] += 1
        np.subtract.at(change, ends, 1)
        flat = np.cumsum(change[:-1], dtype=np.int8) > 0
    return flat.reshape(width, height).T.copy()


def encode_rle(mask: NDArray, *, format: Format) -> str:
    """A mask to runs, numbers separated by spaces: the inverse of `decode_rle`. An empty "siim" mask is "-1".

    Shape: mask (H, W), anything above 0 is foreground
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"a mask has two dimensions (H, W), this one has shape {mask.shape}")
    flat = np.concatenate([[0], (mask.T > 0).ravel().astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    starts, ends = edges[::2], edges[1::2]
    if format == "coco":
        turns = np.concatenate([[0], edges, [mask.size]] if mask.size else [[0]])
        counts = np.diff(turns)
        return " ".join(map(str, counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts))
    if not len(starts):
        return "-1" if format == "siim" else ""
    first = starts + 1 if format == "kaggle" else starts - np.concatenate([[0], ends[:-1]])
    return " ".join(str(number) for pair in zip(first, ends - starts, strict=True) for number in pair)


def masks_of_table(
    table: pd.DataFrame,
    *,
    format: Format,
    shapes: tuple[int, int] | Mapping[str, tuple[int, int]],
    image: str = "ImageId",
    pixels: str = "EncodedPixels",
    source: str = "the table",
) -> dict[str, NDArray[np.bool_]]:
    """One mask an image, the union of its rows: an image with several lesions has several rows.

    `shapes`: (height, width) of all images, or by image name. Spaces around column names and cells are ignored. An
    image whose rows are all empty has an empty mask. So split a dataset by image, never by row.
    Raises: RleError naming source, row (as in the CSV, the header is row 1) and image; KeyError for a missing column.
    """
    columns = {str(name).strip(): name for name in table.columns}
    for name in (image, pixels):
        if name not in columns:
            raise KeyError(f"{source} has no column {name!r}; it has {', '.join(columns)}")
    found: dict[str, NDArray[np.bool_]] = {}
    cells = zip(table[columns[image]], table[columns[pixels]], strict=True)
    for row, (name, cell) in enumerate(cells, start=2):
        name = str(name).strip()
        shape = shapes.get(name) if isinstance(shapes, Mapping) else shapes
        if shape is None:
            raise RleError(f"{source}, row {row}: no height and width given for image {name!r}")
        try:
            mask = decode_rle(cell, *shape, format=format)
        except RleError as error:
            raise RleError(f"{source}, row {row}, image {name!r}: {error}") from None
        found[name] = mask if name not in found else found[name] | mask
    return found


def table_of_masks(
    masks: Mapping[str, NDArray], *, format: Format, image: str = "ImageId", pixels: str = "EncodedPixels"
) -> pd.DataFrame:
    """One row an image, in the order given: what a contest takes as a submission."""
    return pd.DataFrame({image: list(masks), pixels: [encode_rle(mask, format=format) for mask in masks.values()]})


def _numbers(text: str | Iterable[int] | float, format: Format) -> NDArray[np.int64]:
    if text is None or (isinstance(text, float) and np.isnan(text)):
        text = ""
    if isinstance(text, str):
        if text.strip().lower() in _EMPTY.get(format, ()):
            return np.empty(0, np.int64)
        text = text.split()
    elif np.isscalar(text):
        text = [text]
    try:
        numbers = np.array([_whole(number) for number in text], np.int64)
    except (TypeError, ValueError) as error:
        raise RleError(f"runs are whole numbers separated by spaces ({error})") from None
    if format != "coco" and len(numbers) == 1 and numbers[0] == -1:
        return np.empty(0, np.int64)
    if format != "coco" and len(numbers) % 2:
        raise RleError(f"{len(numbers)} numbers are no pairs of a position and a length")
    return numbers


def _whole(number: object) -> int:
    if isinstance(number, float | np.floating) and not float(number).is_integer():
        raise ValueError(f"{number} is none")
    return int(number)


def _runs(numbers: NDArray[np.int64], format: Format) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts from 0 and lengths."""
    first, lengths = numbers[::2], numbers[1::2]
    if format == "kaggle":
        return first - 1, lengths
    return np.cumsum(first + np.concatenate([[0], lengths[:-1]])), lengths


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


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """One image (H, W) uint8 with `masks`: label -> (H, W) bool, and `boxes`: label -> [(x, y, width, height)]."""

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]]
    boxes: dict[str, list[Box]]


def drawn_on(row: Mapping[str, Any], root: str | Path, *, number: int = 0) -> Drawn:
    """Everything drawn on image `number` of a manifest row, in pixels of its file; masks of one label are united.

    Raises ManifestError for a mask that cannot be read or has another size than its image, ImageError for the image.
    """
    root = Path(root)
    image = read_gray(root / row["images"].split(";")[number])
    masks: dict[str, NDArray[np.bool_]] = {}
    for entry in masks_of(row):
        if entry["image"] == number:
            mask = read_mask(root, entry["path"], shape=image.shape, where=f"study {row['study_id']!r}")
            masks[entry["label"]] = mask | masks.get(entry["label"], False)
    boxes: dict[str, list[Box]] = {}
    for entry in boxes_of(row):
        if entry["image"] == number:
            boxes.setdefault(entry["label"], []).append(tuple(float(value) for value in entry["xywh"]))
    return Drawn(image, masks, boxes)
