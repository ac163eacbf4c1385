"""Several processes, one contrast: every rank encodes its share, and the objective sees the whole batch.

A contrastive loss over B pairs has B - 1 negatives for each pair. Splitting the batch over W processes and averaging
their losses would leave B / W - 1. Here the *features* are gathered instead, with their gradient (as in CLIP, Radford
et al., ICML 2021, section 2.5), and every rank computes the same loss on the same global batch.

Why no loss scaling is needed: call L the global loss. Each rank's backward sends dL/df of **all** features, the sum
over W equal ranks reaches the owner (W * dL/df_r), and DistributedDataParallel then divides by W. What is left is the
sum over ranks of dL/df_r * df_r/dtheta = dL/dtheta. The objective's own parameters get the mean of W equal dL/dtheta.

BatchNorm is the one difference: in training mode each rank normalises by the statistics of its own share, so the
encoders of W processes compute something else than those of one process. Frozen encoders, encoders without BatchNorm,
and (on GPUs) `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` give the gradients of the single process.
An objective that draws random numbers in its forward pass would draw other ones on every rank.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.types import Batch, ImageFeatures, TextBatch, TextFeatures


def launch(function: Callable[..., None], args: tuple[Any, ...] = (), *, num_processes: int = 1) -> None:
    """Call `function(*args)` in `num_processes` processes, from a script or a notebook cell, and wait for all of them.

    One process runs in place. More are forked by accelerate's `notebook_launcher` on a free port; on GPUs nothing may
    have touched CUDA before (restart the kernel if it has). Their return values are lost: let them write files.
    Raises ValueError for fewer than one process or for more processes than GPUs, and what a process raised otherwise.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; at least 1 is needed")
    if num_processes == 1:
        function(*args)
        return
    gpus = torch.cuda.device_count()
    if 0 < gpus < num_processes:
        raise ValueError(
            f"{num_processes} processes were asked for, but there are {gpus} GPUs; ask for {gpus} or fewer"
        )
    from accelerate import notebook_launcher  # slow to import

    threads = max(1, (os.cpu_count() or 1) // num_processes)

    def worker(*values: Any) -> None:
        # a forked child must not wait for OpenMP threads that only its parent has
        torch.set_num_threads(1 if gpus == 0 else threads)
        try:
            function(*values)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    notebook_launcher(worker, args=args, num_processes=num_processes, use_port=str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def world_size() -> int:
    """Number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        begin = dist.get_rank() * ctx.rows
        return gradient[begin : begin + ctx.rows]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Rows of all ranks, rank 0's first: (n, ...) -> (world size * n, ...); the identity in a single process.

    The gradient of a row is the **sum** of what all ranks send back for it. All ranks must give the same shape.
    Floating-point tensors are gathered as float32, bool and integers unchanged and without gradient.
    """
    if world_size() == 1:
        return tensor
    if tensor.is_floating_point():
        return _Gather.apply(tensor.float().contiguous())
    # not every backend knows bool
    plain = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    parts = [torch.empty_like(plain) for _ in range(world_size())]
    dist.all_gather(parts, plain.contiguous())
    return torch.cat(parts).to(tensor.dtype)


def _longest(length: int, device: torch.device) -> int:
    value = torch.tensor(length, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def _pad(tensor: Tensor, length: int, *, value: float = 0) -> Tensor:
    """Lengthen axis 1 of (N, W, ...) to `length`."""
    after = [0, 0] * (tensor.ndim - 2) + [0, length - tensor.shape[1]]
    return F.pad(tensor, after, value=value)


def gather_images(images: ImageFeatures) -> ImageFeatures:
    """Image features of the global batch, with gradient."""
    if world_size() == 1:
        return images
    gathered = {item.name: getattr(images, item.name) for item in fields(images)}
    return ImageFeatures(**{name: None if v is None else all_gather_with_grad(v) for name, v in gathered.items()})


def gather_texts(texts: TextFeatures) -> TextFeatures:
    """Text features of the global batch, with gradient; L and W are padded to the longest of all ranks."""
    if world_size() == 1:
        return texts
    longest = {
        1: _longest(texts.tokens.shape[1], texts.tokens.device),
        2: _longest(texts.words.shape[1], texts.words.device),
    }
    gathered = {}
    for item in fields(texts):
        value = getattr(texts, item.name)
        if value is not None and item.name != "sentence":
            per_token = item.name == "cls_attention" or item.name.startswith("token")
            value = _pad(value, longest[1 if per_token else 2], value=texts.PADDING.get(item.name, 0))
        gathered[item.name] = None if value is None else all_gather_with_grad(value)
    return TextFeatures(**gathered)


def gather_batch(batch: Batch, *, pixels: bool) -> Batch:
    """The global batch itself. Without `pixels` they are NaN of the right shape: they are large and few read them."""
    if world_size() == 1:
        return batch
    length = _longest(batch.text.input_ids.shape[1], batch.text.input_ids.device)
    text = {}
    for item in fields(TextBatch):
        value = getattr(batch.text, item.name)
        if isinstance(value, Tensor):
            padding = -1 if item.name in ("word_ids", "sentence_ids") else 0
            text[item.name] = all_gather_with_grad(_pad(value, length, value=padding))
    if pixels:
        gathered = all_gather_with_grad(batch.pixels)
    else:
        shape = (world_size() * len(batch.pixels), *batch.pixels.shape[1:])
        gathered = batch.pixels.new_full((), float("nan")).expand(shape)
    return replace(
        batch,
        pixels=gathered,
        text=TextBatch(**text),
        labels=all_gather_with_grad(batch.labels),
        index=all_gather_with_grad(batch.index),
    )


class GlobalBatch(nn.Module):
    """One training step's forward pass, from this rank's `Batch` to the loss over the batches of all ranks.

    `forward(batch)` gives (total, terms by name). `alone=True` leaves the other ranks out (validation batches).
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, *, alone: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        if alone or world_size() == 1:
            output = self.model(batch)
        else:
            images = gather_images(self.model.encode_images(batch.pixels))
            texts = gather_texts(self.model.encode_texts(batch.text))
            objective = self.model.objective
            output = objective(images, texts, gather_batch(batch, pixels=objective.needs.pixels))
        return output.total, output.terms
