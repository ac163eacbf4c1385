"""Fine-tuning: a classification head on the image encoder, trained with it or on top of it frozen.

The protocol of the papers (GLoRIA, Huang et al. 2021, section 4.3; MGCA, Wang et al. 2022, appendix), with what they
leave open made explicit: unknown targets take no part in the loss, early stopping uses the validation loss, and the
test split is scored once, with the weights of the best epoch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from gloria_core.checkpoints.model import ModelConfig
from gloria_core.data.images import to_tensor
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.tasks.features import frontal_image, inference
from gloria_core.tasks.label_efficiency import LabelEfficiency, Score
from gloria_core.tasks.metrics import Metric, metric_rows
from gloria_core.training import supervised
from gloria_core.training.precision import Precision, autocast

Head = Literal["linear", "mlp"]
MAX_POSITIVE_WEIGHT = 20.0


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune`. Raises ValueError naming the field.

    `head`: "linear", or "mlp" (Linear, BatchNorm, ReLU, dropout, Linear with `hidden_dim` units; MGCA's code).
    `frozen`: train the head only; BatchNorm then keeps its stored statistics.
    `layer_decay`: the learning rate falls by this factor from each layer group of the encoder to the one below
    (1: none); the head has `learning_rate` itself.
    `class_weights`: "balanced" weighs the positives of each label by negatives / positives of the training subset,
    at most 20.
    `loss`: "bce" for labels that may occur together, "ce" where exactly one label of a study is positive.
    `patience`: stop after so many epochs without a lower validation loss; the best epoch's weights are kept.
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 32
    learning_rate: PositiveFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-4
    layer_decay: float = Field(1.0, gt=0, le=1)
    head: Head = "linear"
    hidden_dim: PositiveInt = 512
    dropout: float = Field(0.0, ge=0, lt=1)
    frozen: bool = False
    class_weights: Literal["none", "balanced"] = "none"
    loss: Literal["bce", "ce"] = "bce"
    patience: PositiveInt = 5
    seed: int = 0
    precision: Precision = "auto"


class Classifier(nn.Module):
    """Image encoder and head. A frozen encoder gets no gradient and stays in evaluation mode, BatchNorm included.

    Shape: pixels (B, C, H, W) -> logits (B, K)
    """

    def __init__(self, encoder: ImageEncoder, n_labels: int, config: FinetuneConfig) -> None:
        super().__init__()
        self.encoder, self.frozen = encoder.requires_grad_(not config.frozen), config.frozen
        hidden, width = [], encoder.pooled_dim
        if config.head == "mlp":
            hidden = [nn.Linear(width, config.hidden_dim), nn.BatchNorm1d(config.hidden_dim), nn.ReLU()]
            width = config.hidden_dim
        self.head = nn.Sequential(*hidden, nn.Dropout(config.dropout), nn.Linear(width, n_labels))

    def train(self, mode: bool = True) -> Classifier:
        """Training mode, except that a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled = self.encoder(pixels).pooled
        return self.head(pooled)


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


def parameter_groups(model: Classifier, *, learning_rate: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """For an optimiser: the head at `learning_rate`, each layer group below at `layer_decay` times the one above."""
    groups = [list(model.head.parameters())]
    if not model.frozen:
        groups += reversed(layer_groups(model.encoder))
    return [{"params": group, "lr": learning_rate * layer_decay**depth} for depth, group in enumerate(groups)]


def positive_weights(targets: np.ndarray) -> Tensor:
    """Negatives / positives of each label among its known targets (n, K), at most 20; 1 where a class is missing."""
    positive, negative = np.nansum(targets == 1, axis=0), np.nansum(targets == 0, axis=0)
    ratio = np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0)
    return torch.from_numpy(np.minimum(ratio, MAX_POSITIVE_WEIGHT).astype(np.float32))


def classification_loss(
    logits: Tensor, targets: Tensor, *, loss: Literal["bce", "ce"], weights: Tensor | None = None
) -> Tensor:
    """Mean loss over the known targets (NaN: unknown); 0 where nothing is known.

    "bce": each label by itself, `weights` (K,) on its positives. "ce": the one positive label against the others, with
    `weights` by class. Raises ValueError where a study has not exactly one positive.
    Shape: logits, targets (B, K) -> scalar
    """
    logits = logits.float()
    if loss == "ce":
        if not ((targets == 1).sum(dim=1) == 1).all():
            raise ValueError('loss "ce" needs exactly one positive label in every study; use "bce"')
        return F.cross_entropy(logits, targets.nan_to_num(0).argmax(dim=1), weight=weights)
    known = ~targets.isnan()
    each = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(0), pos_weight=weights, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


def image_crops(
    paths: Sequence[str], cache, config: ModelConfig, rows: Sequence[int], *, seed: Sequence[int] | None = None
) -> Tensor:
    """Pixels of the images `rows`; the crop is central, or random and dependent on (*seed, row) only.

    Shape: -> (b, C, crop, crop)
    """
    crops = []
    for row in rows:
        image = np.asarray(cache[paths[row]])
        room = image.shape[0] - config.crop
        top = left = room // 2
        if seed is not None:
            top, left = np.random.default_rng([*seed, row]).integers(0, room + 1, size=2)
        crops.append(image[top : top + config.crop, left : left + config.crop])
    return to_tensor(np.stack(crops), channels=config.channels, norm=config.norm)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """What `finetune` returns: the classifier with its best epoch's weights, and one row an epoch.

    `image_config`: crop, channels and norm of the pixels. history: epoch, train_loss, valid_loss.
    """

    model: Classifier
    image_config: ModelConfig
    labels: tuple[str, ...]
    history: pd.DataFrame
    best_epoch: int


def finetune(
    pretrained: nn.Module,
    train: tuple[pd.DataFrame, pd.DataFrame],
    valid: tuple[pd.DataFrame, pd.DataFrame],
    cache,
    config: FinetuneConfig,
    *,
    device: torch.device | str | None = None,
    progress: supervised.Progress | None = None,
) -> Finetuned:
    """Train a classifier on (frame, targets) of `train`, choose its epoch on `valid`. `pretrained` does not change.

    `pretrained` is a `VisionLanguageModel`; its image encoder is copied. targets: (n, K) of 1, 0, NaN, see
    `label_policy.binary_targets`. The same seed gives the same weights on the same machine.
    Without a known target in `valid` the weights of the last epoch are kept, and valid_loss is NaN.
    Raises ValueError for an empty `train`, and where the loss is not finite.
    """
    for frame, targets in (train, valid):
        if len(frame) != len(targets) or not len(train[0]):
            raise ValueError(f"{len(frame)} studies, {len(targets)} rows of targets; `train` must not be empty")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pixels, labels, size = pretrained.config, tuple(train[1].columns), config.batch_size
    paths = [_paths(frame) for frame, _ in (train, valid)]
    targets = [torch.tensor(table.to_numpy(np.float32)) for _, table in (train, valid)]
    weights = positive_weights(train[1].to_numpy()).to(device) if config.class_weights == "balanced" else None
    n, epoch = len(train[0]), 0
    # a last batch of one study has no batch statistics
    drop_last = n > size and n % size == 1
    steps_per_epoch = n // size if drop_last else -(-n // size)

    def batches() -> Iterator[np.ndarray]:
        nonlocal epoch
        while True:
            epoch += 1
            order = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
            for rows in DataLoader(range(n), size, shuffle=True, generator=order, drop_last=drop_last):
                yield rows.numpy()

    def loss(split: int, rows: np.ndarray) -> Tensor:
        crop_seed = None if split else (config.seed, epoch)
        inputs = image_crops(paths[split], cache, pixels, rows, seed=crop_seed).to(device)
        with autocast(device, config.precision):
            logits = model(inputs)
        return classification_loss(logits, targets[split][rows].to(device), loss=config.loss, weights=weights)

    def training_loss(rows: np.ndarray) -> Tensor:
        model.train(n > 1)  # a single study has no batch statistics
        return loss(0, rows)

    @torch.no_grad()
    def validation_loss() -> float:
        if not valid[1].notna().any(axis=None):
            return float("nan")
        model.eval()
        rows = np.array_split(np.arange(len(valid[0])), range(size, len(valid[0]), size))
        total = sum(float(loss(1, batch)) * len(batch) for batch in rows)
        if not np.isfinite(total):
            raise ValueError("the validation loss is not finite; lower the learning rate")
        return total / len(valid[0])

    with supervised.seeded(config.seed):
        model = Classifier(copy.deepcopy(pretrained.image_encoder), len(labels), config).to(device)
        groups = parameter_groups(model, learning_rate=config.learning_rate, layer_decay=config.layer_decay)
        history, step = supervised.fit(
            model,
            train[0]["study_id"].to_numpy(),
            batches(),
            training_loss,
            validation_loss,
            torch.optim.AdamW(groups, weight_decay=config.weight_decay),
            steps=config.epochs * steps_per_epoch,
            validate_at=range(steps_per_epoch, config.epochs * steps_per_epoch + 1, steps_per_epoch),
            patience=config.patience,
            metric="valid_loss",
            precision=config.precision,
            progress=progress,
        )
    history.insert(0, "epoch", history.pop("step") // steps_per_epoch)
    return Finetuned(model, pixels, labels, history, step // steps_per_epoch)


def _paths(frame: pd.DataFrame) -> list[str]:
    return [frontal_image(study)[1] for study in frame[["study_id", "images", "views"]].to_dict("records")]


def predict(tuned: Finetuned, frame: pd.DataFrame, cache, *, batch_size: int = 64) -> pd.DataFrame:
    """Logits (n, K) of the studies' frontal images, centre crop; columns are the labels."""
    paths, logits = _paths(frame), []
    for first in range(0, len(paths), batch_size):
        rows = range(first, min(first + batch_size, len(paths)))
        with inference(tuned.model, "auto") as device:
            pixels = image_crops(paths, cache, tuned.image_config, rows).to(device)
            logits.append(tuned.model(pixels).float().cpu().numpy())
    return pd.DataFrame(np.concatenate(logits), columns=list(tuned.labels))


def label_efficiency(
    pretrained: nn.Module,
    frame: pd.DataFrame,
    targets: pd.DataFrame,
    cache,
    config: FinetuneConfig,
    protocol: LabelEfficiency,
    *,
    metrics: Sequence[Metric] = ("auroc",),
    progress: supervised.Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], Finetuned]]:
    """Fine-tune on every training subset of `protocol`: rows of `metric_rows` with the columns of `LabelEfficiency`.

    The metrics are called finetuned_auroc and so on, to be recorded beside those of a probe.

    targets (n, K) belong to the studies of `frame`, all splits, in its order. Subset number k trains with the seed
    `config.seed` + k. Also returns the classifiers by (fraction, subset).
    """
    frame, targets = frame.reset_index(drop=True), targets.reset_index(drop=True)
    valid, test = (np.flatnonzero(frame["split"] == split) for split in ("valid", "test"))
    patients = frame["patient_id"].astype(str).to_numpy()

    def fit(train: np.ndarray, subset: int) -> tuple[Finetuned, Score]:
        parts = ((frame.loc[rows], targets.loc[rows]) for rows in (train, valid))
        own = dataclasses.replace(config, seed=config.seed + subset)
        tuned = finetune(pretrained, *parts, cache, own, progress=progress)
        logits = predict(tuned, frame.loc[test], cache).set_index(test)

        def score(rows: np.ndarray) -> pd.DataFrame:
            options = {"metrics": metrics, "macro": protocol.macro, "n_bootstrap": protocol.n_bootstrap}
            table = metric_rows(targets.loc[rows], logits.loc[rows], groups=patients[rows], **options)
            return table.assign(metric="finetuned_" + table["metric"])

        return tuned, score

    return protocol.run(frame, fit, progress)
