"""Small parts of the loop: optimiser, batch on its device, losses as numbers, the check that they are finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gloria_core.data.loader import Collate, StudyDataset
from gloria_core.training.config import PretrainConfig
from gloria_core.training.resume import TrainingError
from gloria_core.training.schedule import StagedSchedule, make_optimizer
from gloria_core.types import Batch


def steps_per_epoch(train: StudyDataset, valid: StudyDataset, config: PretrainConfig, *, processes: int) -> int:
    """Whole batches in the training studies. Raises TrainingError where there is none, or nothing to validate on."""
    size = config.batch_size
    if len(train) < size:
        raise TrainingError(f"{len(train)} training studies do not fill one batch of {size}: lower batch_size")
    if len(valid) == 0:
        raise TrainingError("there is no validation study: give the manifest rows with split valid")
    if size % processes:
        raise TrainingError(f"{processes} processes cannot share a batch_size of {size}: choose a multiple")
    return len(train) // size


def optimizer_and_schedule(
    model: nn.Module,
    config: PretrainConfig,
    *,
    steps_per_epoch: int,
    starts: tuple[int, ...] = (0,),
    factors: tuple[float, ...] = (),
) -> tuple[torch.optim.Optimizer, StagedSchedule]:
    """What `config` asks for, over the trainable parameters of `model`; `starts` are the first epochs of its stages,
    `factors` their shares of the learning rate.
    """
    optimizer = make_optimizer(
        model,
        config.optimizer,
        learning_rate=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    schedule = StagedSchedule(
        config.schedule,
        base=config.learning_rate,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        starts=starts,
        factors=factors,
        warmup_fraction=config.warmup_fraction,
        plateau_factor=config.plateau_factor,
        plateau_patience=config.plateau_patience,
    )
    return optimizer, schedule


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, each image with its channels innermost in memory, which convolutions are fastest with."""
    batch = batch.to(device)
    b, v = batch.pixels.shape[:2]
    images = batch.pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return replace(batch, pixels=images.unflatten(0, (b, v)))


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one transfer from the device."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def check_finite(values: Mapping[str, float], where: str, studies: Iterable[str]) -> None:
    """Raise TrainingError for NaN or infinity among `values`, with the place and the studies of the batch."""
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{', '.join(bad)} in {where}; studies of the batch: {', '.join(map(str, studies))}. Look at them; "
            'if they are sound, lower learning_rate or train with precision="float32"'
        )


def validation_loader(
    data: StudyDataset, collate: Collate, config: PretrainConfig, *, rank: int, world_size: int
) -> DataLoader[Batch]:
    """Every `world_size`-th batch of the validation studies, from batch `rank` on.

    A contrastive loss depends on which studies share a batch; here that depends on nothing but `batch_size`.
    """
    data = copy.copy(data)
    data.set_epoch(0)
    size, count = config.batch_size, len(data)
    batches = [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
    return DataLoader(
        data,
        batch_sampler=batches[rank::world_size],
        collate_fn=collate,
        num_workers=config.workers,
        generator=torch.Generator(),  # its own, or it would draw from the generator that dropout uses
    )
