"""Detection from any checkpoint: a detector on its trunk at several label fractions, scored on every test image.

The protocol is that of MGCA (Wang et al. 2022, section 4.2) and its successors: a pretrained ResNet, frozen or not, a
detector on top, 1, 10 and 100 % of the training images, mean average precision on the whole test split. The detector
is free (`DetectionConfig`); `MGCA` is the published choice. The validation split chooses the weights that are kept. Two
baselines are reported beside every detector: an empty one, and one that knows only where findings usually are.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gloria_core.models.detection import BatchNorm, Detector, FasterDetector, RetinaDetector
from gloria_core.models.yolov3 import YoloDetector
from gloria_core.tasks.detection.data import BoxData
from gloria_core.tasks.detection.metrics import PUBLISHED_SCORE, Boxes, evaluate, image_ap
from gloria_core.tasks.features import inference
from gloria_core.tasks.label_efficiency import LabelEfficiency
from gloria_core.training import supervised
from gloria_core.training.precision import autocast
from gloria_core.training.schedule import ScheduleName
from gloria_core.training.supervised import FeatureStore

DETECTORS = {"retinanet": RetinaDetector, "faster_rcnn": FasterDetector, "yolov3_mgca": YoloDetector}
_EVAL_BATCH = 64
# Training images from which the stages' means and deviations are taken, at most.
STANDARDISED_BY = 512


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(supervised.FitConfig):
    """How a detector is made and trained. Raises ValueError naming the field.

    Attributes:
        detector, frozen, batch_norm: see `models.detection` and `models.yolov3`.
        width: channels of the pyramid (not for yolov3_mgca).
        epochs, min_steps: a run has so many epochs, but at least so many steps: 1 % of the labels is two batches an
            epoch.
        validations: how often the validation split is scored, evenly spread, the last time at the end.
    """

    detector: Literal["retinanet", "faster_rcnn", "yolov3_mgca"] = "retinanet"
    batch_norm: BatchNorm = "eval"
    width: PositiveInt = 64
    epochs: PositiveFloat = 4
    min_steps: NonNegativeInt = 150
    learning_rate: PositiveFloat = 2e-3
    schedule: ScheduleName = "cosine"
    warmup: float = 0.1
    validations: PositiveInt = 2
    patience: PositiveInt = 10
    memory: NonNegativeInt = 4_000_000_000


# The released protocol (AdamW, 50 epochs, no schedule, selection by validation mAP, patience 10), for images of 224
# pixels and a ResNet-50. Its scripts lower the learning rate to 2e-4 (RSNA) and 2.5e-4 (Object-CXR) and the batch to 8
# at 1 % of the labels.
MGCA = DetectionConfig(
    detector="yolov3_mgca",
    batch_norm="train",
    epochs=50,
    min_steps=0,
    learning_rate=5e-4,
    weight_decay=1e-6,
    schedule="constant",
    warmup=0.0,
    validations=50,
)


def detector_config(detector: str, *, learning_rate: float = 0.0, **settings: object) -> DetectionConfig:
    """`MGCA` for "yolov3_mgca", else the default, with these values; a learning rate of 0 is that of the detector."""
    config = MGCA if detector == "yolov3_mgca" else DetectionConfig(detector=detector)
    return dataclasses.replace(config, learning_rate=learning_rate or config.learning_rate, **settings)


def build_detector(model: nn.Module, data: BoxData, config: DetectionConfig, *, seed: int = 0) -> Detector:
    """A new detector on a copy of the model's trunk; its new weights depend on `seed` alone."""
    options = {"frozen": config.frozen, "batch_norm": config.batch_norm, "width": config.width}
    with supervised.seeded(seed):
        made = DETECTORS[config.detector](model.image_encoder, classes=len(data.labels), side=data.side, **options)
    return made.to(model.device)


def feature_store(model: nn.Module, data: BoxData, config: DetectionConfig) -> FeatureStore | None:
    """C3, C4, C5 of a frozen trunk, for all fits that share it; None if they change in training.

    They are kept in the precision in which they are computed.
    """
    trunk = TrainedDetector(build_detector(model, data, config), data, config)

    def encode(rows: list[int]) -> list[Tensor]:
        batches = [trunk.stages(rows[first : first + _EVAL_BATCH]) for first in range(0, len(rows), _EVAL_BATCH)]
        return [torch.cat(stage) for stage in zip(*batches, strict=True)]

    return FeatureStore(encode, limit=config.memory, device=model.device) if trunk.network.stages_are_fixed else None


@dataclasses.dataclass
class TrainedDetector:
    """A detector on the images of `data`, and how it was trained.

    Attributes:
        store: features of a frozen trunk.
        train: its training rows; None where they are not those of `data`.
        history: one row a validation (step, train_loss, valid_map).
    """

    network: Detector
    data: BoxData
    config: DetectionConfig
    store: FeatureStore | None = None
    train: Sequence[int] | None = None
    history: pd.DataFrame | None = None

    def features(self, rows: Sequence[int]) -> Sequence[Tensor]:
        """C3, C4, C5 of these studies, with gradient where the trunk is trained."""
        if self.store is not None:
            return self.store(rows)
        return self.network.stages(self.data.pixels(rows).to(next(self.network.parameters()).device))

    def stages(self, rows: Sequence[int]) -> Sequence[Tensor]:
        """`features` in evaluation mode and without gradient."""
        with inference(self.network, self.config.precision):
            return self.features(rows)

    def detect(self, rows: Sequence[int]) -> list[Boxes]:
        """Detections in these studies. Everything after the trunk runs in float32: bf16 scores would tie."""
        detections = []
        for first in range(0, len(rows), _EVAL_BATCH):
            stages = self.stages(rows[first : first + _EVAL_BATCH])
            with inference(self.network, "float32"):
                boxes = self.network.detect([stage.float() for stage in stages])
            detections += [Boxes(*(b[name].cpu().numpy() for name in ("boxes", "labels", "scores"))) for b in boxes]
        return detections

    @cached_property
    def detections(self) -> dict[int, Boxes]:
        """Detections in split test, by row number. For a detector that is no longer trained."""
        test = self.data.rows("test")
        return dict(zip(test.tolist(), self.detect(test), strict=True))

    def score(self, rows: Sequence[int], **options: Any) -> pd.DataFrame:
        """Rows of `score` for these test studies."""
        found = [self.detections[row] for row in rows]
        return score(self.data, rows, found, trained_on=self.train, **options)

    def cases(self, rows: Sequence[int], each: int = 3) -> dict[str, list[tuple]]:
        """Image, truth, detections and title of the test images with the best, median and worst AP of their own."""
        truths, found = [self.data.truths[row] for row in rows], [self.detections[row] for row in rows]
        scores = image_ap(truths, found, self.data.labels)
        ap = dict(zip(rows, scores, strict=True))

        def case(row: int, _: int) -> tuple[np.ndarray, Boxes, Boxes, str]:
            title = f"{self.data.frame['study_id'][row]}, AP {ap[row]:.2f}"
            return self.data.images([row])[0], self.data.truths[row], self.detections[row], title

        return self.data.cases(rows, scores[:, None], each, case)

    def mean_ap(self, rows: Sequence[int]) -> float:
        """Mean over the classes of AP at IoU 0.40:0.75 in these studies; NaN where none has a box."""
        truths = [self.data.truths[row] for row in rows]
        table = evaluate(truths, self.detect(rows), self.data.labels, metrics=["map_40_75"], n_bootstrap=0)
        return float(table["value"].iloc[-1])


def train_detector(
    model: nn.Module,
    data: BoxData,
    train: Sequence[int],
    valid: Sequence[int],
    config: DetectionConfig,
    *,
    seed: int = 0,
    store: FeatureStore | None = None,
    progress: supervised.Progress | None = None,
) -> TrainedDetector:
    """Train on rows `train`, keep the weights of the highest validation mAP (IoU 0.40:0.75, mean over classes).

    Without a box in rows `valid` the last weights are kept. `store`: of `feature_store`, to skip the trunk.
    Raises ValueError without training rows, and where the loss is not finite.
    """
    if not len(train):
        raise ValueError("no training study; a detector needs some")
    if not data.counts(valid).any() and progress is not None:
        progress("no box in the validation split: the last weights are kept")
    detector, device, train = build_detector(model, data, config, seed=seed), model.device, np.asarray(train, int)
    trained = TrainedDetector(detector, data, config, store, train)
    some = np.random.default_rng(seed).permutation(train)[:STANDARDISED_BY]
    with inference(detector, config.precision):
        detector.standardise(trained.features(np.sort(some)))
    steps = max(math.ceil(config.epochs * math.ceil(len(train) / config.batch_size)), config.min_steps)

    def loss(rows: np.ndarray) -> Tensor:
        targets = [
            {"boxes": torch.from_numpy(t.boxes).to(device), "labels": torch.from_numpy(t.labels).to(device)}
            for t in (data.truths[row] for row in rows)
        ]
        with autocast(device, config.precision):
            losses = detector.losses(trained.features(rows), targets)
        return sum(term.float() for term in losses.values())

    with supervised.seeded(seed):
        trained.history, _ = supervised.fit(
            detector,
            data.frame["study_id"],
            supervised.shuffled_batches(train, config.batch_size, np.random.default_rng(seed)),
            loss,
            lambda: trained.mean_ap(valid),
            config,
            steps=steps,
            validate_at={round(steps * (number + 1) / config.validations) for number in range(config.validations)},
            metric="valid_map",
            progress=progress,
        )
    return trained


def label_efficiency(
    model: nn.Module,
    data: BoxData,
    protocol: LabelEfficiency,
    config: DetectionConfig,
    *,
    progress: supervised.Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], TrainedDetector]]:
    """Train on every subset of `protocol`: rows of `score` with both rules, and the detectors by (fraction, subset).

    The number of the subset also seeds the new layers' first weights and the order of the batches. A class without a
    box in the training subset is NaN, with a note, and left out of the macro. More columns: those of `LabelEfficiency`.
    """
    store, valid = feature_store(model, data, config), data.rows("valid")

    def fit(train: np.ndarray, subset: int) -> TrainedDetector:
        return train_detector(model, data, train, valid, config, seed=subset, store=store, progress=progress)

    return protocol.run(data.frame, fit, targets=data.positives(), progress=progress)


def score(
    data: BoxData,
    rows: Sequence[int],
    detections: Sequence[Boxes],
    *,
    trained_on: Sequence[int] | None = None,
    macro: Sequence[str] = (),
    n_bootstrap: int = 1000,
) -> pd.DataFrame:
    """Metric rows of the detections in studies `rows`: all metrics by our rule, and mAP by the published one.

    `trained_on`: row numbers of the training studies; classes without a box in them are not scored.
    """
    truths, groups = [data.truths[row] for row in rows], data.frame["patient_id"].iloc[rows].tolist()
    counts = data.counts(trained_on) if trained_on is not None else np.ones(len(data.labels))
    untrained = [label for label, n_boxes in zip(data.labels, counts, strict=True) if not n_boxes]
    options = {"macro": macro, "groups": groups, "untrained": untrained, "n_bootstrap": n_bootstrap}
    ours = evaluate(truths, detections, data.labels, **options)
    published = evaluate(truths, detections, data.labels, metrics=["map_40_75"], published=True, **options)
    return pd.concat([ours, published], ignore_index=True)


def baselines(data: BoxData, protocol: LabelEfficiency) -> pd.DataFrame:
    """Rows of `score` in split test of two `objective`s that look at no image: "empty" and "centre_prior".

    The prior is that of all training studies.
    """
    train, test = data.rows("train"), data.rows("test")
    guesses = {"empty": empty(len(test)), "centre_prior": centre_prior(data, train, len(test))}
    tables = [score(data, test, boxes, **protocol.options).assign(objective=name) for name, boxes in guesses.items()]
    return pd.concat(tables).assign(**protocol.columns(1.0))


def published_steps(fits: Mapping[tuple[float, int], TrainedDetector], macro: Sequence[str] = ()) -> pd.DataFrame:
    """What each step of the released evaluation does to the mean AP in split test, a row a fit.

    Detections below 0.5 are dropped, then images are skipped (see `evaluate`); the last column counts those left.
    """
    table = {}
    for key, fit in fits.items():
        found = list(fit.detections.values())
        sure = [boxes.where(boxes.scores >= PUBLISHED_SCORE) for boxes in found]
        every, dropped = (
            score(fit.data, fit.data.rows("test"), boxes, trained_on=fit.train, macro=macro, n_bootstrap=0)
            .query("target == 'macro'")
            .set_index("metric")
            for boxes in (found, sure)
        )
        table[key] = {
            "all detections": every.loc["map_40_75", "value"],
            "from 0.5 on": dropped.loc["map_40_75", "value"],
            "and images skipped": dropped.loc["map_40_75_published", "value"],
            "images left": dropped.loc["map_40_75_published", "n"],
        }
    return pd.DataFrame(table).T.rename_axis(["label_fraction", "subset"])


def empty(count: int) -> list[Boxes]:
    """Detections of a detector that finds nothing, for `count` images. Its AP is 0."""
    return [Boxes(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))] * count


def centre_prior(data: BoxData, train: Sequence[int], count: int) -> list[Boxes]:
    """The mean training box of each class in every image, scored by the share of training studies that have the class.

    The best guess without looking at the image; `train` are the training rows, `count` is the number of images.
    """
    boxes, labels, shares = [], [], []
    for k in range(len(data.labels)):
        own = [data.truths[row].boxes[data.truths[row].labels == k] for row in train]
        if sum(map(len, own)):
            boxes.append(np.concatenate(own).mean(axis=0))
            labels.append(k)
            shares.append(np.mean([len(part) > 0 for part in own]))
    return [Boxes(np.array(boxes).reshape(-1, 4), np.array(labels, int), np.array(shares, float))] * count
