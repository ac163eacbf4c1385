"""What people drew on a radiograph, put together: the masks of a label as one, the boxes of a label as a list.

A dataset may draw a finding in pieces: one RLE an instance, one file a lung, one box an opacity. Tasks and figures ask
for the finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gloria_core.data.images import read_gray
from gloria_core.data.manifest import boxes_of, masks_of
from gloria_core.data.mask_files import read_mask

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
