"""Items -> batches, in an order that depends on the seed and the epoch only.

Nothing here depends on the number of workers or processes, so a training run can be resumed in the middle of an epoch
and repeated with several processes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerFast

from gloria_core.data.images import Norm, to_tensor
from gloria_core.data.studies import Images, StudyDataset, StudyItem
from gloria_core.data.tokenizer import tokenize
from gloria_core.types import Batch

__all__ = ["Collate", "Images", "StudyDataset", "StudyItem", "make_loader"]


class Collate:
    """Items -> Batch: pads and tokenises the texts, normalises the pixels as `images.to_tensor` does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        channels: int = 3,
        norm: Norm = "half",
        max_tokens: int = 97,
    ) -> None:
        self.tokenizer, self.channels, self.norm, self.max_tokens = tokenizer, channels, norm, max_tokens

    def __call__(self, items: Sequence[StudyItem]) -> Batch:
        """Shape: pixels (B, V, C, crop, crop) float32; N = B * T texts, study-major."""
        pixels = torch.from_numpy(np.stack([item.pixels for item in items]))
        return Batch(
            pixels=to_tensor(pixels, channels=self.channels, norm=self.norm),
            text=tokenize(
                self.tokenizer,
                [text for item in items for text in item.texts],
                max_tokens=self.max_tokens,
                sentence_spans=[spans for item in items for spans in item.spans],
                names=[f"study {item.study_id}" for item in items for _ in item.texts],
            ),
            labels=torch.from_numpy(np.stack([item.labels for item in items])),
            index=torch.tensor([item.index for item in items]),
        )


class _Batches(Sampler[list[int]]):
    """Lists of item numbers, one a batch."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def make_loader(
    dataset: StudyDataset,
    collate: Collate,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    epoch: int | None = None,
    drop_last: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    skip_batches: int = 0,
) -> DataLoader[Batch]:
    """Loader of one epoch; make a new one for the next.

    `batch_size` counts the studies of one process, as torch does. Batch k of the `world_size` processes, joined in the
    order of the ranks, is batch k of a single process with `world_size` times the batch size. `epoch` (default: the
    dataset's) sets the order together with `seed`, and the draws of the items; the dataset itself is left as it is.
    `skip_batches` leaves out the first ones without reading them.

    Raises: ValueError when the last batch cannot be shared, or there is no whole batch with drop_last.
    """
    if not 0 <= rank < world_size or batch_size < 1:
        raise ValueError(f"rank={rank}, world_size={world_size}, batch_size={batch_size}: rank from 0, sizes from 1")
    current = copy.copy(dataset)
    if epoch is not None:
        current.set_epoch(epoch)
    n = len(current)
    order = np.random.default_rng([seed, current.epoch]).permutation(n) if shuffle else np.arange(n)
    together = batch_size * world_size
    stop = n - n % together if drop_last else n
    if stop == 0:
        raise ValueError(f"{n} studies make no batch of {batch_size} x {world_size}; use a smaller batch_size")
    whole = [order[start : min(start + together, stop)] for start in range(0, stop, together)]
    if len(whole[-1]) < world_size:
        raise ValueError(f"the last batch has {len(whole[-1])} studies for {world_size} processes; use drop_last=True")
    shares = [np.array_split(batch, world_size)[rank].tolist() for batch in whole[skip_batches:]]
    return DataLoader(current, batch_sampler=_Batches(shares), collate_fn=collate, num_workers=workers)
