"""A bank of sentence prototypes: every sentence becomes a mixture of a few hundred learned ones.

PRIOR (Cheng et al., ICCV 2023; released code, `spb.py`). With sentence x, prototypes e_k, temperature tau and Gumbel
noise g (Jang, Gu, Poole: "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017):

    l_k = x . e_k,   w = softmax( (l + g) / tau ),   q = sum_k w_k e_k
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from gloria_core.models.heads import widened

Decay = Literal["fixed", "linear", "exp"]


def gumbel(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of the shape of `logits`, from torch's generator."""
    return -torch.empty_like(logits).exponential_().log()


def decayed(temperature: float, share: float, decay: Decay) -> float:
    """tau after a share (0 to 1) of its way down to a tenth; "fixed" stays. Raises ValueError for another decay."""
    if decay == "fixed":
        return temperature
    if decay == "linear":
        return temperature * (1 - 0.9 * share)
    if decay == "exp":
        return temperature * 0.1**share
    raise ValueError(f'temp_decay must be "fixed", "linear" or "exp", got {decay!r}')


class PrototypeBank(nn.Module):
    """`temperature` is tau and may be set between steps.

    `noise`: gives the noise for logits (M, K); replace it to have the noise of another generator, or none at all
    (`bank.noise = torch.zeros_like`). It is asked for while training, and in evaluation mode where `noisy_in_eval`.

    Shape: (M, D) -> (M, D), logits (M, K); float32 or wider, also under autocast
    """

    def __init__(self, n_prototypes: int, dim: int, *, temperature: float = 0.9, noisy_in_eval: bool = False) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(n_prototypes, dim))
        self.temperature, self.noisy_in_eval = temperature, noisy_in_eval
        self.noise: Callable[[Tensor], Tensor] = gumbel

    def forward(self, sentences: Tensor) -> tuple[Tensor, Tensor]:
        """The mixtures, and the logits without noise."""
        logits = self.logits(sentences)
        noisy = logits + self.noise(logits) if self.training or self.noisy_in_eval else logits
        with torch.autocast(logits.device.type, enabled=False):
            return (noisy / self.temperature).softmax(dim=-1) @ self.prototypes, logits

    def logits(self, sentences: Tensor) -> Tensor:
        """(M, D) -> (M, K) dot products with the prototypes."""
        with torch.autocast(sentences.device.type, enabled=False):
            return widened(sentences) @ self.prototypes.T
