"""From a manifest to what a detector learns and is judged by: images of one size, and boxes in their pixels.

Boxes come from the manifest's column `boxes`, or are drawn around the connected parts of its `masks`. They are taken
through the geometry of the image cache to the pixels that the detector sees, and clipped to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import ndimage

from gloria_core.data.geometry import center_crop
from gloria_core.data.images import read_gray
from gloria_core.data.manifest import boxes_of, label_columns, masks_of
from gloria_core.models.detection import STRIDE
from gloria_core.tasks.detection.metrics import Boxes
from gloria_core.tasks.features import frontal_image

Source = Literal["auto", "boxes", "masks"]
Unboxed = Literal["negative", "exclude"]


@dataclass(frozen=True)
class BoxData:
    """Studies with boxes: row i of `frame` is image `paths[i]` with `truths[i]`; class k is `labels[k]`.

    `seen`: pixels of the centre crop of the cached image; `side`: with black added at the right and at the bottom up to
    a multiple of 32. `left_out`: boxes and studies that do not take part, with the reason.
    """

    frame: pd.DataFrame
    labels: tuple[str, ...]
    paths: tuple[str, ...]
    truths: tuple[Boxes, ...]
    cache: object
    seen: int
    left_out: pd.DataFrame

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def side(self) -> int:
        return -(-self.seen // STRIDE) * STRIDE

    def rows(self, split: str) -> np.ndarray:
        """Positions of a split's studies. Raises ValueError if there are none."""
        found = np.flatnonzero(self.frame["split"] == split)
        if not len(found):
            raise ValueError(f"no study in split {split!r}; detection needs train, valid and test")
        return found

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: (n, side, side) uint8."""
        stack = center_crop(self.cache.rows([self.paths[row] for row in rows]), self.seen)
        more = self.side - self.seen
        return np.pad(stack, ((0, 0), (0, more), (0, more)))

    def counts(self, rows: Sequence[int]) -> np.ndarray:
        """Boxes of each class in the given studies. Shape: (K,)"""
        labels = [self.truths[row].labels for row in rows]
        return np.bincount(np.concatenate([*labels, np.zeros(0, int)]), minlength=len(self.labels))


def box_data(
    frame: pd.DataFrame,
    cache,
    *,
    labels: Sequence[str] = (),
    seen: int | None = None,
    source: Source = "auto",
    root: Path | str | None = None,
    least_visible: float = 0.25,
    unboxed: Unboxed = "negative",
) -> BoxData:
    """Boxes of the first frontal image of every study, in the pixels that a detector sees.

    labels: classes, in this order; all that have a box, in the order of the manifest's columns, if none are named.
    seen: side of the centre crop of the cached image; the whole image by default, so that no box is cut.
    source: "boxes", "masks" (a box around each connected part, corners count as connected; `root` is the folder of the
        mask files), or "auto": boxes if the manifest has any, else masks.
    least_visible: a box that keeps less than this share of its area after clipping is no target and listed in
        `left_out`; one that keeps more is its visible part.
    unboxed: studies without boxes are negatives, and scored. Where an asked label is 1 and has no box (NIH has boxes of
        984 images only), "exclude" leaves the study out and lists it, since what is found there cannot be judged.
    Raises ValueError, naming the study, for a box that is degenerate or outside its image, and for no boxes at all.
    """
    if source not in ("auto", "boxes", "masks") or unboxed not in ("negative", "exclude"):
        raise ValueError(f"source {source!r} must be auto, boxes or masks; unboxed {unboxed!r} negative or exclude")
    if source == "auto":
        source = "boxes" if (frame["boxes"] != "").any() else "masks"
    seen = cache.size if seen is None else seen
    frame = frame.reset_index(drop=True)
    records = frame.to_dict("records")
    paths = [frontal_image(row)[1] for row in records]
    boxes = [_entries(row, cache, source, root) for row in records]
    named = {label for entries in boxes for label, _ in entries}
    labels = tuple(labels) or tuple(name for name in label_columns(frame) if name in named)
    if not named & set(labels):
        raise ValueError(f"no box of {', '.join(labels) or 'any label'} in {len(frame)} studies (source {source!r})")
    truths, left, keep = [], [], []
    for row, path, entries in zip(records, paths, boxes, strict=True):
        truth, outside = _truth(entries, labels, cache.geometry(path), seen, least_visible)
        left += [(row["study_id"], label, why) for label, why in outside]
        have = {label for label, _ in entries}
        bare = [label for label in labels if row.get(label) == 1 and label not in have]
        keep.append(not bare or unboxed == "negative")
        if not keep[-1]:
            left.append((row["study_id"], ", ".join(bare), "study left out: the label is 1 and there is no box"))
        truths.append(truth)
    at = np.flatnonzero(keep)
    return BoxData(
        frame.iloc[at].reset_index(drop=True),
        labels,
        tuple(paths[i] for i in at),
        tuple(truths[i] for i in at),
        cache,
        seen,
        pd.DataFrame(left, columns=["study_id", "label", "reason"]),
    )


def boxes_of_mask(mask: np.ndarray) -> np.ndarray:
    """A box around each connected part of a mask (corners connect). Shape: (H, W) -> (n, 4) x, y, width, height."""
    parts, _ = ndimage.label(np.asarray(mask) > 0, structure=np.ones((3, 3)))
    found = [(c.start, r.start, c.stop - c.start, r.stop - r.start) for r, c in ndimage.find_objects(parts)]
    return np.array(found, float).reshape(-1, 4)


def _entries(row: dict, cache, source: str, root: Path | str | None) -> list[tuple[str, np.ndarray]]:
    """(label, x y w h in pixels of the original) of the study's frontal image."""
    number, path = frontal_image(row)
    if source == "boxes":
        found = [(box["label"], np.asarray(box["xywh"], float)) for box in boxes_of(row) if box["image"] == number]
        geometry = cache.geometry(path)
        for label, box in found:
            _check(box, label, geometry.width, geometry.height, row["study_id"])
        return found
    if root is None:
        raise ValueError("boxes from masks need `root`, the folder of the mask files")
    masks = [mask for mask in masks_of(row) if mask["image"] == number]
    return [(mask["label"], box) for mask in masks for box in boxes_of_mask(read_gray(Path(root, mask["path"])))]


def _check(box: np.ndarray, label: str, width: int, height: int, study: str) -> None:
    what = f"study {study}: box {box.tolist()} of {label!r}"
    if not np.isfinite(box).all() or (box[2:] <= 0).any():
        raise ValueError(f"{what} is degenerate; width and height must be positive pixels")
    if (box[:2] + box[2:] <= 0).any() or box[0] >= width or box[1] >= height:
        raise ValueError(
            f"{what} lies outside its image of {width} x {height} pixels; are these pixels of another size?"
        )


def _truth(entries, labels: Sequence[str], geometry, seen: int, least_visible: float) -> tuple[Boxes, list]:
    """The clipped boxes of one image and what fell out: (label, reason)."""
    kept, classes, out = [], [], []
    for label, box in entries:
        if label not in labels:
            continue
        x, y, w, h = geometry.box_from_original(box, crop=seen)
        clipped = np.clip([x, y, x + w, y + h], 0, seen)
        share = (clipped[2:] - clipped[:2]).prod() / (w * h)
        if share < least_visible:
            out.append((label, f"box left out: {share:.0%} of it lies in the crop"))
        else:
            kept.append(clipped)
            classes.append(labels.index(label))
    return Boxes(np.array(kept, np.float32).reshape(-1, 4), np.array(classes, int)), out
