"""Pieces of the losses that align tokens with tokens, and vectors with prototypes (MGCA, `objectives/mgca.py`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

QUANTILES = (0.1, 0.9)


def attend(
    queries: Tensor, keys: Tensor, *, temperature: float, layer: nn.Module | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What each query attends to: softmax over the keys of query . key / temperature, or a learned attention `layer`.

    Shape: queries (B, Q, D), keys (B, K, D), mask (B, K): the keys that count -> contexts (B, Q, D), weights (B, Q, K)
    """
    if layer is not None:
        return layer(queries, keys, keys, key_padding_mask=None if mask is None else ~mask)
    scores = queries @ keys.transpose(1, 2) / temperature
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ keys, weights


def paired_loss(
    queries: Tensor, contexts: Tensor, weights: Tensor, *, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """mean_b sum_i w_i (CE(M)_i + CE(M')_i) / 2 with M = queries contexts' / temperature.

    CE(M)_i = -log softmax_k(M_ik) at k = i: context i belongs to query i, and the other contexts of the same pair,
    or those in the mask, are its negatives.

    Shape: queries, contexts (B, Q, D); weights, mask (B, Q) -> scalar
    """
    logits = queries @ contexts.transpose(1, 2) / temperature
    by_row = by_column = logits
    if mask is not None:
        by_row = logits.masked_fill(~mask[:, None], float("-inf"))
        by_column = logits.masked_fill(~mask[:, :, None], float("-inf"))
    errors = by_row.logsumexp(dim=2) + by_column.logsumexp(dim=1) - 2 * logits.diagonal(dim1=1, dim2=2)
    return (weights * errors).sum(dim=1).mean() / 2


@torch.no_grad()
def clipped_weights(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each row clipped to the 10 % and 90 % quantiles of its masked entries, then scaled to sum 1; zero outside.

    Quantiles are interpolated linearly (released code of MGCA, `mgca_module.py`). A row without an entry gives NaN.

    Shape: weights, mask (N, M) -> (N, M), without gradient
    """
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    inside = weights.masked_fill(~mask, float("nan"))
    low, high = torch.nanquantile(inside, weights.new_tensor(QUANTILES), dim=1, keepdim=True)
    clipped = torch.maximum(torch.minimum(weights, high), low) * mask
    return clipped / clipped.sum(dim=1, keepdim=True)


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assignment of each row to K prototypes that uses every prototype about equally; rows sum to 1.

    Sinkhorn-Knopp on exp(scores / epsilon), as in SwAV (Caron et al., NeurIPS 2020, section 3.1). The scores are
    cosines in float32 or wider: exp(1 / 0.05) = 4.9e8 does not fit into float16.

    Shape: (B, K) -> (B, K), without gradient
    """
    rows, columns = scores.shape
    found = (scores / epsilon).exp()
    found = found / found.sum()
    for _ in range(iterations):
        found = found / (columns * found.sum(dim=0, keepdim=True))
        found = found / (rows * found.sum(dim=1, keepdim=True))
    return found / found.sum(dim=1, keepdim=True)
