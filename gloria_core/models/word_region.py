"""Similarity of every image with every text through the regions that each word attends to, fast and in bounded memory.

The mathematics is GLoRIA's word-region attention (Huang et al. 2021, section 3.3); `objectives/gloria.py` states it.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gloria_core.models.heads import PRODUCT_EPS, widened

Aggregation = Literal["sum", "mean", "max"]
# Score elements (B, R, n, W) held at once: 128 MB for each float32 intermediate, of which a step keeps about four.
MEMORY_BUDGET = 2**25
# Below it a squared length counts as zero and passes no gradient, where a square root's would be infinite.
SQUARE_FLOOR = 1e-24


def word_region_similarity(
    regions: Tensor,
    words: Tensor,
    mask: Tensor,
    *,
    temp_attention: float,
    temp_similarity: float,
    aggregation: Aggregation,
    chunk_size: int = 0,
) -> Tensor:
    """Z (B, N) of GLoRIA's eq. 5, in float32 or wider.

    Texts are handled in groups of like length, so that little of a group is padding. `chunk_size` fixes the number of
    texts in a group; 0 lets the memory budget decide. When all groups do not fit into memory together, each is
    computed again in the backward pass instead of being kept.

    Shape: regions (B, h, w, D), words (N, W, D), mask (N, W): the words that count -> (B, N)
    Raises ValueError for a text without a word.
    """
    regions = regions.flatten(1, 2)
    begin, ends = _window_bounds(mask)
    budget = MEMORY_BUDGET // (regions.shape[1] * max(end - begin for end in ends))  # image-text pairs at once
    too_many = len(regions) > budget and not torch.is_grad_enabled()
    parts = regions.split(max(1, budget)) if too_many else (regions,)
    per_word = parts[0].shape[0] * regions.shape[1]
    groups = _groups([end - begin for end in ends], per_word=per_word, chunk_size=chunk_size)
    recompute = torch.is_grad_enabled() and (chunk_size > 0 or per_word * sum(ends) > MEMORY_BUDGET)
    rows = []
    for part in parts:
        gram, columns = gram_matrix(part), []
        for group in groups:
            end = max(ends[text] for text in group)
            used = mask[group, begin:end]
            arguments = (part, words[group, begin:end], used, temp_attention, gram)
            if recompute:
                cosines = checkpoint(word_cosines, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                cosines = word_cosines(*arguments)
            columns.append(aggregate(temp_similarity * cosines, used, aggregation))
        rows.append(torch.cat(columns, dim=1))
    order = torch.tensor([text for group in groups for text in group], device=mask.device)
    return torch.cat(rows)[:, order.argsort()]


def attend(scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Softmax over the words of a text, then softmax over the regions of an image of `temperature` times that.

    Shape: scores (B, R, ..., W), mask broadcast to them -> the same; every word's weights sum to 1 over R
    """
    over_words = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (temperature * over_words).softmax(dim=1)


def gram_matrix(regions: Tensor) -> Tensor | None:
    """G = V V' of each image, (B, R, D) -> (B, R, R); None where regions outnumber dimensions, and G is no gain."""
    if regions.shape[1] > regions.shape[2]:
        return None
    with torch.autocast(regions.device.type, enabled=False):
        regions = widened(regions)
        return regions @ regions.transpose(1, 2)


def word_cosines(regions: Tensor, words: Tensor, mask: Tensor, temperature: float, gram: Tensor | None) -> Tensor:
    """cos(w_t, c_t) for every image and text, without ever holding the contexts c_t.

    w.c = sum_r a_r (v_r.w), and |c|^2 = a' G a with the Gram matrix G of an image's regions (`gram_matrix`). Without
    G the contexts are formed after all. The scores may be made in bf16 under autocast; everything after them is
    float32 (float64 stays).

    Shape: regions (B, R, D), words (n, W, D), mask (n, W), gram (B, R, R) or None -> (B, n, W)
    """
    (b, r, dim), (n, w, _) = regions.shape, words.shape
    scores = (regions.reshape(b * r, dim) @ words.reshape(n * w, dim).to(regions.dtype).T).view(b, r, n, w)
    with torch.autocast(regions.device.type, enabled=False):
        scores, words = widened(scores), widened(words)
        weights = attend(scores, mask, temperature)
        dots = (weights * scores).sum(dim=1)
        flat = weights.reshape(b, r, n * w)
        if gram is not None:
            squares = (flat * (gram @ flat)).sum(dim=1)
        else:
            squares = (widened(regions).transpose(1, 2) @ flat).square().sum(dim=1)
        lengths = squares.view(b, n, w).clamp(min=SQUARE_FLOOR).sqrt() * words.norm(dim=-1)
        return dots / lengths.clamp(min=PRODUCT_EPS)


def aggregate(values: Tensor, mask: Tensor, aggregation: Aggregation) -> Tensor:
    """Over the words of a text: log-sum-exp ("sum"), log-mean-exp ("mean") or maximum ("max").

    Shape: values (B, n, W), mask (n, W) -> (B, n)
    """
    values = values.masked_fill(~mask, float("-inf"))
    if aggregation == "max":
        return values.amax(dim=-1)
    total = values.logsumexp(dim=-1)
    return total - mask.sum(dim=-1, dtype=values.dtype).log() if aggregation == "mean" else total


def _window_bounds(mask: Tensor) -> tuple[int, list[int]]:
    """First column that any text uses, and one past the last column of each text, in one transfer from the device."""
    column = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    begin = mask.any(dim=0).long().argmax()
    begin, *ends = torch.cat([begin[None], (mask * column).amax(dim=1)]).tolist()
    empty = [text for text, end in enumerate(ends) if end == 0]
    if empty:
        raise ValueError(f"texts without words have no word-region similarity: rows {empty[:5]} of the batch")
    return begin, ends


def _groups(lengths: list[int], *, per_word: int, chunk_size: int) -> list[list[int]]:
    """Texts in groups of like length, so that little of a group is padding; each within the memory budget."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    groups: list[list[int]] = [[]]
    for text in order:
        size = len(groups[-1])
        if chunk_size:
            full = size == chunk_size
        else:
            too_long = size >= 8 and lengths[text] > 1.25 * lengths[groups[-1][0]]
            full = too_long or per_word * (size + 1) * lengths[text] > MEMORY_BUDGET
        if full and size:
            groups.append([])
        groups[-1].append(text)
    return groups
