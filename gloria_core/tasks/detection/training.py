"""Detection from any checkpoint: a detector on its trunk at several label fractions, scored on every test image.

The protocol is that of MGCA (Wang et al. 2022, section 4.2) and its successors: a pretrained ResNet, frozen or not, a
detector on top, 1, 10 and 100 % of the training images, mean average precision on the whole test split. The detector
is free (`Settings`); `MGCA` is the published choice. The validation split picks the state that is kept. Beside every
detector stand an empty one and one that knows nothing but where findings usually are.

Training a detector on a pretrained trunk, and running it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gloria_core.data.images import to_tensor
from gloria_core.data.splits import label_subset
from gloria_core.models.detection import BatchNorm, Detector, FasterDetector, RetinaDetector
from gloria_core.models.yolov3 import YoloDetector
from gloria_core.tasks.detection.data import BoxData
from gloria_core.tasks.detection.metrics import Boxes, evaluate
from gloria_core.tasks.features import inference
from gloria_core.training.precision import Precision, choose_precision

DETECTORS = ("retinanet", "faster_rcnn", "yolov3_mgca")
STANDARDISED_BY = 512
"""Training images from which the stages' means and deviations are taken, at most."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a detector is made and trained.

    width: channels of the pyramid (not for yolov3_mgca). A run has `epochs` epochs, but at least `least_steps` steps:
    1 % of the labels is two batches an epoch. `checks`: how often the validation split is scored, evenly spread, the
    last time at the end; the best state is kept, and `patience` checks without a better one end the run.
    schedule: "cosine" warms up over the first tenth and falls to zero; "constant".
    stage_bytes: a frozen trunk's stages are kept if they take no more memory than this.
    """

    detector: Literal["retinanet", "faster_rcnn", "yolov3_mgca"] = "retinanet"
    frozen: bool = True
    batch_norm: BatchNorm = "eval"
    width: int = 64
    epochs: float = 4
    least_steps: int = 150
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    checks: int = 2
    patience: int = 10
    precision: Precision = "auto"
    stage_bytes: int = 4_000_000_000

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"unknown detector {self.detector!r}; available: {', '.join(DETECTORS)}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule must be 'cosine' or 'constant', not {self.schedule!r}")
        if min(self.batch_size, self.checks, self.patience) < 1 or self.epochs <= 0 or self.least_steps < 0:
            raise ValueError(
                "batch_size, checks and patience must be at least 1, epochs above 0, least_steps 0 or more"
            )


MGCA = Settings(
    detector="yolov3_mgca",
    batch_norm="train",
    epochs=50,
    least_steps=0,
    learning_rate=5e-4,
    weight_decay=1e-6,
    schedule="constant",
    checks=50,
)
"""The released protocol (AdamW, 50 epochs, no schedule, selection by validation mAP, patience 10), for images of 224
pixels and a ResNet-50. Its scripts lower the learning rate to 2e-4 (RSNA) and 2.5e-4 (Object-CXR) and the batch to 8
at 1 % of the labels."""


def build_detector(model: nn.Module, data: BoxData, settings: Settings, *, seed: int = 0) -> Detector:
    """A new detector on a copy of the model's trunk; what is new in it depends on `seed` alone."""
    makers = {"retinanet": RetinaDetector, "faster_rcnn": FasterDetector, "yolov3_mgca": YoloDetector}
    given = {"side": data.side, "frozen": settings.frozen, "batch_norm": settings.batch_norm}
    if settings.detector != "yolov3_mgca":
        given["width"] = settings.width
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return makers[settings.detector](model.image_encoder, classes=len(data.labels), **given).to(model.device)


def frozen_stages(model: nn.Module, data: BoxData, settings: Settings, *, batch_size: int = 64) -> list[Tensor] | None:
    """C3, C4, C5 of all images, computed once, on the CPU; None if they change in training or take too much memory.

    Kept in the precision that they were computed in. Shape: (n, C_i, h_i, w_i) each
    """
    detector = build_detector(model, data, settings)
    if not detector.keeps_stages:
        return None
    kept: list[Tensor] = []
    for first in range(0, len(data), batch_size):
        rows = np.arange(first, min(first + batch_size, len(data)))
        with inference(detector, settings.precision) as where:
            found = detector.stages(_pixels(model, data, rows, where))
        if not kept:
            size = sum(stage[0].numel() * stage.element_size() for stage in found) * len(data)
            if size > settings.stage_bytes:
                return None
            kept = [torch.empty(len(data), *stage.shape[1:], dtype=stage.dtype) for stage in found]
        for whole, stage in zip(kept, found, strict=True):
            whole[rows] = stage.cpu()
    return kept


def train_detector(
    model: nn.Module,
    data: BoxData,
    rows: Sequence[int],
    valid: Sequence[int],
    settings: Settings,
    *,
    seed: int = 0,
    stages: list[Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Detector, pd.DataFrame]:
    """Train on the studies `rows`, keep the state with the highest validation mAP (IoU 0.40:0.75, mean over classes).

    `stages`: of `frozen_stages`, to skip the trunk. Returns the detector in eval mode, and one row a check: step,
    train_loss (mean since the last), valid_map. Raises ValueError without rows, and where the loss is not finite.
    """
    if not len(rows) or not len(valid):
        raise ValueError(f"{len(rows)} training and {len(valid)} validation studies; a detector needs both")
    detector = build_detector(model, data, settings, seed=seed)
    with inference(detector, settings.precision) as where:
        some = np.random.default_rng(seed).permutation(np.asarray(rows))[:STANDARDISED_BY]
        detector.standardise(_stages(detector, model, data, np.sort(some), stages, where))
    learning = [p for p in detector.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = max(math.ceil(settings.epochs * math.ceil(len(rows) / settings.batch_size)), settings.least_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, steps, settings.schedule))
    half = choose_precision(model.device, settings.precision) == "float16"
    scaler = torch.amp.GradScaler(model.device.type, enabled=half)
    checks = {round(steps * (c + 1) / settings.checks) for c in range(settings.checks)}
    batches, history, losses = _batches(rows, settings.batch_size, seed), [], []
    best, state, waited = -1.0, None, 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(1, steps + 1):
            losses.append(_step(detector, model, data, next(batches), stages, settings.precision, optimiser, scaler))
            schedule.step()
            if step not in checks:
                continue
            reached = _validation_map(detector, model, data, valid, stages, settings.precision)
            history.append({"step": step, "train_loss": float(np.mean(losses)), "valid_map": reached})
            losses, waited = [], waited + 1
            if progress is not None:
                progress(f"step {step} of {steps}: loss {history[-1]['train_loss']:.3f}, validation mAP {reached:.3f}")
            if not reached <= best:  # NaN, a validation split without boxes, keeps the last state
                best, state, waited = reached, copy.deepcopy(detector.state_dict()), 0
            if waited >= settings.patience:
                break
    detector.load_state_dict(state)
    return detector.eval(), pd.DataFrame(history)


def detect(
    detector: Detector,
    model: nn.Module,
    data: BoxData,
    rows: Sequence[int],
    *,
    stages: list[Tensor] | None = None,
    precision: Precision = "auto",
    batch_size: int = 64,
) -> list[Boxes]:
    """Detections of the given studies. What comes behind the trunk runs in float32: bf16 scores would tie."""
    found = []
    for first in range(0, len(rows), batch_size):
        batch = np.asarray(rows[first : first + batch_size])
        with inference(detector, precision) as where:
            here = _stages(detector, model, data, batch, stages, where)
        with inference(detector, "float32"):
            boxes = detector.detect([stage.float() for stage in here])
        found += [Boxes(*(b[name].cpu().numpy() for name in ("boxes", "labels", "scores"))) for b in boxes]
    return found


def _pixels(model: nn.Module, data: BoxData, rows: np.ndarray, where: torch.device) -> Tensor:
    return to_tensor(data.images(rows), channels=model.config.channels, norm=model.config.norm).to(where)


def _stages(detector, model, data: BoxData, rows: np.ndarray, stages, where: torch.device) -> list[Tensor]:
    if stages is None:
        return detector.stages(_pixels(model, data, rows, where))
    return [stage[rows].to(where) for stage in stages]


def _step(detector, model, data, rows, stages, precision, optimiser, scaler) -> float:
    """One step of the optimiser on the studies `rows`; the loss before it."""
    detector.train()
    where = next(detector.parameters()).device
    dtype = _DTYPES.get(choose_precision(where, precision))
    truths = [data.truths[row] for row in rows]
    targets = [
        {"boxes": torch.from_numpy(t.boxes).to(where), "labels": torch.from_numpy(t.labels).to(where)} for t in truths
    ]
    with torch.autocast(where.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        losses = detector.losses(_stages(detector, model, data, rows, stages, where), targets)
    total = sum(term.float() for term in losses.values())
    if not torch.isfinite(total):
        studies = ", ".join(data.frame["study_id"].iloc[rows])
        terms = ", ".join(f"{name} {term.item():.3g}" for name, term in losses.items())
        raise ValueError(f"the loss is not finite ({terms}) on studies {studies}; lower the learning rate")
    optimiser.zero_grad(set_to_none=True)
    scaler.scale(total).backward()
    scaler.step(optimiser)
    scaler.update()
    return total.item()


def _batches(rows: Sequence[int], size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless: one shuffled epoch after another, each cut into batches; the last of an epoch may be smaller."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(np.asarray(rows))
        yield from (order[first : first + size] for first in range(0, len(order), size))


def _share(step: int, steps: int, schedule: str) -> float:
    """Learning rate at a step as a share of the highest."""
    warm = max(1, steps // 10)
    if schedule == "constant":
        return 1.0
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _validation_map(detector, model, data: BoxData, valid, stages, precision: Precision) -> float:
    found = detect(detector, model, data, valid, stages=stages, precision=precision)
    truths = [data.truths[row] for row in valid]
    rows = evaluate(truths, found, data.labels, metrics=["map_40_75"], n_bootstrap=0)
    return float(rows["value"].iloc[-1])


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
    settings: Settings = Settings(),
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
            rows = chosen[key] = label_subset(data.frame, fraction, seed).index.to_numpy()
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
