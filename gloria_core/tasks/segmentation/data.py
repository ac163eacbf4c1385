"""Images and masks for segmentation, on the pixels that the model receives: the centre crop of the cached square.

The truth of a label in one study is the union of its masks on the frontal image. What a study without a mask means is
decided by `unmarked`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.data.annotations import read_mask
from gloria_core.data.cache import ImageCache
from gloria_core.data.geometry import center_crop
from gloria_core.tasks.annotated_images import (
    AnnotatedImages,
    Source,
    annotations_of,
    checked_box,
    frontal_images,
    is_positive,
)

Unmarked = Literal["by_label", "empty", "unknown"]


@dataclass(frozen=True)
class SegmentationData(AnnotatedImages):
    """Images and masks of n studies and K labels, `crop` pixels wide, by row number.

    Attributes:
        packed: masks, eight pixels a byte.
        known: (n, K) bool, False where the mask is not known; such a pair is left out of training and scores.
    """

    packed: np.ndarray
    known: np.ndarray

    def truth(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: -> (b, K, crop, crop) bool."""
        return np.unpackbits(self.packed[np.asarray(rows, dtype=int)], axis=-1, count=self.crop).astype(bool)

    def areas(self, rows: Sequence[int]) -> np.ndarray:
        """Pixels of each mask. Shape: -> (b, K) int64."""
        return np.bitwise_count(self.packed[np.asarray(rows, dtype=int)]).sum(axis=(2, 3), dtype=np.int64)

    def has_foreground(self, rows: Sequence[int]) -> np.ndarray:
        """Whether a class has a mask in any of these studies. Shape: -> (K,) bool."""
        return ((self.areas(rows) > 0) & self.known[np.asarray(rows, dtype=int)]).any(axis=0)

    def positives(self) -> pd.DataFrame:
        """Whether a study has a mask of a class. Shape: (n, K) bool, a column a label"""
        return pd.DataFrame(self.areas(range(len(self))) > 0, columns=list(self.labels))

    def on_original(self, row: int, mask: np.ndarray) -> np.ndarray:
        """A mask of the crop on the pixels of the image file; empty outside the crop.

        Shape: (crop, crop) bool -> (height, width) bool
        """
        square = np.zeros((self.cache.size, self.cache.size), bool)
        center_crop(square, self.crop)[...] = mask
        return self.cache.geometry(self.paths[row]).mask_to_original(square)


def segmentation_data(
    model: nn.Module,
    frame: pd.DataFrame,
    cache: ImageCache,
    root: Path | str,
    labels: Sequence[str],
    *,
    source: Source = "masks",
    unmarked: Unmarked = "by_label",
) -> SegmentationData:
    """Read the masks of `labels` in every study of `frame` (all splits) and place them on the model's crop.

    `source="boxes"`: the union of the boxes is the mask, as MGCA (Wang et al. 2022, section 4.3) has it for RSNA.
    `unmarked` is what a study without a mask of a label means. "by_label": an empty mask, except that the truth is
    unknown where the label's column says 1 (somebody saw it, nobody annotated it). "empty": always an empty mask.
    "unknown": left out, for data of which only a part was annotated.
    A mask outside the crop is an empty mask: in the pixels that the model receives there is nothing to find.

    Raises: ManifestError naming row and file for a mask that is missing, damaged or of other pixels than its image;
    ValueError for a box outside its image, or a label without any mask, naming those that have some.
    """
    if unmarked not in get_args(Unmarked):
        raise ValueError(f"unmarked must be one of {', '.join(get_args(Unmarked))}, not {unmarked!r}")
    images = frontal_images(model, frame, cache, labels)
    crop = images.crop
    packed = np.zeros((len(frame), len(labels), crop, -(-crop // 8)), np.uint8)
    annotated, available = np.zeros((len(frame), len(labels)), bool), set()
    for position, (row, study) in enumerate(zip(frame.index, frame.to_dict("records"), strict=True)):
        geometry = cache.geometry(images.paths[position])
        for entry in annotations_of(study, source):
            available.add(entry["label"])
            if entry["label"] not in labels:
                continue
            k, shape = labels.index(entry["label"]), (geometry.height, geometry.width)
            if source == "masks":
                where = f"row {row + 2}, study {study['study_id']}"
                mask = read_mask(Path(root), entry["path"], shape=shape, where=where)
            else:
                x, y, w, h = checked_box(study, entry, geometry)
                mask = np.zeros(shape, bool)
                mask[max(0, floor(y)) : ceil(y + h), max(0, floor(x)) : ceil(x + w)] = True
            packed[position, k] |= np.packbits(geometry.mask_from_original(mask, crop=crop), axis=-1)
            annotated[position, k] = True
    missing = [label for label in labels if label not in available]
    if missing or not labels:
        problem = f"no study has {source} of {missing[0]!r}" if missing else "no label is given"
        raise ValueError(f"{problem}; there are {source} of: {', '.join(sorted(available)) or 'nothing'}")
    known = annotated | (unmarked == "empty")
    if unmarked == "by_label":
        known = annotated | ~np.stack([is_positive(frame, label) for label in labels], axis=1)
    return SegmentationData(**vars(images), packed=packed, known=known)


def augmented(pixels: Tensor, truth: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images rotated by up to 10 degrees and scaled by up to 10 %, with their masks; outside is black.

    Bilinear for pixels, nearest for masks, as in the papers' code (albumentations' ShiftScaleRotate without shift).
    Shape: pixels (B, C, H, W), truth (B, K, H, W); unchanged
    """
    b = len(pixels)
    change = rng.random(b) < 0.5
    angle = np.deg2rad(rng.uniform(-10, 10, b)) * change
    scale = np.where(change, rng.uniform(0.9, 1.1, b), 1.0)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0 * angle], [np.sin(angle), np.cos(angle), 0 * angle]]) / scale
    theta = torch.from_numpy(rotation).permute(2, 0, 1).to(pixels)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # the grid reads zeros outside; black is the darkest value of an image, not zero, once it is normalised
    black = pixels.amin(dim=(2, 3), keepdim=True)
    moved = F.grid_sample(pixels - black, grid, mode="bilinear", align_corners=False) + black
    return moved, F.grid_sample(truth, grid.to(truth), mode="nearest", align_corners=False)
