"""What a segmentation network is fed: features that are computed once, augmented images, batches in a seeded order.

From the `masks` of a manifest to what a segmentation network is trained on and judged by.

Truth lies on the pixels that the model sees: the centre crop of the cached square. A label's truth in one study is the
union of its masks on the frontal image. What a study without a mask means is said once, by `unmarked`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
UNMARKED = ("by_label", "empty", "unknown")


@dataclass(frozen=True)
class SegmentationData:
    """Images and masks of n studies and K labels, `crop` pixels wide, ready to be asked for by row.

    `frame`: the studies, index 0..n-1. `images`: path of each study's frontal image in `cache`. `packed`: masks, eight
    pixels a byte. `known` (n, K) bool: False where nobody says what the mask is; such a pair is left out of training
    and scores. `channels`, `norm`: how the model wants its pixels.
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
        found = np.flatnonzero((self.frame["split"] == split).to_numpy())
        if not len(found):
            raise ValueError(f"no study in split {split!r}; segmentation needs train, valid and test")
        return found

    def bytes_of(self, rows: Sequence[int]) -> np.ndarray:
        """The pixels that the model sees, not normalised. Shape: -> (b, crop, crop) uint8."""
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
        """A mask of the crop on the pixels of the image file; empty where the crop did not reach.

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

    `unmarked` says what a study without a mask of a label is. "by_label": an empty mask, except that the truth is
    unknown where the label's column says 1 (somebody saw it, nobody drew it). "empty": always an empty mask.
    "unknown": left out, for data of which only a part was drawn.
    A mask outside the crop is an empty mask: in the pixels that the model sees there is nothing to find.

    Raises: ManifestError naming row and file for a mask that is missing, damaged or of other pixels than its image;
    ValueError for a label without any mask, naming those that have some.
    """
    if unmarked not in UNMARKED:
        raise ValueError(f"unmarked must be one of {', '.join(UNMARKED)}, not {unmarked!r}")
    there = mask_counts(frame).index
    missing = [label for label in labels if label not in there]
    if missing or not labels:
        wrong = f"no study has a mask of {missing[0]!r}" if missing else "no label is given"
        raise ValueError(f"{wrong}; masks there are: {', '.join(there) or 'none'}")
    crop, config = model.config.crop, model.config
    packed = np.zeros((len(frame), len(labels), crop, -(-crop // 8)), np.uint8)
    drawn, images = np.zeros((len(frame), len(labels)), bool), []
    for position, (row, study) in enumerate(zip(frame.index, frame.to_dict("records"), strict=True)):
        number, image = frontal_image(study)
        images.append(image)
        geometry = cache.geometry(image)
        for entry in masks_of(study):
            if entry["label"] in labels and entry["image"] == number:
                column = labels.index(entry["label"])
                shape, where = (geometry.height, geometry.width), f"row {row + 2}, study {study['study_id']}"
                mask = read_mask(Path(root), entry["path"], shape=shape, where=where)
                packed[position, column] |= np.packbits(geometry.mask_from_original(mask, crop=crop), axis=-1)
                drawn[position, column] = True
    known = drawn | _known_empty(frame, labels, unmarked)
    kept = frame.reset_index(drop=True)
    return SegmentationData(
        kept, tuple(labels), tuple(images), cache, packed, known, crop, config.channels, config.norm
    )


def mask_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Studies with a mask on their frontal image: one row a label, one column a split, and how many lack one.

    The last column, "positive without mask", counts studies whose label is 1 although nothing is drawn.
    """
    found: dict[str, np.ndarray] = {}
    for position, study in enumerate(frame[["study_id", "images", "views", "masks"]].to_dict("records")):
        if study["masks"]:
            number = frontal_image(study)[0]
            for entry in masks_of(study):
                if entry["image"] == number:
                    found.setdefault(entry["label"], np.zeros(len(frame), bool))[position] = True
    splits = [name for name in ("train", "valid", "test") if (frame["split"] == name).any()]
    table = {
        label: [int((has & (frame["split"] == split).to_numpy()).sum()) for split in splits]
        + [int((~has & _says_one(frame, label)).sum())]
        for label, has in found.items()
    }
    counts = pd.DataFrame.from_dict(table, orient="index", columns=[*splits, "positive without mask"])
    return counts.rename_axis("label").sort_index()


def _known_empty(frame: pd.DataFrame, labels: Sequence[str], unmarked: Unmarked) -> np.ndarray:
    """(n, K) bool: where a study without a mask is known to have nothing to draw."""
    if unmarked == "by_label":
        return ~np.stack([_says_one(frame, label) for label in labels], axis=1)
    return np.full((len(frame), len(labels)), unmarked == "empty")


def _says_one(frame: pd.DataFrame, label: str) -> np.ndarray:
    if label not in frame:
        return np.zeros(len(frame), bool)
    return (pd.to_numeric(frame[label], errors="coerce") == 1).to_numpy(bool)


class FeatureStore:
    """Features of a frozen network, computed when first asked for and kept while they fit into `limit` bytes.

    What does not fit is computed again each time: the limit changes the time and no number. `encode` takes rows and
    gives tensors (b, ...). They are kept on the CPU in the number format that they come in, and given on `device`.
    """

    def __init__(
        self, encode: Callable[[list[int]], Sequence[Tensor]], *, limit: int, device: torch.device | str = "cpu"
    ) -> None:
        self.encode, self.limit, self.device, self.used = encode, limit, torch.device(device), 0
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Features of these rows, in their order; a row may be named twice."""
        rows = [int(row) for row in rows]
        missing = list(dict.fromkeys(row for row in rows if row not in self._kept))
        fresh: dict[int, tuple[Tensor, ...]] = {}
        if missing:
            found = self.encode(missing)
            if missing == rows and self.used >= self.limit:
                return tuple(found)
            fresh = {row: tuple(part[place] for part in found) for place, row in enumerate(missing)}
            self._keep(fresh)
        parts = [self._kept[row] if row in self._kept else fresh[row] for row in rows]
        return tuple(torch.stack([part.to(self.device) for part in column]) for column in zip(*parts, strict=True))

    def _keep(self, fresh: dict[int, tuple[Tensor, ...]]) -> None:
        for row, parts in fresh.items():
            size = sum(part.numel() * part.element_size() for part in parts)
            if self.used + size > self.limit:
                self.used = self.limit  # full: later rows are not tried one by one
                return
            # copies: a view would keep its whole batch alive
            self._kept[row] = tuple(part.detach().cpu().clone() for part in parts)
            self.used += size


def shuffled_batches(
    train: np.ndarray, *, batch_size: int, steps: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Whole batches from shuffled passes over the subset, one pass after the other."""
    waiting = np.empty(0, int)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(train)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def augmented(pixels: Tensor, truth: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images turned by up to 10 degrees and scaled by up to 10 %, with their masks; outside is black.

    Bilinear for pixels, nearest for masks, as in the papers' code (albumentations' ShiftScaleRotate without shift).
    Shape: pixels (B, C, H, W), truth (B, K, H, W); both kept
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
