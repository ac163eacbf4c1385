"""Fine-tuning: a classification head on the image encoder, trained with it or on top of it frozen.

The protocol of the papers (GLoRIA, Huang et al. 2021, section 4.3; MGCA, Wang et al. 2022, appendix) with what they
leave open made explicit: studies with an unknown target take no part in that label's loss, early stopping watches the
validation loss, and the test split is scored once, with the weights of the best epoch.

A classifier on a pretrained image encoder: its head, its layer-wise learning rates, and its loss.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gloria_core.data.images import to_tensor
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.tasks.features import frontal_image, inference
from gloria_core.training.precision import Precision, choose_precision

Head = Literal["linear", "mlp"]


class Classifier(nn.Module):
    """Image encoder and head: "linear", or "mlp" (Linear, BatchNorm, ReLU, dropout, Linear; released code of MGCA).

    A `frozen` encoder gets no gradient and stays in evaluation mode, BatchNorm included.
    Shape: pixels (B, C, H, W) -> logits (B, K)
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        n_labels: int,
        *,
        head: Head = "linear",
        hidden_dim: int = 512,
        dropout: float = 0.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        if head not in ("linear", "mlp"):
            raise ValueError(f'head must be "linear" or "mlp", got {head!r}')
        self.encoder, self.frozen = encoder, frozen
        if head == "linear":
            self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(encoder.pooled_dim, n_labels))
        else:
            first = (nn.Linear(encoder.pooled_dim, hidden_dim), nn.BatchNorm1d(hidden_dim))
            self.head = nn.Sequential(*first, nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, n_labels))
        self.encoder.requires_grad_(not frozen)

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
    groups = [list(module.parameters()) for module in modules]
    groups = [group for group in groups if group]
    held = {id(parameter) for group in groups for parameter in group}
    return [[p for p in encoder.parameters() if id(p) not in held] + groups[0], *groups[1:]]


def parameter_groups(model: Classifier, *, learning_rate: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """For an optimiser: the head at `learning_rate`, each layer group below at `layer_decay` times the one above."""
    groups = [{"params": list(model.head.parameters()), "lr": learning_rate}]
    if not model.frozen:
        for depth, parameters in enumerate(reversed(layer_groups(model.encoder)), start=1):
            groups.append({"params": parameters, "lr": learning_rate * layer_decay**depth})
    return groups


def positive_weights(targets: np.ndarray, most: float = 20.0) -> Tensor:
    """Negatives / positives of each label among its known targets (n, K), at most `most`; 1 where one of them lacks."""
    positive, negative = np.nansum(targets == 1, axis=0), np.nansum(targets == 0, axis=0)
    ratio = np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0)
    return torch.from_numpy(np.minimum(ratio, most).astype(np.float32))


def classification_loss(logits: Tensor, targets: Tensor, *, loss: str, weights: Tensor | None = None) -> Tensor:
    """Mean loss over the known targets (NaN: unknown); 0 where nothing is known.

    "bce": each label by itself, `weights` (K,) on its positives. "ce": the one positive label against the others, with
    `weights` by class; Raises ValueError where a study has not exactly one positive.
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


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune`.

    `head`: "linear", or "mlp" (Linear, BatchNorm, ReLU, dropout, Linear with `hidden_dim` units; MGCA's code).
    `frozen`: train the head only; BatchNorm then keeps its stored statistics.
    `layer_decay`: the learning rate falls by this factor from each layer group of the encoder to the one below
    (1: none); the head has `learning_rate` itself.
    `class_weights`: "balanced" weighs the positives of each label by negatives / positives of the training subset,
    at most 20.
    `loss`: "bce" for labels that may occur together, "ce" where exactly one label of a study is positive.
    `patience`: stop after so many epochs without a lower validation loss; the best epoch's weights are kept.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    layer_decay: float = 1.0
    head: Head = "linear"
    hidden_dim: int = 512
    dropout: float = 0.0
    frozen: bool = False
    class_weights: Literal["none", "balanced"] = "none"
    loss: Literal["bce", "ce"] = "bce"
    patience: int = 5
    seed: int = 0
    workers: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        choices = {"head": ("linear", "mlp"), "class_weights": ("none", "balanced"), "loss": ("bce", "ce")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name in ("epochs", "batch_size", "hidden_dim", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.layer_decay <= 1 or not 0 <= self.dropout < 1 or self.learning_rate <= 0:
            raise ValueError("layer_decay must lie in (0, 1], dropout in [0, 1), learning_rate above 0")


class LabelledImages(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Frontal image (crop, crop) uint8 and targets (K,) of every study; the crop is random where `augment` is set.

    Item i depends on (seed, epoch, i) only.
    """

    def __init__(
        self, frame: pd.DataFrame, targets: pd.DataFrame, cache, *, crop: int, augment: bool = False, seed: int = 0
    ) -> None:
        if len(frame) != len(targets):
            raise ValueError(f"{len(frame)} studies, {len(targets)} rows of targets")
        columns = frame[["study_id", "images", "views"]].to_dict("records")
        self.paths = [frontal_image(row)[1] for row in columns]
        self.targets = targets.to_numpy(dtype=np.float32)
        self.cache, self.crop, self.augment, self.seed, self.epoch = cache, crop, augment, seed, 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image = np.asarray(self.cache[self.paths[index]])
        room = image.shape[0] - self.crop
        top = left = room // 2
        if self.augment:
            top, left = np.random.default_rng([self.seed, self.epoch, index]).integers(0, room + 1, size=2)
        return np.ascontiguousarray(image[top : top + self.crop, left : left + self.crop]), self.targets[index].copy()


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` returns: the classifier with its best epoch's weights, and one row an epoch."""

    model: Classifier
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
) -> Finetuned:
    """Train a classifier on (frame, targets) of `train`, choose its epoch on `valid`. `pretrained` is left as it was.

    `pretrained` is a `VisionLanguageModel`; its image encoder is copied. targets: (n, K) of 1, 0, NaN, see
    `targets.binary_targets`. The same seed gives the same weights on the same machine.
    Raises ValueError for an empty split and for a loss that is not finite, with the epoch.
    """
    if not len(train[0]) or not len(valid[0]):
        raise ValueError(f"{len(train[0])} training and {len(valid[0])} validation studies: both are needed")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    look, labels = pretrained.config, tuple(train[1].columns)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        shape = {name: getattr(config, name) for name in ("head", "hidden_dim", "dropout", "frozen")}
        model = Classifier(copy.deepcopy(pretrained.image_encoder), len(labels), **shape).to(device)
        groups = parameter_groups(model, learning_rate=config.learning_rate, layer_decay=config.layer_decay)
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        weights = positive_weights(train[1].to_numpy()).to(device) if config.class_weights == "balanced" else None
        data = LabelledImages(*train, cache, crop=look.crop, augment=True, seed=config.seed)
        watched = LabelledImages(*valid, cache, crop=look.crop)
        best, best_epoch, kept, rows = float("inf"), 0, None, []
        for epoch in range(1, config.epochs + 1):
            data.epoch = epoch
            losses = {
                "train_loss": _epoch(model, data, config, look, weights, optimizer),
                "valid_loss": _epoch(model, watched, config, look, weights),
            }
            if not np.isfinite(list(losses.values())).all():
                raise ValueError(f"the loss of epoch {epoch} is not finite ({losses}); lower learning_rate")
            rows.append({"epoch": epoch, **losses})
            if losses["valid_loss"] < best:
                best, best_epoch = losses["valid_loss"], epoch
                kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
            elif epoch - best_epoch >= config.patience:
                break
    model.load_state_dict(kept)
    return Finetuned(model.eval(), labels, pd.DataFrame(rows), best_epoch)


def predict(
    tuned: Finetuned, pretrained: nn.Module, frame: pd.DataFrame, cache, *, batch_size: int = 64
) -> pd.DataFrame:
    """Logits (n, K) of the studies' frontal images, centre crop; columns are the labels."""
    look, out = pretrained.config, []
    blank = pd.DataFrame(np.zeros((len(frame), 0)))
    loader = DataLoader(LabelledImages(frame, blank, cache, crop=look.crop), batch_size=batch_size)
    for images, _ in loader:
        with inference(tuned.model, None, "auto") as where:
            pixels = to_tensor(images.numpy(), channels=look.channels, norm=look.norm).to(where)
            out.append(tuned.model(pixels).float().cpu().numpy())
    return pd.DataFrame(np.concatenate(out), columns=list(tuned.labels))


def _epoch(
    model: Classifier,
    data: LabelledImages,
    config: FinetuneConfig,
    look,
    weights: Tensor | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """One pass, with training where an optimiser is given; the mean loss over the studies."""
    training, device = optimizer is not None, next(model.parameters()).device
    # float16 would need loss scaling; a classifier is small enough to be trained without
    half = choose_precision(device, config.precision) == "bfloat16"
    order = torch.Generator().manual_seed(config.seed * 100_003 + data.epoch)
    # a last batch of one study has no batch statistics
    short = training and len(data) > config.batch_size and len(data) % config.batch_size == 1
    loader = DataLoader(
        data,
        batch_size=config.batch_size,
        shuffle=training,
        generator=order,
        num_workers=config.workers,
        drop_last=short,
    )
    model.train(training and len(data) > 1)
    total = 0.0
    with torch.set_grad_enabled(training):
        for images, targets in loader:
            pixels = to_tensor(images.numpy(), channels=look.channels, norm=look.norm).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
                logits = model(pixels)
            loss = classification_loss(logits, targets.to(device), loss=config.loss, weights=weights)
            if training:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            total += float(loss.detach()) * len(images)
    return total / len(data)
