"""Images of one size and boxes in their pixels, for training and judging a detector.

Boxes come from the manifest's column `boxes`, or are the bounding boxes of the connected parts of its `masks`. The
geometry of the image cache maps them to the pixels that the detector receives, where they are clipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import ndimage

from gloria_core.data.annotations import read_mask
from gloria_core.data.cache import ImageCache
from gloria_core.data.geometry import Geometry
from gloria_core.models.detection import STRIDE
from gloria_core.tasks.annotated_images import AnnotatedImages, Source, annotations_of, checked_box, choose_annotations
from gloria_core.tasks.detection.metrics import Boxes
from gloria_core.tasks.features import frontal_image

Unboxed = Literal["negative", "exclude"]


@dataclass(frozen=True)
class BoxData(AnnotatedImages):
    """Studies with boxes: row i of `frame` has the boxes `truths[i]`; class k is `labels[k]`.

    `side`: of the images in pixels, with black added at the right and at the bottom of the crop up to a multiple of 32.
    `excluded`: boxes and studies that are not used, with the reason.
    """

    truths: tuple[Boxes, ...]
    excluded: pd.DataFrame

    @property
    def side(self) -> int:
        return -(-self.crop // STRIDE) * STRIDE

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: (n, side, side) uint8."""
        padding = self.side - self.crop
        return np.pad(super().images(rows), ((0, 0), (0, padding), (0, padding)))

    def counts(self, rows: Sequence[int]) -> np.ndarray:
        """Boxes of each class in the given studies. Shape: (K,)"""
        labels = [self.truths[row].labels for row in rows]
        return np.bincount(np.concatenate([*labels, np.zeros(0, int)]), minlength=len(self.labels))


def box_data(
    frame: pd.DataFrame,
    cache: ImageCache,
    *,
    labels: Sequence[str] = (),
    crop: int | None = None,
    source: Source = "boxes",
    root: Path | str = "",
    min_visibility: float = 0.25,
    unboxed: Unboxed = "negative",
) -> BoxData:
    """Boxes of the first frontal image of every study, in the pixels that a detector receives.

    labels: classes, in this order; by default all that have a box, in the order of the manifest's columns.
    crop: side of the centre crop of the cached image; the whole image by default, so that no box is cut.
    source: "boxes", or "masks": a box around each connected part, corners count as connected; `root` is the folder of
        the mask files.
    min_visibility: a box with less than this share of its area in the crop is left out and listed in `excluded`; of
        one with more, the visible part counts.
    unboxed: studies without boxes are negatives, and scored. Where one of `labels` is 1 and has no box (NIH has boxes
        of 984 images only), "exclude" leaves the study out and lists it, since detections in it cannot be judged.
    Raises ValueError naming the study for a box that is degenerate or outside its image, and for no boxes at all;
    ManifestError for a mask that cannot be read.
    """
    if unboxed not in ("negative", "exclude"):
        raise ValueError(f"unboxed must be negative or exclude, not {unboxed!r}")
    crop = cache.size if crop is None else crop
    frame = frame.reset_index(drop=True)
    labels = tuple(labels) or tuple(choose_annotations(frame, [source]).labels)
    truths, excluded, kept, paths = [], [], [], []
    for row, study in enumerate(frame.to_dict("records")):
        path = frontal_image(study)[1]
        geometry, boxed, clipped, classes = cache.geometry(path), set(), [], []
        for label, box in _original_boxes(study, geometry, source, Path(root)):
            if label not in labels:
                continue
            x, y, w, h = geometry.box_from_original(box, crop=crop)
            corners = np.clip([x, y, x + w, y + h], 0, crop)
            visible = (corners[2:] - corners[:2]).prod() / (w * h)
            boxed.add(label)
            if visible < min_visibility:
                excluded.append((study["study_id"], label, f"box left out: {visible:.0%} of it lies in the crop"))
                continue
            clipped.append(corners)
            classes.append(labels.index(label))
        bare = [label for label in labels if study.get(label) == 1 and label not in boxed]
        if bare and unboxed == "exclude":
            reason = "study left out: the label is 1 and there is no box"
            excluded.append((study["study_id"], ", ".join(bare), reason))
            continue
        truths.append(Boxes(np.array(clipped, np.float32).reshape(-1, 4), np.array(classes, int)))
        kept.append(row)
        paths.append(path)
    if not any(map(len, truths)) and not excluded:
        raise ValueError(f"no box of {', '.join(labels) or 'any label'} in {len(frame)} studies (source {source!r})")
    excluded = pd.DataFrame(excluded, columns=["study_id", "label", "reason"])
    kept = frame.iloc[kept].reset_index(drop=True)
    return BoxData(kept, labels, tuple(paths), cache, crop, tuple(truths), excluded)


def boxes_of_mask(mask: np.ndarray) -> np.ndarray:
    """A box around each connected part of a mask (corners connect). Shape: (H, W) -> (n, 4) x, y, width, height."""
    parts, _ = ndimage.label(np.asarray(mask) > 0, structure=np.ones((3, 3)))
    boxes = [(c.start, r.start, c.stop - c.start, r.stop - r.start) for r, c in ndimage.find_objects(parts)]
    return np.array(boxes, float).reshape(-1, 4)


def _original_boxes(study: dict, geometry: Geometry, source: Source, root: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(label, x y w h in pixels of the image file) of the study's frontal image."""
    for entry in annotations_of(study, source):
        if source == "boxes":
            yield entry["label"], checked_box(study, entry, geometry)
        else:
            shape, where = (geometry.height, geometry.width), f"study {study['study_id']}"
            for box in boxes_of_mask(read_mask(root, entry["path"], shape=shape, where=where)):
                yield entry["label"], box
