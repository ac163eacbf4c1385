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

import os
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

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
        raise ValueError(f"num_processes is {num_processes}, but there are {gpus} GPUs; give {gpus} or fewer")
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

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    notebook_launcher(worker, args=args, num_processes=num_processes, use_port=port)


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


Features = TypeVar("Features", ImageFeatures, TextFeatures, TextBatch)


def gather(features: Features) -> Features:
    """Features or texts of the global batch, with gradient; axis 1 is padded to the longest of all ranks."""
    if world_size() == 1:
        return features
    values = {item.name: getattr(features, item.name) for item in fields(features)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    device = next(iter(tensors.values())).device
    longest = torch.tensor([value.shape[1] for value in tensors.values()], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    for (name, value), length in zip(tensors.items(), longest.tolist(), strict=True):
        after = [0, 0] * (value.ndim - 2) + [0, length - value.shape[1]]
        tensors[name] = all_gather_with_grad(F.pad(value, after, value=features.PADDING.get(name, 0)))
    return type(features)(**tensors)  # the words of a text are for people, and stay behind


def gather_batch(batch: Batch, *, pixels: bool) -> Batch:
    """The global batch itself. Without `pixels` they are NaN of the right shape: they are large and few read them."""
    if world_size() == 1:
        return batch
    if pixels:
        gathered = all_gather_with_grad(batch.pixels)
    else:
        shape = (world_size() * len(batch.pixels), *batch.pixels.shape[1:])
        gathered = batch.pixels.new_full((), float("nan")).expand(shape)
    labels, index = all_gather_with_grad(batch.labels), all_gather_with_grad(batch.index)
    return replace(batch, pixels=gathered, text=gather(batch.text), labels=labels, index=index)


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
            images = gather(self.model.encode_images(batch.pixels))
            texts = gather(self.model.encode_texts(batch.text))
            objective = self.model.objective
            output = objective(images, texts, gather_batch(batch, pixels=objective.needs.pixels))
        return output.total, output.terms
