"""Detection from any checkpoint: a detector on its trunk at several label fractions, scored on every test image.

The protocol is that of MGCA (Wang et al. 2022, section 4.2) and its successors: a pretrained ResNet, frozen or not, a
detector on top, 1, 10 and 100 % of the training images, mean average precision on the whole test split. The detector
is free (`DetectionConfig`); `MGCA` is the published choice. The validation split chooses the weights that are kept. Two
baselines are reported beside every detector: an empty one, and one that knows only where findings usually are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gloria_core.data.images import to_tensor
from gloria_core.models.detection import BatchNorm, Detector, FasterDetector, RetinaDetector
from gloria_core.models.yolov3 import YoloDetector
from gloria_core.tasks.annotated_images import best_median_worst
from gloria_core.tasks.detection.data import BoxData
from gloria_core.tasks.detection.metrics import PUBLISHED_SCORE, Boxes, evaluate, image_ap
from gloria_core.tasks.features import inference
from gloria_core.tasks.label_efficiency import LabelEfficiency, Score
from gloria_core.training import supervised
from gloria_core.training.precision import Precision, autocast
from gloria_core.training.schedule import ScheduleName
from gloria_core.training.supervised import FeatureStore

_DETECTORS = {"retinanet": RetinaDetector, "faster_rcnn": FasterDetector, "yolov3_mgca": YoloDetector}
_EVAL_BATCH = 64
STANDARDISED_BY = 512
"""Training images from which the stages' means and deviations are taken, at most."""


@dataclass(frozen=True)
class DetectionConfig:
    """How a detector is made and trained. Raises ValueError naming the field.

    width: channels of the pyramid (not for yolov3_mgca). A run has `epochs` epochs, but at least `min_steps` steps:
    1 % of the labels is two batches an epoch. `validations`: how often the validation split is scored, evenly spread,
    the last time at the end; `patience` scores in a row without a better one end the training.
    schedule: "cosine" warms up over the first tenth and falls to zero; "constant".
    memory: bytes that the features of a frozen trunk may take.
    """

    detector: Literal["retinanet", "faster_rcnn", "yolov3_mgca"] = "retinanet"
    frozen: bool = True
    batch_norm: BatchNorm = "eval"
    width: PositiveInt = 64
    epochs: PositiveFloat = 4
    min_steps: NonNegativeInt = 150
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 1e-4
    schedule: ScheduleName = "cosine"
    validations: PositiveInt = 2
    patience: PositiveInt = 10
    precision: Precision = "auto"
    memory: NonNegativeInt = 4_000_000_000


MGCA = DetectionConfig(
    detector="yolov3_mgca",
    batch_norm="train",
    epochs=50,
    min_steps=0,
    learning_rate=5e-4,
    weight_decay=1e-6,
    schedule="constant",
    validations=50,
)
"""The released protocol (AdamW, 50 epochs, no schedule, selection by validation mAP, patience 10), for images of 224
pixels and a ResNet-50. Its scripts lower the learning rate to 2e-4 (RSNA) and 2.5e-4 (Object-CXR) and the batch to 8
at 1 % of the labels."""


def detector_config(
    detector: str, *, frozen: bool, epochs: float, min_steps: int, learning_rate: float = 0.0, width: int = 64
) -> DetectionConfig:
    """`MGCA` for "yolov3_mgca", else the default, with these values; a learning rate of 0 is that of the detector."""
    config = MGCA if detector == "yolov3_mgca" else DetectionConfig(detector)
    rate = learning_rate or config.learning_rate
    return dataclasses.replace(
        config, frozen=frozen, epochs=epochs, min_steps=min_steps, learning_rate=rate, width=width
    )


def build_detector(model: nn.Module, data: BoxData, config: DetectionConfig, *, seed: int = 0) -> Detector:
    """A new detector on a copy of the model's trunk; its new weights depend on `seed` alone."""
    options = {"side": data.side, "frozen": config.frozen, "batch_norm": config.batch_norm}
    if config.detector != "yolov3_mgca":
        options["width"] = config.width
    with supervised.seeded(seed):
        detector = _DETECTORS[config.detector](model.image_encoder, classes=len(data.labels), **options)
    return detector.to(model.device)


def feature_store(model: nn.Module, data: BoxData, config: DetectionConfig) -> FeatureStore | None:
    """C3, C4, C5 of a frozen trunk, for all fits that share it; None if they change in training.

    They are kept in the precision in which they are computed.
    """
    trunk = TrainedDetector(build_detector(model, data, config), model, data, config)

    def encode(rows: list[int]) -> list[Tensor]:
        batches = [trunk.stages(rows[first : first + _EVAL_BATCH]) for first in range(0, len(rows), _EVAL_BATCH)]
        return [torch.cat(stage) for stage in zip(*batches, strict=True)]

    return FeatureStore(encode, limit=config.memory, device=model.device) if trunk.detector.stages_are_fixed else None


@dataclasses.dataclass
class TrainedDetector:
    """A detector on the images of `data`, and how it was trained.

    `store`: features of a frozen trunk. `history`: one row a validation (step, train_loss, valid_map). `train`: its
    training rows. `detections`: those in split `test`, filled in by `label_efficiency`.
    """

    detector: Detector
    model: nn.Module
    data: BoxData
    config: DetectionConfig
    store: FeatureStore | None = None
    history: pd.DataFrame | None = None
    train: np.ndarray | None = None
    detections: list[Boxes] | None = None

    def features(self, rows: Sequence[int]) -> Sequence[Tensor]:
        """C3, C4, C5 of these studies, with gradient where the trunk is trained."""
        if self.store is not None:
            return self.store(rows)
        image = self.model.config
        pixels = to_tensor(self.data.images(rows), channels=image.channels, norm=image.norm)
        return self.detector.stages(pixels.to(self.model.device))

    def stages(self, rows: Sequence[int]) -> Sequence[Tensor]:
        """`features` in evaluation mode and without gradient."""
        with inference(self.detector, self.config.precision):
            return self.features(rows)

    def detect(self, rows: Sequence[int]) -> list[Boxes]:
        """Detections in these studies. Everything after the trunk runs in float32: bf16 scores would tie."""
        detections = []
        for first in range(0, len(rows), _EVAL_BATCH):
            stages = self.stages(rows[first : first + _EVAL_BATCH])
            with inference(self.detector, "float32"):
                boxes = self.detector.detect([stage.float() for stage in stages])
            detections += [Boxes(*(b[name].cpu().numpy() for name in ("boxes", "labels", "scores"))) for b in boxes]
        return detections

    def cases(
        self, rows: Sequence[int], each: int = 3
    ) -> tuple[np.ndarray, list[Boxes], list[Boxes], tuple[str, ...], list[str]]:
        """Images, truths, detections, labels and titles of `rows` with the best, median and worst AP of their own."""
        truths, detections = [self.data.truths[row] for row in rows], self.detect(rows)
        scores, ids = image_ap(truths, detections), self.data.frame["study_id"].iloc[rows].tolist()
        chosen = [(name, i) for name, part in best_median_worst(scores, each).items() for i in part]
        images = self.data.images([rows[i] for _, i in chosen])
        titles = [f"{name}: {ids[i]}, AP {scores[i]:.2f}" for name, i in chosen]
        truths, detections = ([boxes[i] for _, i in chosen] for boxes in (truths, detections))
        return images, truths, detections, self.data.labels, titles

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
    trained = TrainedDetector(detector, model, data, config, store, train=train)
    some = np.random.default_rng(seed).permutation(train)[:STANDARDISED_BY]
    with inference(detector, config.precision):
        detector.standardise(trained.features(np.sort(some)))
    parameters = [parameter for parameter in detector.parameters() if parameter.requires_grad]
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
            torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay),
            steps=steps,
            validate_at={round(steps * (number + 1) / config.validations) for number in range(config.validations)},
            patience=config.patience,
            metric="valid_map",
            schedule=config.schedule,
            warmup_steps=max(1, steps // 10) if config.schedule == "cosine" else 0,
            precision=config.precision,
            progress=progress,
        )
    return trained


def label_efficiency(
    model: nn.Module,
    data: BoxData,
    protocol: LabelEfficiency,
    config: DetectionConfig | None = None,
    *,
    progress: supervised.Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], TrainedDetector]]:
    """Train on every subset of `protocol`: rows of `score` with both rules, and the detectors by (fraction, subset).

    The number of the subset also seeds the new layers' first weights and the order of the batches. A class without a
    box in the training subset is NaN, with a note, and left out of the macro. More columns: those of `LabelEfficiency`,
    and n_train_boxes.
    """
    config = config or DetectionConfig()
    store, valid, test = feature_store(model, data, config), data.rows("valid"), data.rows("test")

    def fit(train: np.ndarray, subset: int) -> tuple[TrainedDetector, Score]:
        trained = train_detector(model, data, train, valid, config, seed=subset, store=store, progress=progress)
        trained.detections = trained.detect(test)
        by_row = dict(zip(test, trained.detections, strict=True))
        options = {"trained_on": train, "macro": protocol.macro, "n_bootstrap": protocol.n_bootstrap}

        def score_rows(rows: np.ndarray) -> pd.DataFrame:
            table = score(data, rows, [by_row[row] for row in rows], **options)
            return table.assign(n_train_boxes=int(data.counts(train).sum()))

        return trained, score_rows

    return protocol.run(data.frame, fit, progress)


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
    published = evaluate(truths, detections, data.labels, metrics=["map_40_75"], rule="published", **options)
    return pd.concat([ours, published], ignore_index=True)


def baselines(data: BoxData, protocol: LabelEfficiency) -> pd.DataFrame:
    """Rows of `score` in split test of two `objective`s that look at no image: "empty" and "centre_prior".

    The prior is that of all training studies.
    """
    train, test = data.rows("train"), data.rows("test")
    guesses = {"empty": empty(len(test)), "centre_prior": centre_prior(data, train, len(test))}
    options = {"macro": protocol.macro, "n_bootstrap": protocol.n_bootstrap}
    rows = pd.concat([score(data, test, boxes, **options).assign(objective=name) for name, boxes in guesses.items()])
    return rows.assign(label_fraction=1.0, seed=protocol.subsets * protocol.seed, split="test")


def published_steps(fits: Mapping[tuple[float, int], TrainedDetector], macro: Sequence[str] = ()) -> pd.DataFrame:
    """What each step of the released evaluation does to the mean AP in split test, a row a fit.

    Detections below 0.5 are dropped, then images are skipped (see `evaluate`); the last column counts those left.
    """
    table = {}
    for key, fit in fits.items():
        test, metric = fit.data.rows("test"), ["map_40_75", "map_40_75_published"]
        sure = [boxes.where(boxes.scores >= PUBLISHED_SCORE) for boxes in fit.detections]
        every, dropped = (
            score(fit.data, test, boxes, trained_on=fit.train, macro=macro, n_bootstrap=0)
            .query("target == 'macro'")
            .set_index("metric")
            .loc[metric]
            for boxes in (fit.detections, sure)
        )
        values = [every["value"].iloc[0], *dropped["value"], dropped["n"].iloc[1]]
        names = ["all detections", "from 0.5 on", "and images skipped", "images left"]
        table[key] = dict(zip(names, values, strict=True))
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
