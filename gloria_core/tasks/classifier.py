"""A classifier on a pretrained image encoder: its head, its layer-wise learning rates, and its loss."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.models.image_encoder import ImageEncoder

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
