"""Images of one size and boxes in their pixels, for training and judging a detector.

Boxes come from the manifest's column `boxes`, or are the bounding boxes of the connected parts of its `masks`. The
geometry of the image cache maps them to the pixels that the detector receives, where they are clipped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from torch import nn

from gloria_core.data.annotations import read_mask
from gloria_core.data.cache import ImageCache
from gloria_core.data.geometry import Geometry
from gloria_core.models.detection import STRIDE
from gloria_core.tasks.annotated_images import (
    AnnotatedImages,
    Source,
    annotations_of,
    checked_box,
    choose_annotations,
    frontal_images,
)
from gloria_core.tasks.detection.metrics import Boxes


@dataclass(frozen=True)
class BoxData(AnnotatedImages):
    """Whole images with boxes: row i of `frame` has the boxes `truths[i]`; class k is `labels[k]`.

    Attributes:
        truths: boxes of each study, in the pixels of `images`.
    """

    truths: tuple[Boxes, ...]

    @property
    def side(self) -> int:
        """Of the images in pixels; black is added at the right and at the bottom up to a multiple of 32."""
        return -(-self.crop // STRIDE) * STRIDE

    def images(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: (n, side, side) uint8."""
        padding = self.side - self.crop
        return np.pad(super().images(rows), ((0, 0), (0, padding), (0, padding)))

    def counts(self, rows: Sequence[int]) -> np.ndarray:
        """Boxes of each class in the given studies. Shape: (K,)"""
        labels = [self.truths[row].labels for row in rows]
        return np.bincount(np.concatenate([*labels, np.zeros(0, int)]), minlength=len(self.labels))

    def positives(self) -> pd.DataFrame:
        """Whether a study has a box of a class. Shape: (n, K) bool, a column a label"""
        return pd.DataFrame([self.counts([row]) > 0 for row in range(len(self))], columns=list(self.labels))


def box_data(
    model: nn.Module,
    frame: pd.DataFrame,
    cache: ImageCache,
    *,
    labels: Sequence[str] = (),
    source: Source = "boxes",
    root: Path | str = "",
) -> BoxData:
    """Boxes of the first frontal image of every study, in the pixels that a detector receives.

    The whole cached image is used, so that no box is cut; studies without boxes are negatives, and scored.
    model: its configuration names the format of the pixels.
    labels: classes, in this order; by default all that have a box, in the order of the manifest's columns.
    source: "boxes", or "masks": a box around each connected part, corners count as connected; `root` is the folder of
        the mask files.
    Raises ValueError naming the study for a box that is degenerate or outside its image, and for no boxes at all;
    ManifestError for a mask that cannot be read.
    """
    labels = tuple(labels) or tuple(choose_annotations(frame, [source]).labels)
    images, truths = frontal_images(model, frame, cache, labels, crop=cache.size), []
    for path, study in zip(images.paths, frame.to_dict("records"), strict=True):
        geometry, corners, classes = cache.geometry(path), [], []
        for label, box in _original_boxes(study, geometry, source, Path(root)):
            if label in labels:
                x, y, w, h = geometry.box_from_original(box)
                corners.append(np.clip([x, y, x + w, y + h], 0, cache.size))
                classes.append(labels.index(label))
        truths.append(Boxes(np.array(corners, np.float32).reshape(-1, 4), np.array(classes, int)))
    if not any(map(len, truths)):
        raise ValueError(f"no box of {', '.join(labels) or 'any label'} in {len(frame)} studies (source {source!r})")
    return BoxData(**vars(images), truths=tuple(truths))


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
