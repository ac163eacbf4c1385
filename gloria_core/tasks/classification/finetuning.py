"""Fine-tuning: a classification head on the image encoder, trained with it or on top of it frozen.

The protocol of the papers (GLoRIA, Huang et al. 2021, section 4.3; MGCA, Wang et al. 2022, appendix), with what they
leave open made explicit: unknown targets take no part in the loss, early stopping uses the validation loss, and the
test split is scored once, with the weights of the best epoch.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.data.images import to_tensor
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.tasks.annotated_images import AnnotatedImages
from gloria_core.tasks.features import inference
from gloria_core.tasks.label_efficiency import LabelEfficiency
from gloria_core.tasks.metrics import Metric, metric_rows
from gloria_core.training import supervised
from gloria_core.training.precision import autocast

MAX_POSITIVE_WEIGHT = 20.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(supervised.FitConfig):
    """Settings of `finetune`. Raises ValueError naming the field.

    Attributes:
        epochs: at most.
        layer_decay: the learning rate falls by this factor from each layer group of the encoder to the one below
            (1: none); the head has `learning_rate` itself.
        head: "linear", or "mlp" (Linear, BatchNorm, ReLU, dropout, Linear with `hidden_dim` units; MGCA's code).
        frozen: train the head only; BatchNorm then keeps its stored statistics.
        class_weights: "balanced" weighs the positives of each label by negatives / positives of the training subset,
            at most 20.
        patience: in epochs, with the validation loss as score.
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-4
    layer_decay: float = Field(1.0, gt=0, le=1)
    head: Literal["linear", "mlp"] = "linear"
    hidden_dim: PositiveInt = 512
    dropout: float = Field(0.0, ge=0, lt=1)
    frozen: bool = False
    class_weights: Literal["none", "balanced"] = "none"
    seed: int = 0


def layer_groups(encoder: ImageEncoder) -> list[list[nn.Parameter]]:
    """Parameters of the encoder from the input up, a group for each stage or block.

    Stages are the trunk's children in their order; lists of blocks count block by block. Parameters that belong to the
    trunk itself (class token, position embedding) are part of the lowest group.
    """
    modules: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        for name, child in module.named_children():
            if name in ("blocks", "layers", "features", "encoder"):
                walk(child)
            else:
                modules.append(child)

    walk(encoder.trunk)
    groups = [group for group in (list(module.parameters()) for module in modules) if group]
    grouped = {id(parameter) for group in groups for parameter in group}
    return [[p for p in encoder.parameters() if id(p) not in grouped] + groups[0], *groups[1:]]


def parameter_groups(
    model: ImageClassifier, *, learning_rate: float, layer_decay: float = 1.0
) -> list[dict[str, object]]:
    """For an optimiser: the head at `learning_rate`, each layer group below at `layer_decay` times the one above."""
    groups = [list(model.classifier.parameters())]
    if not model.frozen:
        groups += reversed(layer_groups(model.img_encoder))
    return [{"params": group, "lr": learning_rate * layer_decay**depth} for depth, group in enumerate(groups)]


def positive_weights(targets: np.ndarray) -> Tensor:
    """Negatives / positives of each label among its known targets (n, K), at most 20; 1 where a class is missing."""
    positive, negative = np.nansum(targets == 1, axis=0), np.nansum(targets == 0, axis=0)
    ratio = np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0)
    return torch.from_numpy(np.minimum(ratio, MAX_POSITIVE_WEIGHT).astype(np.float32))


def classification_loss(logits: Tensor, targets: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over the known targets (NaN: unknown), each label by itself; 0 where nothing is known.

    `weights` (K,) are on the positives. Shape: logits, targets (B, K) -> scalar
    """
    logits = logits.float()
    known = ~targets.isnan()
    each = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0), pos_weight=weights, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def random_crops(data: AnnotatedImages, rows: Sequence[int], seeds: Sequence[Sequence[int]]) -> Tensor:
    """Pixels of these studies; the place of each crop depends on its own seed only. Shape: -> (b, C, crop, crop)"""
    crops = []
    for square, seed in zip(data.cache.rows([data.paths[row] for row in rows]), seeds, strict=True):
        top, left = np.random.default_rng(seed).integers(0, len(square) - data.crop + 1, size=2)
        crops.append(square[top : top + data.crop, left : left + data.crop])
    return to_tensor(np.stack(crops), channels=data.channels, norm=data.norm)


@dataclasses.dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with its best epoch's weights.

    Attributes:
        network: the classifier.
        data: the studies that it was trained on and can be scored on.
        history: one row an epoch (epoch, train_loss, valid_loss).
        best_epoch: from 1; 0 for a classifier that was not trained here.
    """

    network: nn.Module
    data: AnnotatedImages
    history: pd.DataFrame | None = None
    best_epoch: int = 0

    def scores(self, rows: Sequence[int], *, batch_size: int = 64) -> pd.DataFrame:
        """Logits (n, K) of these studies, centre crop; columns are the labels, the index is `rows`."""
        logits = []
        for batch in np.array_split(np.asarray(rows, int), range(batch_size, len(rows), batch_size)):
            with inference(self.network, "auto") as device:
                logits.append(self.network(self.data.pixels(batch).to(device)).float().cpu().numpy())
        return pd.DataFrame(np.concatenate(logits), columns=list(self.data.labels), index=rows)

    def probabilities(self, rows: Sequence[int]) -> pd.DataFrame:
        """`scores` in [0, 1], numbered from 0."""
        return (1 / (1 + np.exp(-self.scores(rows)))).reset_index(drop=True)


def finetune(
    pretrained: nn.Module,
    data: AnnotatedImages,
    targets: pd.DataFrame,
    train: Sequence[int],
    valid: Sequence[int],
    config: FinetuneConfig,
    *,
    progress: supervised.Progress | None = None,
) -> TrainedClassifier:
    """Train a classifier on rows `train` of `data`, choose its epoch on rows `valid`. `pretrained` does not change.

    `pretrained` is a `VisionLanguageModel`; its image encoder is copied. targets: (n, K) of 1, 0, NaN, see
    `label_policy.binary_targets`. The same seed gives the same weights on the same machine.
    Without a known target in `valid` the weights of the last epoch are kept, and valid_loss is NaN.
    Raises ValueError for an empty `train`, and where the loss is not finite.
    """
    if len(data) != len(targets) or not len(train):
        raise ValueError(f"{len(data)} studies, {len(targets)} rows of targets; `train` must not be empty")
    train, valid, device, size = np.asarray(train, int), np.asarray(valid, int), pretrained.device, config.batch_size
    truth = torch.tensor(targets.to_numpy(np.float32))
    balanced = config.class_weights == "balanced"
    weights = positive_weights(targets.to_numpy()[train]).to(device) if balanced else None
    n, epoch = len(train), 0
    # a last batch of one study has no batch statistics
    drop_last = n > size and n % size == 1
    steps_per_epoch = n // size if drop_last else -(-n // size)

    def batches() -> Iterator[np.ndarray]:
        nonlocal epoch
        while True:
            epoch += 1
            order = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
            for places in DataLoader(range(n), size, shuffle=True, generator=order, drop_last=drop_last):
                yield places.numpy()

    def loss(pixels: Tensor, rows: np.ndarray) -> Tensor:
        with autocast(device, config.precision):
            logits = network(pixels.to(device))
        return classification_loss(logits, truth[rows].to(device), weights=weights)

    def training_loss(places: np.ndarray) -> Tensor:
        network.train(n > 1)  # a single study has no batch statistics
        rows = train[places]
        return loss(random_crops(data, rows, [(config.seed, epoch, place) for place in places]), rows)

    @torch.no_grad()
    def validation_loss() -> float:
        if not targets.iloc[valid].notna().any(axis=None):
            return float("nan")
        network.eval()
        batches = np.array_split(valid, range(size, len(valid), size))
        total = sum(float(loss(data.pixels(rows), rows)) * len(rows) for rows in batches)
        if not np.isfinite(total):
            raise ValueError("the validation loss is not finite; lower the learning rate")
        return total / len(valid)

    head = {"hidden_dim": config.hidden_dim if config.head == "mlp" else 0, "dropout": config.dropout}
    with supervised.seeded(config.seed):
        encoder = copy.deepcopy(pretrained.image_encoder)
        network = ImageClassifier(encoder, len(data.labels), frozen=config.frozen, **head).to(device)
        history, step = supervised.fit(
            network,
            data.frame["study_id"].to_numpy()[train],
            batches(),
            training_loss,
            validation_loss,
            config,
            steps=config.epochs * steps_per_epoch,
            validate_at=range(steps_per_epoch, config.epochs * steps_per_epoch + 1, steps_per_epoch),
            metric="valid_loss",
            groups=parameter_groups(network, learning_rate=config.learning_rate, layer_decay=config.layer_decay),
            progress=progress,
        )
    history.insert(0, "epoch", history.pop("step") // steps_per_epoch)
    return TrainedClassifier(network, data, history, step // steps_per_epoch)


def ranking(
    data: AnnotatedImages, targets: pd.DataFrame, protocol: LabelEfficiency, metrics: Sequence[Metric] = ("auroc",)
) -> Callable[[TrainedClassifier, np.ndarray], pd.DataFrame]:
    """The function that gives the `metric_rows` of a classifier in some studies; targets (n, K) as `finetune`."""
    targets, patients = targets.reset_index(drop=True), data.frame["patient_id"].astype(str).to_numpy()

    def score(tuned: TrainedClassifier, rows: np.ndarray) -> pd.DataFrame:
        options = {"metrics": metrics, "groups": patients[rows], **protocol.options}
        return metric_rows(targets.loc[rows], tuned.scores(rows), **options)

    return score


def label_efficiency(
    pretrained: nn.Module,
    data: AnnotatedImages,
    targets: pd.DataFrame,
    config: FinetuneConfig,
    protocol: LabelEfficiency,
    *,
    metrics: Sequence[Metric] = ("auroc",),
    progress: supervised.Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], TrainedClassifier]]:
    """Fine-tune on every training subset of `protocol`: rows of `metric_rows` with the columns of `LabelEfficiency`.

    The metrics are called finetuned_auroc and so on, to be recorded beside those of a probe.

    targets (n, K) belong to the studies of `data`, in their order. Subset number k trains with the seed
    `config.seed` + k. Also returns the classifiers by (fraction, subset).
    """
    score = ranking(data, targets, protocol, metrics)

    def fit(train: np.ndarray, subset: int) -> TrainedClassifier:
        own = dataclasses.replace(config, seed=config.seed + subset)
        return finetune(pretrained, data, targets, train, data.rows("valid"), own, progress=progress)

    rows, fits = protocol.run(data.frame, fit, targets=targets, score=score, progress=progress)
    return (rows.assign(metric="finetuned_" + rows["metric"]) if len(rows) else rows), fits
