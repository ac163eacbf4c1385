"""Small pieces that several objectives share: a projection head, cosines, and the symmetric contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PRODUCT_EPS = 1e-8
"""Floor of the product of two norms in a cosine (released code of GLoRIA, `gloria_loss.py`)."""


def widened(value: Tensor) -> Tensor:
    """The tensor in float32 where it is half precision (autocast), untouched where it is float32 or float64."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class MLPHead(nn.Sequential):
    """Linear - ReLU - Linear, the non-linear projection of ConVIRT (Zhang et al. 2020, section 2.3) and SimCLR.

    Shape: (..., in_dim) -> (..., out_dim)
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden_dim: int | None = None) -> None:
        hidden_dim = hidden_dim or out_dim
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, out_dim))


def cosine_matrix(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every image with every text, in float32 or wider even under autocast.

    Shape: (B, D), (N, D) -> (B, N)
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = widened(images), widened(texts)
        norms = images.norm(dim=-1)[:, None] * texts.norm(dim=-1)[None, :]
        return images @ texts.T / norms.clamp(min=PRODUCT_EPS)


def contrastive_terms(logits: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions for pairs on the diagonal: (image -> text, text -> image), each a mean over B.

    Shape: logits (B, B), rows images, columns texts
    Raises ValueError where the matrix is not square: image b must belong to text b.
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"a contrastive loss pairs image b with text b; got logits of shape {tuple(logits.shape)}")
    logits, target = widened(logits), torch.arange(len(logits), device=logits.device)
    to_text, to_image = (F.cross_entropy(rows, target, label_smoothing=label_smoothing) for rows in (logits, logits.T))
    return to_text, to_image
