"""Pretraining: one objective on one dataset, from a model to `best.pt`, `last.pt` and a history, resumable any time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.loader import Collate, StudyDataset
from gloria_core.training.config import PretrainConfig
from gloria_core.training.files import RunFiles
from gloria_core.training.loop import Run
from gloria_core.training.precision import accelerate_name, choose_precision
from gloria_core.training.progress import Progress, Silence
from gloria_core.training.resume import TrainingError, own_randomness

__all__ = ["PretrainConfig", "TrainingError", "pretrain"]


def pretrain(
    model: VisionLanguageModel,
    train: StudyDataset,
    valid: StudyDataset,
    config: PretrainConfig,
    *,
    folder: str | Path,
    collate: Collate | None = None,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    after_epoch: Callable[[int, VisionLanguageModel], None] | None = None,
) -> pd.DataFrame:
    """Train `model` in place and return the history, one row an epoch.

    Writes into `folder`: `last.pt` (end of every epoch, and between as the config says), `best.pt` (lowest validation
    total; `native.load` gives the model to use), `history.csv`, `tensorboard/`. If `last.pt` is there, the run goes on
    from it: on a CPU to the very numbers of an undisturbed run. A finished run returns its history at once. At the end
    `model` holds the last epoch's weights.

    History columns: epoch (from 1), step (optimiser steps so far), learning_rate (of the last step), train_total and
    train_<term> (means over the epoch's steps, dropout on), valid_total and valid_<term> (means over studies, eval
    mode, batches of `batch_size` in fixed order), gradient_norm (mean norm before clipping), images_per_second
    (training only), seconds (of the epoch, validation included).

    `after_epoch(epoch, model)` is called at the end of every epoch (from 1), before its checkpoint is written, by the
    first process alone; it may look at the model and must leave it, and the random states, as they were.
    `device` is "cpu", "cuda" or None for the GPU if there is one. Raises TrainingError for a loss that is not finite
    (with epoch, step and studies), for too few studies, and for a `last.pt` of another run, naming what differs.
    """
    if collate is None:
        chosen = model.config
        collate = Collate(model.tokenizer, channels=chosen.channels, norm=chosen.norm, max_tokens=chosen.max_tokens)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = choose_precision(device, config.precision)
    accelerator = Accelerator(
        cpu=torch.device(device).type == "cpu",
        mixed_precision=accelerate_name(precision),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    main = accelerator.is_main_process
    try:
        with own_randomness(config.seed + accelerator.process_index, accelerator.device):
            run = Run(
                model,
                train,
                valid,
                config,
                files=RunFiles(Path(folder), writes=main),
                collate=collate,
                progress=(progress or Progress()) if main else Silence(),
                accelerator=accelerator,
                precision=precision,
                after_epoch=after_epoch if main else None,
            )
            return run.to_the_end()
    finally:
        # accelerate keeps one state for the process; the next run may want another precision or device
        AcceleratorState._reset_state(reset_partial_state=True)
