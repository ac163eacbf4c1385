"""Losses of binary segmentation by name: the papers' mixtures, and those of segmentation-models-pytorch.

Every loss takes logits and truth of one class, (M, H, W) each, and gives a scalar. Several classes: the mean over them.
"""

from collections.abc import Callable
from typing import Literal

import segmentation_models_pytorch.losses as smp
import torch
from torch import Tensor
from torch.nn import functional as F

LossName = Literal["gloria", "mgca", "bce", "dice", "jaccard", "focal", "tversky", "lovasz", "bce_dice"]
_SMP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dice": smp.DiceLoss(mode="binary"),
    "jaccard": smp.JaccardLoss(mode="binary"),
    "focal": smp.FocalLoss(mode="binary"),
    "tversky": smp.TverskyLoss(mode="binary"),
    "lovasz": smp.LovaszLoss(mode="binary"),
}


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

    A batch without foreground has -log(1 / (sum p + 1)), which trains towards an empty prediction.
    """
    return alpha * focal(logits, truth, gamma=gamma) - torch.log(soft_dice(logits, truth))


def _of_class(name: LossName, logits: Tensor, truth: Tensor) -> Tensor:
    if name in ("gloria", "mgca"):
        return mixed(logits, truth)
    if name in _SMP:  # with a channel axis; Dice and Jaccard are zero for a batch without foreground
        return _SMP[name](logits[:, None], truth[:, None])
    entropy = F.binary_cross_entropy_with_logits(logits, truth)
    return entropy if name == "bce" else entropy + _of_class("dice", logits, truth)


def segmentation_loss(name: LossName, logits: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Mean of the loss `name` over the classes that are known in this batch; zero where none is.

    "gloria", "mgca": `mixed`, the same function in both papers' code. "bce": cross-entropy. "bce_dice": its sum with
    smp's Dice loss. The others are smp's: "dice", "jaccard", "focal", "tversky", "lovasz".

    Shape: logits, truth (B, K, H, W) float; known (B, K) bool, False = this pair is left out
    """
    losses = [
        _of_class(name, logits[known[:, k], k], truth[known[:, k], k])
        for k in range(logits.shape[1])
        if bool(known[:, k].any())
    ]
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0
