"""Sentences of reports: their vectors, their attention to the regions of an image, and a bank of their prototypes.

All of PRIOR (Cheng et al., ICCV 2023; released code, `spb.py` for the bank). Attention between region and sentence goes
both ways and is a sigmoid, so that a sentence may be seen in many regions, in few, or in none. In the bank every
sentence becomes a mixture of a few hundred learned ones. With sentence x, prototypes e_k, temperature tau and Gumbel
noise g (Jang, Gu, Poole: "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017):

    l_k = x . e_k,   w = softmax( (l + g) / tau ),   q = sum_k w_k e_k
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.models.heads import widened

# Region-sentence pairs that `pair_scores` holds at a time.
PAIRS_AT_ONCE = 1 << 25


class Sentences(NamedTuple):
    """Sentences of N texts, one a row, without gaps: a sentence without a token has no row.

    Shape:
        mask (N, S) bool; table (N, numbers) int64: the row of each sentence number, -1 where it has none
        place (M,): where the M sentences of all texts lie in the flattened (N * S)
        packed (M, D): their vectors, text by text
    """

    mask: Tensor
    table: Tensor
    place: Tensor
    packed: Tensor

    def padded(self, packed: Tensor) -> Tensor:
        """(M, D) -> (N, S, D), zero where there is no sentence."""
        flat = packed.new_zeros(self.mask.numel(), packed.shape[-1])
        return flat.index_copy(0, self.place, packed).view(*self.mask.shape, -1)

    def at(self, values: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to the sentences of these numbers: (N, S, E), (N, W) -> (N, W, E) and where there is one (N, W).

        Zero where there is no sentence.
        """
        last = self.table.shape[1] - 1
        rows = self.table.gather(1, numbers.clamp(min=0, max=last))
        there = (rows >= 0) & (numbers >= 0) & (numbers <= last)
        found = values.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))
        return found * there[..., None], there


def gather_sentences(tokens: Tensor, numbers: Tensor, *, most: int | None = None) -> Sentences:
    """Mean over the tokens of every sentence, in float32 or wider; one `index_add`, no loop.

    `most`: keep only the first so many sentences of a text.

    Shape: tokens (N, L, D), numbers (N, L) with -1 for tokens outside every sentence
    Raises ValueError for a text without any sentence.
    """
    n, _, dim = tokens.shape
    kept, index = numbers >= 0, numbers.clamp(min=0)
    present = torch.zeros(n, int(numbers.max().clamp(min=0)) + 1, dtype=torch.int64, device=tokens.device)
    present = present.scatter_reduce(1, index, kept.long(), reduce="amax")
    count = present.sum(dim=1)
    if most is not None:
        count = count.clamp(max=most)
    fewest, width = torch.stack([count.min(), count.max()]).tolist()
    if fewest == 0:
        raise ValueError(
            f"texts {(count == 0).nonzero().flatten().tolist()} have no token in any sentence: this objective needs "
            "sentence ids (`tokenize` makes them; ids without their text need `sentence_ids` of their own)"
        )
    table = (present.cumsum(dim=1) - 1).masked_fill(present == 0, -1)
    table = table.masked_fill(table >= width, -1)
    row = table.gather(1, index).masked_fill(~kept, -1)
    cell = (row + torch.arange(n, device=row.device)[:, None] * width).masked_fill(row < 0, n * width).flatten()
    sums = widened(tokens).new_zeros(n * width + 1, dim).index_add(0, cell, widened(tokens).flatten(0, 1))
    sizes = sums.new_zeros(n * width + 1).index_add(0, cell, torch.ones_like(cell, dtype=sums.dtype))
    mask = torch.arange(width, device=tokens.device) < count[:, None]
    place = mask.flatten().nonzero().flatten()
    return Sentences(mask, table, place, sums[place] / sizes[place, None])


def local_nce(sentences: Tensor, seen: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE among the sentences of one text, both directions, mean over its sentences and then over texts; scalar.

    A text of one sentence gives 0.

    Shape: sentences, seen (N, S, D), mask (N, S), scale ()
    """
    with torch.autocast(sentences.device.type, enabled=False):
        left, right = (F.normalize(widened(value), dim=-1) for value in (sentences, seen))
        logits = (scale * left @ right.transpose(1, 2)).masked_fill(~(mask[:, None] & mask[..., None]), -1e9)
        pairs = [logits.log_softmax(dim=axis).diagonal(dim1=1, dim2=2) for axis in (1, 2)]
        return -((pairs[0] + pairs[1]) * mask).sum(dim=1).div(2 * mask.sum(dim=1)).mean()


def mutual_prediction(one: Tensor, other: Tensor, predictor: nn.Module) -> Tensor:
    """-1/2 mean [ cos(p(x), sg(y)) + cos(p(y), sg(x)) ] with stop-gradient sg (SimSiam, Chen & He, CVPR 2021); scalar.

    Shape: one, other (N, R, D)
    """
    there = F.cosine_similarity(widened(predictor(one)), widened(other).detach(), dim=-1)
    back = F.cosine_similarity(widened(predictor(other)), widened(one).detach(), dim=-1)
    return -(there.mean() + back.mean()) / 2


class CrossAttention(NamedTuple):
    """Sigmoid weights both ways, and what they collect.

    Shape: `of_region` (N, R, S), `of_sentence` (N, S, R); `told` (N, R, D) the text at every region, `seen` (N, S, D)
    the image for every sentence. Columns of missing sentences are zero in `of_region`; their rows in the other two
    mean nothing.
    """

    of_region: Tensor
    of_sentence: Tensor
    told: Tensor
    seen: Tensor


class SentenceRegionAttention(nn.Module):
    """With regions Z, sentences S and projections q, k, v (1: of regions, 2: of sentences):

        of_region = sigmoid(q1(Z) k2(S)^T / sqrt(D)),   told = of_region v2(S)
        of_sentence = sigmoid(q2(S) k1(Z)^T / sqrt(D)), seen = of_sentence v1(Z)

    Shape: regions (N, R, D), sentences (N, S, D), mask (N, S)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query1, self.key1, self.value1 = (nn.Linear(dim, dim) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(dim, dim) for _ in range(3))
        self.scale = dim**-0.5

    def forward(self, regions: Tensor, sentences: Tensor, mask: Tensor) -> CrossAttention:
        of_region = (self.query1(regions) @ self.key2(sentences).transpose(1, 2) * self.scale).sigmoid()
        of_region = of_region * mask[:, None]
        of_sentence = (self.query2(sentences) @ self.key1(regions).transpose(1, 2) * self.scale).sigmoid()
        told, seen = of_region @ self.value2(sentences), of_sentence @ self.value1(regions)
        return CrossAttention(*map(widened, (of_region, of_sentence, told, seen)))

    def pair_scores(self, regions: Tensor, sentences: Tensor, mask: Tensor) -> Tensor:
        """(B, N): mean weight over regions and sentences of every image with every text, both ways averaged.

        Shape: regions (B, R, D), sentences (N, S, D), mask (N, S)
        """
        query1, key1 = self.query1(regions), self.key1(regions)
        query2, key2 = self.query2(sentences), self.key2(sentences)
        chunk = max(1, PAIRS_AT_ONCE // (regions.shape[0] * regions.shape[1] * sentences.shape[1]))
        found = []
        for part in torch.arange(len(sentences), device=mask.device).split(chunk):
            there = mask[part].to(torch.float32)
            weights = torch.einsum("brd,nsd->bnrs", query1, key2[part]) * self.scale
            total = widened(weights).sigmoid().mean(dim=2)
            weights = torch.einsum("nsd,brd->bnrs", query2[part], key1) * self.scale
            total = total + widened(weights).sigmoid().mean(dim=2)
            found.append((total * there).sum(dim=2) / (2 * there.sum(dim=1)))
        return torch.cat(found, dim=1)


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
