"""Pretraining: one objective on one dataset, from a model to `best.pt`, `last.pt` and a history, resumable any time.

Small parts of the loop: optimiser, batch on its device, losses as numbers, the check that they are finite.

The loop of `pretrain`. It is plain: accelerate places tensors, casts to 16 bits and averages gradients; everything
that decides a number (order of studies, learning rate, random states) is in sight here and in `last.pt`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.dataset import Collate, StudyDataset, make_loader
from gloria_core.training.config import PretrainConfig
from gloria_core.training.distributed import GlobalBatch
from gloria_core.training.precision import accelerate_name, choose_precision
from gloria_core.training.progress import Progress, Silence
from gloria_core.training.resume import (
    RunFiles,
    TrainingError,
    TrainingState,
    all_random_states,
    check_same_run,
    own_randomness,
    random_state,
    run_identity,
    set_random_state,
)
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


class Run:
    """The moving parts of one call of `pretrain`."""

    def __init__(
        self,
        model: VisionLanguageModel,
        train: StudyDataset,
        valid: StudyDataset,
        config: PretrainConfig,
        *,
        files: RunFiles,
        collate: Collate,
        progress: Progress,
        accelerator: Accelerator,
        precision: str,
        after_epoch: Callable[[int, VisionLanguageModel], None] | None = None,
    ) -> None:
        self.after_epoch = after_epoch
        self.model, self.train, self.valid, self.config, self.files = model, train, valid, config, files
        self.collate, self.progress, self.accelerator, self.precision = collate, progress, accelerator, precision
        self.device, self.rank, self.processes = (
            accelerator.device,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.steps_per_epoch = steps_per_epoch(train, valid, config, processes=self.processes)
        self.identity = run_identity(config, model.config, train, valid, precision=precision, processes=self.processes)
        self.state = TrainingState()
        model.to(self.device, memory_format=torch.channels_last)
        starts = model.objective.plan(config.epochs)
        rates = config.stage_factors or model.objective.stage_rates()
        optimizer, self.schedule = optimizer_and_schedule(
            model, config, steps_per_epoch=self.steps_per_epoch, starts=starts, factors=rates
        )
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.forward = GlobalBatch(model)
        self.parallel, self.optimizer = accelerator.prepare(self.forward, optimizer)
        self.overflows = 0
        self.saved_at = self.began = time.monotonic()

    def to_the_end(self) -> pd.DataFrame:
        state = self._resume()
        if not self._finished():
            self.files.open_log(state.step)
            self.progress.start(epochs=self.config.epochs, steps_per_epoch=self.steps_per_epoch, history=state.history)
        try:
            while not self._finished():
                self.began = time.monotonic()
                means = self._train_epoch()
                self._end_epoch(means, self._validate(list(means)))
        finally:
            self.files.close()
        ending = "finished" if state.epoch == self.config.epochs else "stopped early"
        self.progress.finish(
            f"{ending} after epoch {state.epoch} of {self.config.epochs}; "
            f"lowest validation loss {state.best:.4g} in epoch {state.best_epoch}"
        )
        return pd.DataFrame(state.history)

    def _finished(self) -> bool:
        state, config = self.state, self.config
        last_stage = state.epoch > self.schedule.starts[-1]
        tired = config.patience > 0 and last_stage and state.epochs_without_gain >= config.patience
        return state.batch == 0 and (state.epoch >= config.epochs or tired)

    def _resume(self) -> TrainingState:
        if not self.files.last.exists():
            return self.state
        content = native.read(self.files.last)
        saved = content["training_state"]
        check_same_run(saved["run"], self.identity, self.files.last)
        self.state = TrainingState.from_dict(saved["state"])
        if self.state.batch:
            # before the weights: what the objective does as this epoch starts was done before they were saved
            self.model.objective.on_epoch(self.state.epoch)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.files.write_history(self.state.history)
        set_random_state(saved["random"][self.rank], self.device)
        return self.state

    def _save_last(self) -> None:
        state, now, scaler = self.state, time.monotonic(), self.accelerator.scaler
        state.seconds, self.began = state.seconds + now - self.began, now
        training = {
            "run": self.identity,
            "state": state.as_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": all_random_states(self.device),
        }
        self.files.save_last(self.model, training)
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _save_due(self) -> bool:
        if self.config.checkpoint_steps and self.state.step % self.config.checkpoint_steps == 0:
            return True
        if not self.config.checkpoint_seconds:
            return False
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if self.processes == 1:
            return due
        if due:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()  # clocks differ, and saving needs every rank

    def _train_epoch(self) -> dict[str, float]:
        """The rest of the epoch under way; returns the means of its loss terms and of the gradient norm."""
        state, config = self.state, self.config
        if state.batch == 0:
            self.model.objective.on_epoch(state.epoch)
            if self.schedule.begins(state.epoch):
                self._begin_stage()
        self.parallel.train()
        loader = make_loader(
            self.train,
            self.collate,
            batch_size=config.batch_size // self.processes,
            shuffle=True,
            seed=config.seed,
            epoch=state.epoch,
            drop_last=True,
            workers=config.workers,
            rank=self.rank,
            world_size=self.processes,
            skip_batches=state.batch,
        )
        held = random_state(self.device)
        batches = iter(loader)  # may draw a seed for its workers, which the undisturbed run drew only once
        if state.batch:
            set_random_state(held, self.device)
        mark = time.monotonic()
        for batch in batches:
            values = self._step(batch)
            state.images, state.train_seconds = state.images + config.batch_size, state.train_seconds - mark
            mark = time.monotonic()
            state.train_seconds += mark
            self._report(values)
            if state.batch < self.steps_per_epoch and self._save_due():
                self._save_last()
        if state.batch != self.steps_per_epoch:
            raise TrainingError(f"epoch {state.epoch + 1} had {state.batch} batches instead of {self.steps_per_epoch}")
        return {name: total / state.counts[name] for name, total in state.sums.items()}

    def _begin_stage(self) -> None:
        """Forget what belongs to the loss of the stage before: the optimiser's moments and the best validation loss."""
        self.optimizer.optimizer.state.clear()
        self.state.best, self.state.best_epoch = math.inf, self.state.epoch

    def _step(self, batch: Batch) -> dict[str, float]:
        state = self.state
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total, terms = self.parallel(on_device(batch, self.device))
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.gradient_clip or math.inf)
        values = numbers({"total": total, **terms, "gradient_norm": norm})
        self._check(values, batch, self.train)
        self.optimizer.step()
        state.step, state.batch = state.step + 1, state.batch + 1
        state.add(values)
        return values

    def _check(self, values: dict[str, float], batch: Batch, data: StudyDataset) -> None:
        """Raise for a number that is not finite, before it reaches the weights or the history."""
        overflow = self.precision == "float16" and math.isinf(values.get("gradient_norm", 0.0))
        self.overflows = self.overflows + 1 if overflow else 0
        if overflow and self.overflows < 20:
            # the loss scale was too high: the scaler skips this step and lowers it
            values = {name: value for name, value in values.items() if name != "gradient_norm"}
        step = self.state.step + (data is self.train)
        studies = data.frame["study_id"].iloc[batch.index.tolist()]
        check_finite(values, f"epoch {self.state.epoch + 1}, step {step}", studies)

    def _report(self, values: dict[str, float]) -> None:
        state, losses = self.state, {name: value for name, value in values.items() if name != "gradient_norm"}
        rate = self.schedule.at(state.step - 1)
        logged = {f"train/{name}": value for name, value in losses.items()}
        logged |= {"gradient_norm": values["gradient_norm"], "learning_rate": rate}
        self.files.scalars(logged, state.step)
        self.progress.step(
            epoch=state.epoch + 1,
            step=state.batch,
            values=losses,
            learning_rate=rate,
            images_per_second=state.images / max(state.train_seconds, 1e-9),
        )

    @torch.no_grad()
    def _validate(self, names: list[str]) -> dict[str, float]:
        """Mean loss terms over the validation studies. Ranks share the batches, whose composition stays the same."""
        loader = validation_loader(self.valid, self.collate, self.config, rank=self.rank, world_size=self.processes)
        self.parallel.eval()
        sums = dict.fromkeys((name for name in names if name != "gradient_norm"), 0.0)
        for batch in loader:
            total, terms = self.forward(on_device(batch, self.device), alone=True)
            values = numbers({"total": total, **terms})
            self._check(values, batch, self.valid)
            for name in sums:
                sums[name] += values[name] * len(batch.pixels)
        vector = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        return dict(zip(sums, (self.accelerator.reduce(vector, "sum") / len(self.valid)).tolist(), strict=True))

    def _end_epoch(self, train: dict[str, float], valid: dict[str, float]) -> None:
        state, norm = self.state, train.pop("gradient_norm", math.nan)
        state.epoch, state.batch = state.epoch + 1, 0
        row = {
            "epoch": state.epoch,
            "step": state.step,
            "learning_rate": self.schedule.at(state.step - 1),
            **{f"train_{name}": value for name, value in train.items()},
            **{f"valid_{name}": value for name, value in valid.items()},
            "gradient_norm": norm,
            "images_per_second": state.images / max(state.train_seconds, 1e-9),
            "seconds": state.seconds + time.monotonic() - self.began,
        }
        state.history.append(row)
        state.clear_epoch()
        self.schedule.after_epoch(state.epoch - 1, valid["total"])
        self.files.scalars({f"valid/{name}": value for name, value in valid.items()}, state.step)
        if valid["total"] < state.best:
            state.best, state.best_epoch = valid["total"], state.epoch
            self.files.save_best(self.model, {"epoch": state.epoch, **{f"valid_{n}": v for n, v in valid.items()}})
        if self.after_epoch is not None:
            self.after_epoch(state.epoch, self.model)
        self.began = time.monotonic()
        self._save_last()
        state.seconds = 0.0
        self.files.write_history(state.history)
        self.progress.epoch(row)


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
