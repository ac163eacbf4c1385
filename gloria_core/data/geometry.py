"""Where every pixel goes: the aspect-preserving resize with padding, the centre crop, and the exact way back.

The longer side of a radiograph becomes `size` pixels, the other side follows, and the rest of the square is zero, as in
the released code of GLoRIA (Huang et al., ICCV 2021, https://github.com/marshuang80/gloria, `_resize_img`). Images are
resized by OpenCV's area interpolation, as there: the released numbers depend on its rounding. A map that a model draws
on the square can be laid back on the original pixels, which is what overlays and box scores need.

Coordinates are continuous and count from the outer corner: pixel (row r, column c) covers [c, c + 1) x [r, r + 1), its
centre is (c + 0.5, r + 0.5). Points are (x, y); boxes are (x, y, width, height).
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from gloria_core.types import Behavior


def crop_box(size: int, crop: int) -> tuple[int, int]:
    """(top, left) of the centre crop of a square; rounds as torchvision's `CenterCrop` does (halves to even)."""
    if not 0 < crop <= size:
        raise ValueError(f"crop={crop} does not fit into images of size {size}: choose 1 <= crop <= {size}")
    start = round((size - crop) / 2)
    return start, start


def center_crop(images: NDArray, crop: int) -> NDArray:
    """Centre crop of square images. Shape: (..., size, size) -> (..., crop, crop), a view."""
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(f"center_crop takes square images, got {height} x {width}: apply a Geometry first")
    top, left = crop_box(height, crop)
    return images[..., top : top + crop, left : left + crop]


@dataclass(frozen=True)
class Geometry:
    """How a `height` x `width` image lies in a square of `size`: `new_height` x `new_width` pixels from (top, left).

    Everything that takes `crop` counts from the corner of the centre crop of that size; None means the whole square.
    """

    height: int
    width: int
    size: int
    new_height: int
    new_width: int
    top: int
    left: int

    @classmethod
    def fit(cls, height: int, width: int, size: int, *, behavior: Behavior = "corrected") -> "Geometry":
        """The placement of a `height` x `width` image (pixels) in a square of `size` pixels.

        "corrected" rounds the shorter side to the nearest pixel (halves up, never below 1) in whole numbers.
        "published" repeats `_resize_img`: `int(side * (size / longer))` in floating point, which cuts instead of
        rounding and turns some squares (103 x 103, 107 x 107, ... at 256) into one line less, leaving a zero column.

        Raises: ValueError for sides below 1, an unknown behavior, or a published width of 0 pixels.
        """
        if min(height, width, size) < 1:
            raise ValueError(f"height={height}, width={width}, size={size}: all three must be at least 1 pixel")
        longer, shorter = max(height, width), min(height, width)
        if behavior == "corrected":
            short = max(1, (2 * shorter * size + longer) // (2 * longer))
        elif behavior == "published":
            short = int(float(shorter) * (size / float(longer)))
        else:
            raise ValueError(f"behavior={behavior!r} is unknown: use 'corrected' or 'published'")
        if short < 1:
            raise ValueError(f"{height} x {width} is too thin for size {size} as published: use behavior='corrected'")
        new_height, new_width = (size, short) if height >= width else (short, size)
        return cls(height, width, size, new_height, new_width, (size - new_height) // 2, (size - new_width) // 2)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and pad one gray image. Shape: (height, width) -> (size, size), both uint8."""
        if image.dtype != np.uint8:
            raise ValueError(f"Geometry.apply takes a gray uint8 image (height, width), got {image.dtype}")
        self._check_shape(image)
        square = np.zeros((self.size, self.size), np.uint8)
        square[self._content] = cv2.resize(image, (self.new_width, self.new_height), interpolation=cv2.INTER_AREA)
        return square

    def points_from_original(self, xy: ArrayLike, *, crop: int | None = None) -> NDArray[np.float64]:
        """Points (x, y) of the original file to points of the square (or its crop). Shape: (..., 2) -> (..., 2)."""
        return np.asarray(xy, float) * self._scale + self._offset(crop)

    def points_to_original(self, xy: ArrayLike, *, crop: int | None = None) -> NDArray[np.float64]:
        """The inverse of `points_from_original`; points in the padding land outside the original. Shape: (..., 2)."""
        return (np.asarray(xy, float) - self._offset(crop)) / self._scale

    def box_from_original(self, xywh: ArrayLike, *, crop: int | None = None) -> NDArray[np.float64]:
        """Boxes of the original file to boxes of the square (or its crop), not clipped. Shape: (..., 4) -> (..., 4)."""
        box = np.asarray(xywh, float)
        return np.concatenate([self.points_from_original(box[..., :2], crop=crop), box[..., 2:] * self._scale], axis=-1)

    def mask_from_original(self, mask: NDArray, *, crop: int | None = None) -> NDArray[np.bool_]:
        """A mask of the original on the square: pixels covered by half or more. Shape: (height, width) -> (size, size).

        A mask so small that no pixel is half covered keeps its best covered pixels: no finding vanishes by shrinking.
        With `crop`, the centre crop of that: (crop, crop); it is empty if the mask lies outside the crop.
        """
        self._check_shape(mask)
        square = np.zeros((self.size, self.size), bool)
        square[self._content] = _half_covered(np.asarray(mask) > 0, self.new_height, self.new_width)
        return square if crop is None else center_crop(square, crop)

    def mask_to_original(self, mask: NDArray) -> NDArray[np.bool_]:
        """A mask on the square, without its padding, on the original. Shape: (size, size) -> (height, width)."""
        if mask.shape != (self.size, self.size):
            raise ValueError(f"the mask is {mask.shape}, this geometry's square is {(self.size, self.size)}")
        return _half_covered(np.asarray(mask)[self._content] > 0, self.height, self.width)

    def map_to_original(self, values: ArrayLike, *, crop: int | None = None) -> NDArray[np.float32]:
        """A region grid or pixel map laid over the original pixels, NaN where the model saw nothing.

        `values` covers the square, or its centre crop, in equal cells. Each original pixel takes the bilinear value at
        its centre between cell centres; between the outermost cell centres and the border the outermost cells hold.
        A NaN cell makes its neighbourhood NaN.

        Shape: values (h, w), any h and w -> (height, width) float32.
        """
        grid = np.asarray(values, np.float64)
        if grid.ndim != 2 or 0 in grid.shape:
            raise ValueError(f"a map has two dimensions (h, w), this one has shape {grid.shape}")
        span = self.size if crop is None else crop
        offset_x, offset_y = self._offset(crop)
        x = (np.arange(self.width) + 0.5) * (self.new_width / self.width) + offset_x
        y = (np.arange(self.height) + 0.5) * (self.new_height / self.height) + offset_y
        on_rows = _between_centres(grid, y * (grid.shape[0] / span))
        full = _between_centres(on_rows.T, x * (grid.shape[1] / span)).T
        full[(y < 0) | (y >= span), :] = np.nan
        full[:, (x < 0) | (x >= span)] = np.nan
        return full.astype(np.float32)

    @property
    def _content(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.new_height), slice(self.left, self.left + self.new_width)

    @property
    def _scale(self) -> NDArray[np.float64]:
        return np.array([self.new_width / self.width, self.new_height / self.height])

    def _offset(self, crop: int | None) -> NDArray[np.float64]:
        top, left = (0, 0) if crop is None else crop_box(self.size, crop)
        return np.array([self.left - left, self.top - top], float)

    def _check_shape(self, image: NDArray) -> None:
        if image.shape != (self.height, self.width):
            fault = f"the array is {image.shape}, this geometry is of {(self.height, self.width)} (height, width)"
            raise ValueError(f"{fault}: make one with Geometry.fit(*array.shape, size)")


def _half_covered(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Majority resize of a mask that never empties a mask with something in it."""
    covered = _coverage(mask.shape[0], height) @ mask.astype(np.float32) @ _coverage(mask.shape[1], width).T
    best = float(covered.max())
    # float32 sums of weights: 1e-4 is far above their error and far below any fraction that matters
    return covered >= min(0.5, best) - 1e-4 if best > 1e-7 else np.zeros_like(covered, bool)


def _coverage(old: int, new: int) -> NDArray[np.float32]:
    """The fraction of each of `new` cells that each of `old` cells covers; rows sum to 1. Shape: (new, old)."""
    edges = np.arange(new + 1) * (old / new)
    cells = np.arange(old)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(overlap, 0) * (new / old)).astype(np.float32)


def _between_centres(grid: NDArray, position: NDArray) -> NDArray:
    """Rows of `grid` at positions (cell i covers [i, i + 1)), linear between cell centres, held at the ends."""
    place = np.clip(position - 0.5, 0, len(grid) - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, len(grid) - 1)
    part = (place - low)[:, None]
    return grid[low] * (1 - part) + grid[high] * part
