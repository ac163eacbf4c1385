"""What a segmentation network is fed: features that are computed once, augmented images, batches in a seeded order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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
