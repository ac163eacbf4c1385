"""Images of one size and boxes in their pixels, for training and judging a detector.

Boxes come from the manifest's column `boxes`, or are the bounding boxes of the connected parts of its `masks`. The
geometry of the image cache maps them to the pixels that the detector receives, where they are clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

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

    `crop`: side of the centre crop of the cached image in pixels; `side`: with black added at the right and at the
    bottom up to a multiple of 32. `excluded`: boxes and studies that are not used, with the reason.
    """

    frame: pd.DataFrame
    labels: tuple[str, ...]
    paths: tuple[str, ...]
    truths: tuple[Boxes, ...]
    cache: object
    crop: int
    excluded: pd.DataFrame

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def side(self) -> int:
        return -(-self.crop // STRIDE) * STRIDE

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split. Raises ValueError where it is empty."""
        rows = np.flatnonzero(self.frame["split"] == split)
        if not len(rows):
            raise ValueError(f"no study in split {split!r}; detection needs train, valid and test")
        return rows

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: (n, side, side) uint8."""
        images = center_crop(self.cache.rows([self.paths[row] for row in rows]), self.crop)
        padding = self.side - self.crop
        return np.pad(images, ((0, 0), (0, padding), (0, padding)))

    def counts(self, rows: Sequence[int]) -> np.ndarray:
        """Boxes of each class in the given studies. Shape: (K,)"""
        labels = [self.truths[row].labels for row in rows]
        return np.bincount(np.concatenate([*labels, np.zeros(0, int)]), minlength=len(self.labels))


def box_data(
    frame: pd.DataFrame,
    cache,
    *,
    labels: Sequence[str] = (),
    crop: int | None = None,
    source: Source = "auto",
    root: Path | str | None = None,
    min_visibility: float = 0.25,
    unboxed: Unboxed = "negative",
) -> BoxData:
    """Boxes of the first frontal image of every study, in the pixels that a detector receives.

    labels: classes, in this order; by default all that have a box, in the order of the manifest's columns.
    crop: side of the centre crop of the cached image; the whole image by default, so that no box is cut.
    source: "boxes", "masks" (a box around each connected part, corners count as connected; `root` is the folder of the
        mask files), or "auto": boxes if the manifest has any, else masks.
    min_visibility: a box with less than this share of its area in the crop is left out and listed in `excluded`; of
        one with more, the visible part counts.
    unboxed: studies without boxes are negatives, and scored. Where one of `labels` is 1 and has no box (NIH has boxes
        of 984 images only), "exclude" leaves the study out and lists it, since detections in it cannot be judged.
    Raises ValueError, naming the study, for a box that is degenerate or outside its image, and for no boxes at all.
    """
    if source not in get_args(Source) or unboxed not in get_args(Unboxed):
        raise ValueError(f"source {source!r} must be auto, boxes or masks; unboxed {unboxed!r} negative or exclude")
    if source == "auto":
        source = "boxes" if (frame["boxes"] != "").any() else "masks"
    crop = cache.size if crop is None else crop
    frame = frame.reset_index(drop=True)
    studies = frame.to_dict("records")
    paths = [frontal_image(study)[1] for study in studies]
    boxes = [_original_boxes(study, cache, source, root) for study in studies]
    boxed = {label for of_study in boxes for label, _ in of_study}
    labels = tuple(labels) or tuple(name for name in label_columns(frame) if name in boxed)
    if not boxed & set(labels):
        raise ValueError(f"no box of {', '.join(labels) or 'any label'} in {len(frame)} studies (source {source!r})")
    truths, excluded, kept = [], [], []
    for row, (study, path, of_study) in enumerate(zip(studies, paths, boxes, strict=True)):
        clipped, classes = [], []
        for label, box in of_study:
            if label not in labels:
                continue
            x, y, w, h = cache.geometry(path).box_from_original(box, crop=crop)
            corners = np.clip([x, y, x + w, y + h], 0, crop)
            visible = (corners[2:] - corners[:2]).prod() / (w * h)
            if visible < min_visibility:
                excluded.append((study["study_id"], label, f"box left out: {visible:.0%} of it lies in the crop"))
            else:
                clipped.append(corners)
                classes.append(labels.index(label))
        truths.append(Boxes(np.array(clipped, np.float32).reshape(-1, 4), np.array(classes, int)))
        bare = [label for label in labels if study.get(label) == 1 and label not in {name for name, _ in of_study}]
        if bare and unboxed == "exclude":
            reason = "study left out: the label is 1 and there is no box"
            excluded.append((study["study_id"], ", ".join(bare), reason))
        else:
            kept.append(row)
    return BoxData(
        frame.iloc[kept].reset_index(drop=True),
        labels,
        tuple(paths[row] for row in kept),
        tuple(truths[row] for row in kept),
        cache,
        crop,
        pd.DataFrame(excluded, columns=["study_id", "label", "reason"]),
    )


def boxes_of_mask(mask: np.ndarray) -> np.ndarray:
    """A box around each connected part of a mask (corners connect). Shape: (H, W) -> (n, 4) x, y, width, height."""
    parts, _ = ndimage.label(np.asarray(mask) > 0, structure=np.ones((3, 3)))
    boxes = [(c.start, r.start, c.stop - c.start, r.stop - r.start) for r, c in ndimage.find_objects(parts)]
    return np.array(boxes, float).reshape(-1, 4)


def _original_boxes(study: dict, cache, source: str, root: Path | str | None) -> list[tuple[str, np.ndarray]]:
    """(label, x y w h in pixels of the image file) of the study's frontal image."""
    number, path = frontal_image(study)
    if source == "masks":
        if root is None:
            raise ValueError("boxes from masks need `root`, the folder of the mask files")
        masks = [mask for mask in masks_of(study) if mask["image"] == number]
        return [(mask["label"], box) for mask in masks for box in boxes_of_mask(read_gray(Path(root, mask["path"])))]
    boxes = [(box["label"], np.asarray(box["xywh"], float)) for box in boxes_of(study) if box["image"] == number]
    width, height = cache.geometry(path).width, cache.geometry(path).height
    for label, box in boxes:
        where = f"study {study['study_id']}: box {box.tolist()} of {label!r}"
        if not np.isfinite(box).all() or (box[2:] <= 0).any():
            raise ValueError(f"{where} is degenerate; width and height must be positive pixels")
        if (box[:2] + box[2:] <= 0).any() or box[0] >= width or box[1] >= height:
            raise ValueError(
                f"{where} lies outside its image of {width} x {height} pixels; are these pixels of another size?"
            )
    return boxes
