"""Detection from any checkpoint: a detector on its trunk at several label fractions, scored on every test image.

The protocol is that of MGCA (Wang et al. 2022, section 4.2) and its successors: a pretrained ResNet, frozen or not, a
detector on top, 1, 10 and 100 % of the training images, mean average precision on the whole test split. The detector
is free (`Settings`); `MGCA` is the published choice. The validation split picks the state that is kept. Beside every
detector stand an empty one and one that knows nothing but where findings usually are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from torch import nn

from gloria_core.models.detectors import Detector
from gloria_core.tasks.classification import subset
from gloria_core.tasks.detection_metrics import Boxes, Rule, box_iou, evaluate, image_ap
from gloria_core.tasks.detection_training import (
    DETECTORS,
    MGCA,
    Progress,
    Settings,
    build_detector,
    detect,
    frozen_stages,
    train_detector,
)
from gloria_core.tasks.detection_truth import BoxData, box_data, boxes_of_mask

__all__ = [
    "DETECTORS",
    "MGCA",
    "BoxData",
    "Boxes",
    "Detector",
    "Result",
    "Rule",
    "Settings",
    "box_data",
    "box_iou",
    "boxes_of_mask",
    "build_detector",
    "centre_prior",
    "detect",
    "empty",
    "evaluate",
    "frozen_stages",
    "image_ap",
    "label_fractions",
    "score",
    "train_detector",
]


@dataclass(frozen=True)
class Result:
    """Metric `rows`, and by (fraction, seed) the test `detections`, the `detectors`, the `histories` of their training
    and `trained_on`, the positions of their training studies (for `score`)."""

    rows: pd.DataFrame
    detections: dict[tuple[float, int], list[Boxes]]
    detectors: dict[tuple[float, int], Detector]
    histories: dict[tuple[float, int], pd.DataFrame]
    trained_on: dict[tuple[float, int], np.ndarray]


def label_fractions(
    model: nn.Module,
    data: BoxData,
    settings: Settings = Settings(),  # noqa: B008  frozen
    *,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    seeds: Sequence[int] = (0,),
    macro: Sequence[str] = (),
    n_bootstrap: int = 1000,
    progress: Progress | None = None,
) -> Result:
    """Train at every fraction and seed, score on split `test` with both rules of `evaluate`.

    At fraction 1 every seed has the same subset: run once, under the first seed. The seed selects the subset
    (`classification.subset`), the new layers' first weights and the order of the batches; the bootstrap is the same for
    all. A class without a box in the training subset is NaN, with a note, and left out of the macro.
    More columns: label_fraction, seed, split, n_train, n_train_boxes.
    """
    stages, tables, chosen = frozen_stages(model, data, settings), [], {}
    detections, detectors, histories = {}, {}, {}
    for fraction in fractions:
        for seed in seeds if fraction < 1 else seeds[:1]:
            key = float(fraction), int(seed)
            rows = chosen[key] = subset(data.frame, fraction, seed).index.to_numpy()
            detectors[key], histories[key] = train_detector(
                model, data, rows, data.rows("valid"), settings, seed=seed, stages=stages, progress=progress
            )
            detections[key] = detect(
                detectors[key], model, data, data.rows("test"), stages=stages, precision=settings.precision
            )
            table = score(data, detections[key], trained_on=rows, macro=macro, n_bootstrap=n_bootstrap)
            about = {"label_fraction": fraction, "seed": seed, "n_train": len(rows)}
            tables.append(table.assign(**about, n_train_boxes=int(data.counts(rows).sum())))
    return Result(pd.concat(tables, ignore_index=True), detections, detectors, histories, chosen)


def score(
    data: BoxData,
    found: Sequence[Boxes],
    *,
    trained_on: Sequence[int] | None = None,
    split: str = "test",
    without: np.ndarray | None = None,
    macro: Sequence[str] = (),
    n_bootstrap: int = 1000,
) -> pd.DataFrame:
    """Metric rows of a split's detections: all metrics by our rule, mAP as published too; patients resampled whole.

    `trained_on`: positions of the training studies; classes without a box in them are not scored. `without`: a mask of
    the split's studies that are not judged this time, such as those of a source that gives the label away.
    """
    rows = data.rows(split)
    if len(found) != len(rows):
        raise ValueError(f"detections of {len(found)} images for {len(rows)} studies of split {split!r}")
    if without is not None:
        kept = np.flatnonzero(~np.asarray(without, bool))
        rows, found = rows[kept], [found[i] for i in kept]
    truths, groups = [data.truths[row] for row in rows], data.frame["patient_id"].iloc[rows].tolist()
    counts = data.counts(trained_on) if trained_on is not None else np.ones(len(data.labels))
    untrained = [label for label, count in zip(data.labels, counts, strict=True) if not count]
    shared = {"macro": macro, "groups": groups, "untrained": untrained, "n_bootstrap": n_bootstrap}
    ours = evaluate(truths, found, data.labels, **shared)
    published = evaluate(truths, found, data.labels, metrics=["map_40_75"], rule="published", **shared)
    return pd.concat([ours, published], ignore_index=True).assign(split=split)


def empty(count: int) -> list[Boxes]:
    """Detections of a detector that finds nothing, for `count` images. Its AP is 0."""
    return [Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0)) for _ in range(count)]


def centre_prior(data: BoxData, rows: Sequence[int], count: int) -> list[Boxes]:
    """The mean training box of each class in every image, scored by the share of training studies that have the class.

    What can be had without looking at the image; `rows` are the training studies, `count` the images to "detect" in.
    """
    boxes, labels, shares = [], [], []
    for k in range(len(data.labels)):
        own = [data.truths[row].boxes[data.truths[row].labels == k] for row in rows]
        if sum(map(len, own)):
            boxes.append(np.concatenate(own).mean(axis=0))
            labels.append(k)
            shares.append(np.mean([len(part) > 0 for part in own]))
    prior = Boxes(np.array(boxes).reshape(-1, 4), np.array(labels, int), np.array(shares, float))
    return [prior] * count
