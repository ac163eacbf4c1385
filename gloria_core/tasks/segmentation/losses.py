"""Losses of binary segmentation by name: the papers' mixtures, and those of segmentation-models-pytorch.

Every loss takes logits and truth of one class, (M, H, W) each, and gives a scalar. Several classes: the mean over them.
"""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch.losses as smp
import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def soft_dice(logits: Tensor, truth: Tensor, *, smooth: float = 1.0) -> Tensor:
    """(2 sum p t + s) / (sum p + sum t + s), one sum over all pixels of the batch: `dice_loss` of the released code.

    In GLoRIA's and MGCA's code the function of that name returns the coefficient, not a loss.
    """
    p = torch.sigmoid(logits)
    return (2 * (p * truth).sum() + smooth) / (p.sum() + truth.sum() + smooth)


def focal(logits: Tensor, truth: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Mean over all pixels of (1 - p_t)^gamma * cross-entropy (Lin et al. 2017, without their alpha)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    # sigmoid^gamma is the released exp(gamma * logsigmoid), at half the time
    return (torch.sigmoid(logits * (1 - 2 * truth)) ** gamma * entropy).mean()


def mixed(logits: Tensor, truth: Tensor, *, alpha: float = 10.0, gamma: float = 2.0) -> Tensor:
    """alpha * focal - log(soft Dice of the whole batch): `MixedLoss` of the released GLoRIA and MGCA code.

    A batch without foreground has -log(1 / (sum p + 1)), which asks for an empty prediction.
    """
    return alpha * focal(logits, truth, gamma=gamma) - torch.log(soft_dice(logits, truth))


def _smp(loss: Loss) -> Loss:
    """A loss of segmentation-models-pytorch, which wants a channel axis. Dice and Jaccard skip an empty batch."""
    return lambda logits, truth: loss(logits[:, None], truth[:, None])


_dice, _jaccard = smp.DiceLoss(mode="binary"), smp.JaccardLoss(mode="binary")
_LOSSES: dict[str, Loss] = {
    "gloria": mixed,
    "mgca": mixed,
    "bce": F.binary_cross_entropy_with_logits,
    "dice": _smp(_dice),
    "jaccard": _smp(_jaccard),
    "focal": _smp(smp.FocalLoss(mode="binary")),
    "tversky": _smp(smp.TverskyLoss(mode="binary")),
    "lovasz": _smp(smp.LovaszLoss(mode="binary")),
    "bce_dice": lambda logits, truth: F.binary_cross_entropy_with_logits(logits, truth) + _smp(_dice)(logits, truth),
}


def available() -> tuple[str, ...]:
    """Names that `segmentation_loss` knows."""
    return tuple(_LOSSES)


def segmentation_loss(name: str, logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Mean over the classes that are known in this batch of the loss `name`; zero where none is.

    "gloria", "mgca": `mixed`, the same function in both papers' code. "bce": cross-entropy. "bce_dice": its sum with
    smp's Dice loss. The rest is smp's: "dice", "jaccard", "focal", "tversky", "lovasz".

    Shape: logits, truth (B, K, H, W) float; known (B, K) bool, False = this pair is left out
    Raises: ValueError for an unknown name.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown segmentation loss {name!r}; available: {', '.join(_LOSSES)}")
    losses = [
        _LOSSES[name](logits[known[:, k], k], truth[known[:, k], k])
        for k in range(logits.shape[1])
        if bool(known[:, k].any())
    ]
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0
