"""Where every pixel goes: the aspect-preserving resize with padding, the centre crop, and the exact way back.

The longer side of a radiograph becomes `size` pixels, the other side follows, and the rest of the square is zero, as in
the released code of GLoRIA (Huang et al., ICCV 2021, https://github.com/marshuang80/gloria, `_resize_img`). A map that
a model draws on the square can be laid back on the original pixels, which is what overlays and box scores need.

Coordinates are continuous and count from the outer corner: pixel (row r, column c) covers [c, c + 1) x [r, r + 1), its
centre is (c + 0.5, r + 0.5). Points are (x, y); boxes are (x, y, width, height).

Area interpolation of 8-bit images, bit for bit what OpenCV's `resize(..., INTER_AREA)` gives.

The published models were trained and evaluated on images shrunk by OpenCV, and their released numbers depend on its
rounding. Four cases are told apart as OpenCV does: equal size (copy), shrinking by whole factors (integer sums), any
other shrinking (float32 sums in a fixed order), and enlarging along at least one axis (11-bit fixed point). Compared
with OpenCV 5.0.0 at 1,500 random sizes without a difference; written anew, so that one imaging library is enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gloria_core.types import Behavior


def resize_area(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Resize one gray image by averaging areas. Shape: (H, W) uint8 -> (height, width) uint8.

    Raises: ValueError if the image is not a two-dimensional uint8 array or a side is below 1.
    """
    if image.ndim != 2 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"resize_area takes one gray uint8 image (H, W), got {image.dtype} of shape {image.shape}")
    if min(height, width) < 1:
        raise ValueError(f"cannot resize to {height} x {width}: both sides must be at least 1 pixel")
    if image.shape == (height, width):
        return image.copy()
    # the reciprocal of a quotient, not old / new: the last bit decides which case applies
    scale_y, scale_x = 1.0 / (height / image.shape[0]), 1.0 / (width / image.shape[1])
    if scale_y < 1 or scale_x < 1:
        return _enlarge(image, height, width)
    whole_y, whole_x = round(scale_y), round(scale_x)
    epsilon = np.finfo(np.float64).eps
    if abs(scale_y - whole_y) < epsilon and abs(scale_x - whole_x) < epsilon:
        return _shrink_by_whole_factors(image, whole_y, whole_x)
    return _shrink(image, height, width)


def coverage(old: int, new: int) -> NDArray[np.float32]:
    """The share of each of `new` cells that each of `old` cells covers; rows sum to 1. Shape: (new, old)."""
    edges = np.arange(new + 1) * (old / new)
    cells = np.arange(old)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (np.maximum(overlap, 0) * (new / old)).astype(np.float32)


def _shrink_by_whole_factors(image: NDArray[np.uint8], factor_y: int, factor_x: int) -> NDArray[np.uint8]:
    height, width = image.shape[0] // factor_y, image.shape[1] // factor_x
    # columns first, in 32 bits: 255 times any factor fits, and the second sum reads 1/factor_x of the data
    columns = image.reshape(image.shape[0], width, factor_x).sum(axis=2, dtype=np.uint32)
    total = columns.reshape(height, factor_y, width).sum(axis=1, dtype=np.uint32)
    if factor_y == factor_x == 2:
        return ((total + 2) >> 2).astype(np.uint8)
    share = np.float32(1.0) / np.float32(factor_y * factor_x)
    return _to_byte(total.astype(np.float32) * share)


def _shrink(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Weighted sums along x, then along y, each cell's terms added from left to right in float32."""
    # both sums take whole rows of a contiguous array, hence the transposes
    columns = np.ascontiguousarray(image.T).astype(np.float32)
    narrow = np.ascontiguousarray(_weighted_rows(columns, width).T)
    return _to_byte(_weighted_rows(narrow, height))


def _weighted_rows(rows: NDArray[np.float32], new: int) -> NDArray[np.float32]:
    index, weight = _area_taps(len(rows), new)
    total = rows[index[0]] * weight[0][:, None]
    for tap_index, tap_weight in zip(index[1:], weight[1:], strict=True):
        term = rows[tap_index]
        term *= tap_weight[:, None]
        total += term
    return total


def _area_taps(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Source cells and weights of every new cell, first to last; unused taps weigh 0. Shape: two of (taps, new).

    Slivers thinner than 1/1000 of a source cell are left out, as OpenCV does.
    """
    scale = 1.0 / (new / old)
    start = np.arange(new) * scale
    end = start + scale
    extent = np.minimum(scale, old - start)
    last = np.minimum(np.floor(end), old - 1).astype(np.intp)
    first = np.minimum(np.ceil(start).astype(np.intp), last)
    before = np.where(first - start > 1e-3, (first - start) / extent, 0)
    after = np.where(end - last > 1e-3, np.minimum(np.minimum(end - last, 1), extent) / extent, 0)
    source = first - 1 + np.arange((last - first).max() + 2)[:, None]
    weight = np.where(source < last, 1.0 / extent, 0)
    weight = np.where(source == last, after, weight)
    weight[0] = before
    return np.clip(source, 0, old - 1), weight.astype(np.float32)


def _enlarge(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Linear mixing only where a new pixel straddles two old ones, in fixed point with 11 bits of weight.

    OpenCV does the same along a second axis that shrinks, where this is no mean; an aspect-preserving resize has none.
    """
    low_x, high_x, left, right = _straddle(image.shape[1], width)
    low_y, high_y, upper, lower = _straddle(image.shape[0], height)
    rows = image.astype(np.int32)
    mixed = (rows[:, low_x] * left + rows[:, high_x] * right) >> 4
    above = (mixed[low_y] * upper[:, None]) >> 16
    below = (mixed[high_y] * lower[:, None]) >> 16
    return ((above + below + 2) >> 2).astype(np.uint8)


def _straddle(old: int, new: int) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Of each new pixel: its first and second source pixel and their weights times 2048. Shape: four of (new,)."""
    ratio = new / old
    scale = 1.0 / ratio
    pixel = np.arange(new)
    low = np.floor(pixel * scale).astype(np.int64)
    part = ((pixel + 1) - (low + 1) * ratio).astype(np.float32)
    part = np.where(part <= 0, np.float32(0), part - np.floor(part)).astype(np.float32)
    part[low >= old - 1] = 0
    low = np.clip(low, 0, old - 1)
    first = np.rint((np.float32(1) - part) * np.float32(2048)).astype(np.int32)
    second = np.rint(part * np.float32(2048)).astype(np.int32)
    return low, np.minimum(low + 1, old - 1), first, second


def _to_byte(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Nearest byte, halves to even."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


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
    def fit(cls, height: int, width: int, size: int, *, behavior: Behavior = "corrected") -> Geometry:
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
        tall = height >= width
        new_height, new_width = (size, short) if tall else (short, size)
        return cls(height, width, size, new_height, new_width, (size - new_height) // 2, (size - new_width) // 2)

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize and pad one gray image. Shape: (height, width) -> (size, size), both uint8."""
        self._check_shape(image)
        square = np.zeros((self.size, self.size), np.uint8)
        square[self._content] = resize_area(image, self.new_height, self.new_width)
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

    def box_to_original(self, xywh: ArrayLike, *, crop: int | None = None) -> NDArray[np.float64]:
        """The inverse of `box_from_original`. Shape: (..., 4) -> (..., 4)."""
        box = np.asarray(xywh, float)
        return np.concatenate([self.points_to_original(box[..., :2], crop=crop), box[..., 2:] / self._scale], axis=-1)

    def mask_from_original(self, mask: NDArray, *, crop: int | None = None) -> NDArray[np.bool_]:
        """A mask of the original on the square: pixels covered by half or more. Shape: (height, width) -> (size, size).

        A mask so small that no pixel is half covered keeps its best covered pixels: no finding vanishes by shrinking.
        With `crop`, the centre crop of that: (crop, crop); it is empty if the mask lies outside the crop.
        """
        self._check_shape(mask)
        square = np.zeros((self.size, self.size), bool)
        square[self._content] = _half_covered(np.asarray(mask) > 0, self.new_height, self.new_width)
        return square if crop is None else center_crop(square, crop)

    def mask_to_crop(self, mask: NDArray, crop: int) -> NDArray[np.bool_]:
        """`mask_from_original` cut to what the model saw. Shape: (height, width) -> (crop, crop)."""
        return self.mask_from_original(mask, crop=crop)

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
            raise ValueError(
                f"the array is {image.shape}, this geometry was made for {(self.height, self.width)} (height, width): "
                "make one with Geometry.fit(*array.shape, size)"
            )


def _half_covered(mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """Majority resize of a mask that never empties a mask with something in it."""
    covered = coverage(mask.shape[0], height) @ mask.astype(np.float32) @ coverage(mask.shape[1], width).T
    best = float(covered.max())
    # float32 sums of weights: 1e-4 is far above their error and far below any fraction that matters
    return covered >= min(0.5, best) - 1e-4 if best > 1e-7 else np.zeros_like(covered, bool)


def _between_centres(grid: NDArray, position: NDArray) -> NDArray:
    """Rows of `grid` at positions (cell i covers [i, i + 1)), linear between cell centres, held at the ends."""
    place = np.clip(position - 0.5, 0, len(grid) - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, len(grid) - 1)
    part = (place - low)[:, None]
    return grid[low] * (1 - part) + grid[high] * part
