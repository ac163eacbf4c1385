"""Images and masks for segmentation, on the pixels that the model receives: the centre crop of the cached square.

The truth of a label in one study is the union of its masks on the frontal image. What a study without a mask means is
decided by `unmarked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.data.annotations import read_mask
from gloria_core.data.geometry import center_crop
from gloria_core.data.images import to_tensor
from gloria_core.data.manifest import masks_of
from gloria_core.tasks.features import frontal_image

Unmarked = Literal["by_label", "empty", "unknown"]


@dataclass(frozen=True)
class SegmentationData:
    """Images and masks of n studies and K labels, `crop` pixels wide, by row number.

    `frame`: the studies, index 0..n-1. `images`: path of each study's frontal image in `cache`. `packed`: masks, eight
    pixels a byte. `known` (n, K) bool: False where the mask is not known; such a pair is left out of training and
    scores. `channels`, `norm`: format of the model's pixels.
    """

    frame: pd.DataFrame
    labels: tuple[str, ...]
    images: tuple[str, ...]
    cache: object
    packed: np.ndarray
    known: np.ndarray
    crop: int
    channels: int = 3
    norm: str = "half"

    def __len__(self) -> int:
        return len(self.frame)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split. Raises ValueError where it is empty."""
        rows = np.flatnonzero(self.frame["split"] == split)
        if not len(rows):
            raise ValueError(f"no study in split {split!r}; segmentation needs train, valid and test")
        return rows

    def bytes_of(self, rows: Sequence[int]) -> np.ndarray:
        """The pixels that the model receives, not normalised. Shape: -> (b, crop, crop) uint8."""
        return np.stack([center_crop(np.asarray(self.cache[self.images[row]]), self.crop) for row in rows])

    def pixels(self, rows: Sequence[int]) -> Tensor:
        """Shape: -> (b, C, crop, crop) float32."""
        return to_tensor(self.bytes_of(rows), channels=self.channels, norm=self.norm)

    def truth(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: -> (b, K, crop, crop) bool."""
        return np.unpackbits(self.packed[np.asarray(rows, dtype=int)], axis=-1, count=self.crop).astype(bool)

    def areas(self, rows: Sequence[int]) -> np.ndarray:
        """Pixels of each mask. Shape: -> (b, K) int64."""
        return np.bitwise_count(self.packed[np.asarray(rows, dtype=int)]).sum(axis=(2, 3), dtype=np.int64)

    def has_foreground(self, rows: Sequence[int]) -> np.ndarray:
        """Whether a class has a mask in any of these studies. Shape: -> (K,) bool."""
        return ((self.areas(rows) > 0) & self.known[np.asarray(rows, dtype=int)]).any(axis=0)

    def on_original(self, row: int, mask: np.ndarray) -> np.ndarray:
        """A mask of the crop on the pixels of the image file; empty outside the crop.

        Shape: (crop, crop) bool -> (height, width) bool
        """
        square = np.zeros((self.cache.size, self.cache.size), bool)
        center_crop(square, self.crop)[...] = mask
        return self.cache.geometry(self.images[row]).mask_to_original(square)


def segmentation_data(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    root: Path | str,
    labels: Sequence[str],
    *,
    unmarked: Unmarked = "by_label",
) -> SegmentationData:
    """Read the masks of `labels` in every study of `frame` (all splits) and place them on the model's crop.

    `unmarked` is what a study without a mask of a label means. "by_label": an empty mask, except that the truth is
    unknown where the label's column says 1 (somebody saw it, nobody annotated it). "empty": always an empty mask.
    "unknown": left out, for data of which only a part was annotated.
    A mask outside the crop is an empty mask: in the pixels that the model receives there is nothing to find.

    Raises: ManifestError naming row and file for a mask that is missing, damaged or of other pixels than its image;
    ValueError for a label without any mask, naming those that have some.
    """
    if unmarked not in get_args(Unmarked):
        raise ValueError(f"unmarked must be one of {', '.join(get_args(Unmarked))}, not {unmarked!r}")
    available = mask_counts(frame).index
    missing = [label for label in labels if label not in available]
    if missing or not labels:
        problem = f"no study has a mask of {missing[0]!r}" if missing else "no label is given"
        raise ValueError(f"{problem}; there are masks of: {', '.join(available) or 'nothing'}")
    crop, config = model.config.crop, model.config
    packed = np.zeros((len(frame), len(labels), crop, -(-crop // 8)), np.uint8)
    annotated, images = np.zeros((len(frame), len(labels)), bool), []
    for position, (row, study) in enumerate(zip(frame.index, frame.to_dict("records"), strict=True)):
        number, image = frontal_image(study)
        images.append(image)
        geometry = cache.geometry(image)
        for entry in masks_of(study):
            if entry["label"] in labels and entry["image"] == number:
                k = labels.index(entry["label"])
                shape, where = (geometry.height, geometry.width), f"row {row + 2}, study {study['study_id']}"
                mask = read_mask(Path(root), entry["path"], shape=shape, where=where)
                packed[position, k] |= np.packbits(geometry.mask_from_original(mask, crop=crop), axis=-1)
                annotated[position, k] = True
    known = annotated | (unmarked == "empty")
    if unmarked == "by_label":
        known = annotated | ~np.stack([_is_positive(frame, label) for label in labels], axis=1)
    rows = frame.reset_index(drop=True)
    return SegmentationData(
        rows, tuple(labels), tuple(images), cache, packed, known, crop, config.channels, config.norm
    )


def mask_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Studies with a mask on their frontal image: one row a label, one column a split.

    The last column, "positive without mask", counts studies whose label is 1 although there is no mask.
    """
    has_mask: dict[str, np.ndarray] = {}
    for position, study in enumerate(frame[["study_id", "images", "views", "masks"]].to_dict("records")):
        if study["masks"]:
            number = frontal_image(study)[0]
            for entry in masks_of(study):
                if entry["image"] == number:
                    has_mask.setdefault(entry["label"], np.zeros(len(frame), bool))[position] = True
    splits = [name for name in ("train", "valid", "test") if (frame["split"] == name).any()]
    table = {
        label: [int((has & (frame["split"] == split).to_numpy()).sum()) for split in splits]
        + [int((~has & _is_positive(frame, label)).sum())]
        for label, has in has_mask.items()
    }
    counts = pd.DataFrame.from_dict(table, orient="index", columns=[*splits, "positive without mask"])
    return counts.rename_axis("label").sort_index()


def _is_positive(frame: pd.DataFrame, label: str) -> np.ndarray:
    """(n,) bool: where the label's column says 1; nowhere without such a column."""
    return (pd.to_numeric(frame.get(label, pd.Series(0, frame.index)), errors="coerce") == 1).to_numpy(bool)


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
