"""Pretraining of one objective on one dataset, from a model to `best.pt`, `last.pt` and a history.

accelerate places tensors, casts to 16 bits, averages gradients and writes the log. Everything that decides a number
(order of studies, learning rate, random states) is in sight here and in `last.pt`, from which a killed run goes on.

Order at the end of an epoch: best.pt, last.pt, history.csv. A run killed in between starts again from the older last.pt
and writes the same files once more; last.pt alone says how far the run is. No file is ever half-written.
"""

import copy
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.dataset import Collate, StudyDataset, make_loader
from gloria_core.data.files import atomic_write
from gloria_core.training import resume
from gloria_core.training.config import PretrainConfig
from gloria_core.training.distributed import GlobalBatch
from gloria_core.training.precision import choose_precision
from gloria_core.training.progress import Progress
from gloria_core.training.resume import TrainingError, TrainingState
from gloria_core.training.schedule import learning_rate, make_optimizer
from gloria_core.types import Batch

# Steps in a row that float16 may skip while it looks for its loss scale.
MAX_OVERFLOWS = 20


def pretrain(
    model: VisionLanguageModel,
    train: StudyDataset,
    valid: StudyDataset,
    config: PretrainConfig,
    *,
    folder: str | Path,
    show: bool = True,
    device: torch.device | str | None = None,
    after_epoch: Callable[[int, VisionLanguageModel], None] | None = None,
) -> pd.DataFrame:
    """Train `model` in place and return the history, one row an epoch.

    Writes into `folder`: `last.pt` (end of every epoch, and between as the config says), `best.pt` (lowest validation
    total; `native.load` gives the model to use), `history.csv`, `tensorboard/`. If `last.pt` is there, the run goes on
    from it: on a CPU to the very numbers of an undisturbed run. A finished run returns its history at once, or with
    more `epochs` goes on at the learning rates of the longer run (not an objective with stages). At the end `model`
    holds the last epoch's weights. `valid` may be empty: `best.pt` is then the last epoch.

    History columns: epoch (from 1), step (optimiser steps so far), learning_rate (of the last step), train_total and
    train_<term> (means over the epoch's steps, dropout on), valid_total and valid_<term> (means over studies, eval
    mode, batches of `batch_size` in fixed order; absent without validation studies), gradient_norm (mean norm before
    clipping), images_per_second (training only), seconds (of the epoch, validation included).

    `after_epoch(epoch, model)` is called at the end of every epoch (from 1), before its checkpoint is written, by the
    first process alone; it may look at the model and must leave it, and the random states, as they were.
    `device` is "cpu", "cuda" or None for the GPU if there is one; `show=False` prints nothing. Raises TrainingError for
    a loss that is not finite (with epoch, step and studies), for too few studies, and for a `last.pt` of another run,
    naming what differs.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = choose_precision(device, config.precision)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision],
        log_with="tensorboard",
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):  # the caller's random state stays as it was
            torch.manual_seed(config.seed + accelerator.process_index)
            run = Pretraining(model, train, valid, config, Path(folder), accelerator, precision)
            return run.to_the_end(after_epoch, show=show)
    finally:
        # accelerate keeps one state for the process; the next run may want another precision or device
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclass
class Pretraining:
    """The model, optimiser and state of one call of `pretrain`."""

    model: VisionLanguageModel
    train: StudyDataset
    valid: StudyDataset
    config: PretrainConfig
    folder: Path
    accelerator: Accelerator
    precision: str

    def __post_init__(self) -> None:
        model, config, accelerator, size = self.model, self.config, self.accelerator, self.config.batch_size
        self.collate, self.device, self.main = model.collate(), accelerator.device, accelerator.is_main_process
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        if len(self.train) < size:
            raise TrainingError(f"{len(self.train)} training studies do not fill one batch of {size}: lower batch_size")
        if size % self.processes:
            raise TrainingError(f"{self.processes} processes cannot share a batch_size of {size}: choose a multiple")
        self.steps_per_epoch = len(self.train) // size
        self.identity = resume.run_identity(
            config, model.config, self.train, self.valid, precision=self.precision, processes=self.processes
        )
        self.state, self.overflows, self.clock = TrainingState(), 0, time.monotonic()
        self.stage_starts = model.objective.plan(config.epochs)
        self.stage_rates = model.objective.stage_rates() or (1.0,) * len(self.stage_starts)
        model.to(self.device, memory_format=torch.channels_last)
        settings = {name: getattr(config, name) for name in ("learning_rate", "betas", "weight_decay")}
        optimizer = make_optimizer(model, config.optimizer, **settings)
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.forward = GlobalBatch(model)
        self.parallel, self.optimizer = accelerator.prepare(self.forward, optimizer)

    def to_the_end(self, after_epoch: Callable[[int, VisionLanguageModel], None] | None, *, show: bool) -> pd.DataFrame:
        """Resume where `last.pt` says, train to the last epoch or until `patience` is over, and return the history."""
        self._resume()
        state, config = self.state, self.config
        progress = Progress(
            epochs=config.epochs, steps_per_epoch=self.steps_per_epoch, step=state.step, show=show and self.main
        )
        if not self._finished():  # what a killed run logged after its checkpoint is void
            logs = {"tensorboard": {"purge_step": state.step + 1}}
            self.accelerator.init_trackers("tensorboard", init_kwargs=logs)
        try:
            while not self._finished():
                self._train_epoch(progress)
                self._end_epoch(self._validate(), after_epoch if self.main else None)
                progress.epoch(state.history)
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        ending = "finished" if state.epoch == config.epochs else "stopped early"
        kept = "without validation studies, best.pt is the last epoch"
        if len(self.valid):
            kept = f"lowest validation loss {state.best:.4g} in epoch {state.best_epoch}"
        progress.finish(f"{ending} after epoch {state.epoch} of {config.epochs}; {kept}")
        return pd.DataFrame(state.history)

    def _finished(self) -> bool:
        state, patience = self.state, self.config.patience
        in_last_stage = state.epoch > self.stage_starts[-1]
        stalled = patience > 0 and in_last_stage and state.epoch - state.best_epoch >= patience
        return state.batch == 0 and (state.epoch >= self.config.epochs or stalled)

    def _learning_rate(self, step: int) -> float:
        """Every stage has a schedule of its own, with its share of the configured rate."""
        stage = bisect_right(self.stage_starts, step // self.steps_per_epoch) - 1
        start, end = (*self.stage_starts, self.config.epochs)[stage : stage + 2]
        total = (end - start) * self.steps_per_epoch
        return learning_rate(
            step - start * self.steps_per_epoch,
            total_steps=total,
            base=self.config.learning_rate * self.stage_rates[stage],
            warmup_steps=round(self.config.warmup_fraction * total),
            schedule=self.config.schedule,
        )

    def _train_epoch(self, progress: Progress) -> None:
        """The rest of the epoch under way."""
        state, config = self.state, self.config
        if state.batch == 0:
            self.model.objective.on_epoch(state.epoch)
            if state.epoch in self.stage_starts[1:]:
                # the loss is another: forget the optimiser's moments and the best validation loss
                self.optimizer.optimizer.state.clear()
                state.best, state.best_epoch = math.inf, state.epoch
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
        before = resume.random_state(self.device)
        batches = iter(loader)  # may draw a seed for its workers, which the undisturbed run drew only once
        if state.batch:
            resume.set_random_state(before, self.device)
        self.clock = time.monotonic()
        for batch in batches:
            values = self._step(batch)
            now = time.monotonic()
            state.seconds, self.clock = state.seconds + now - self.clock, now
            norm = values.pop("gradient_norm")
            logged = {f"train/{name}": value for name, value in values.items()}
            rate = self._learning_rate(state.step - 1)
            self.accelerator.log(logged | {"gradient_norm": norm, "learning_rate": rate}, step=state.step)
            progress.step(values)
            due = config.checkpoint_steps and state.step % config.checkpoint_steps == 0
            if due and state.batch < self.steps_per_epoch:
                self._save_last()
        if state.batch != self.steps_per_epoch:
            raise TrainingError(f"epoch {state.epoch + 1} had {state.batch} batches instead of {self.steps_per_epoch}")

    def _step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; returns the loss terms and the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.state.step)
        self.optimizer.zero_grad(set_to_none=True)
        total, terms = self.parallel(on_device(batch, self.device))
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.gradient_clip or math.inf)
        values = numbers({"total": total, **terms, "gradient_norm": norm})
        overflow = self.precision == "float16" and math.isinf(values["gradient_norm"])
        self.overflows = self.overflows + 1 if overflow else 0
        # after an overflow the scaler skips the step and lowers the loss scale
        checked = terms.keys() | {"total"} if 0 < self.overflows < MAX_OVERFLOWS else values.keys()
        self._check_finite({name: values[name] for name in checked}, self.state.step + 1, batch, self.train)
        self.optimizer.step()
        self.state.add(values)
        return values

    def _check_finite(self, values: Mapping[str, float], step: int, batch: Batch, data: StudyDataset) -> None:
        """Raise TrainingError before NaN or infinity reaches the weights or the history."""
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            studies = ", ".join(data.frame["study_id"].iloc[batch.index.tolist()].astype(str))
            raise TrainingError(
                f"{', '.join(bad)} in epoch {self.state.epoch + 1}, step {step}; studies of the batch: {studies}. Look "
                'at them; if they are sound, lower learning_rate or train with precision="float32"'
            )

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Mean loss terms over the validation studies; {} where there are none.

        Ranks share the batches, whose composition stays the same.
        """
        if not len(self.valid):
            return {}
        loader = validation_loader(self.valid, self.collate, self.config, rank=self.rank, world_size=self.processes)
        self.parallel.eval()
        sums = dict.fromkeys((name for name in self.state.sums if name != "gradient_norm"), 0.0)
        for batch in loader:
            total, terms = self.forward(on_device(batch, self.device), alone=True)
            values = numbers({"total": total, **terms})
            self._check_finite(values, self.state.step, batch, self.valid)
            for name in sums:
                sums[name] += values[name] * len(batch.pixels)
        vector = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
        return dict(zip(sums, (self.accelerator.reduce(vector, "sum") / len(self.valid)).tolist(), strict=True))

    def _end_epoch(
        self, valid: dict[str, float], after_epoch: Callable[[int, VisionLanguageModel], None] | None
    ) -> None:
        """Add a row to the history and write the files of the epoch."""
        state = self.state
        training_seconds, train = state.seconds, state.end_epoch()
        norm = train.pop("gradient_norm", math.nan)
        validation = {f"valid_{name}": value for name, value in valid.items()}
        row = {
            "epoch": state.epoch,
            "step": state.step,
            "learning_rate": self._learning_rate(state.step - 1),
            **{f"train_{name}": value for name, value in train.items()},
            **validation,
            "gradient_norm": norm,
            "images_per_second": self.steps_per_epoch * self.config.batch_size / max(training_seconds, 1e-9),
            "seconds": training_seconds + time.monotonic() - self.clock,
        }
        state.history.append(row)
        self.accelerator.log({f"valid/{name}": value for name, value in valid.items()}, step=state.step)
        if not valid or valid["total"] < state.best:
            state.best, state.best_epoch = valid.get("total", math.inf), state.epoch
            if self.main:
                native.save(self.folder / "best.pt", self.model, extra={"epoch": state.epoch, **validation})
        if after_epoch is not None:
            after_epoch(state.epoch, self.model)
        self._save_last()
        self._write_history()

    def _write_history(self) -> None:
        if self.main and self.state.history:
            atomic_write(self.folder / "history.csv", pd.DataFrame(self.state.history).to_csv(index=False))

    def _save_last(self) -> None:
        """Write last.pt, from which the run can go on."""
        scaler = self.accelerator.scaler
        training_state = {
            "run": self.identity,
            "state": asdict(self.state),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": resume.all_random_states(self.device),
        }
        if self.main:
            native.save(self.folder / "last.pt", self.model, training_state=training_state)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Go on from last.pt, if it is there."""
        last = self.folder / "last.pt"
        if self.main:
            for leftover in self.folder.glob(".*.tmp"):  # what a kill in the middle of a save leaves
                leftover.unlink()
        if not last.exists():
            return
        content = native.read(last)
        saved = content["training_state"]
        self.state = TrainingState(**saved["state"])
        if self.state.epoch == saved["run"]["epochs"] < self.config.epochs and len(self.stage_starts) == 1:
            saved["run"]["epochs"] = self.config.epochs  # a finished run may be given more
        resume.check_same_run(saved["run"], self.identity, last)
        if self.state.batch:
            # before the weights: what the objective does as this epoch starts was done before they were saved
            self.model.objective.on_epoch(self.state.epoch)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self._write_history()
        resume.set_random_state(saved["random"][self.rank], self.device)


def best_losses(history: pd.DataFrame, *, since: int = 0) -> pd.DataFrame:
    """Metrics rows (split, target, metric, value) of the loss terms of the epoch that `best.pt` holds.

    Of the validation, or without validation studies of the training in the last epoch. `since`: how many epochs went
    before the last stage, whose loss was another.
    """
    last = history[history["epoch"] > since]
    split = "valid" if "valid_total" in last else "train"
    best = last.loc[last["valid_total"].idxmin()] if split == "valid" else last.iloc[-1]
    terms = best.filter(like=f"{split}_").dropna().rename(lambda name: name.removeprefix(f"{split}_"))
    return pd.DataFrame({"split": split, "target": terms.index, "metric": "loss", "value": terms.to_numpy(float)})


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, each image with its channels innermost in memory, which convolutions are fastest with."""
    batch = batch.to(device)
    images = batch.pixels.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return replace(batch, pixels=images.unflatten(0, batch.pixels.shape[:2]))


def numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars as Python numbers, with one transfer from the device."""
    stacked = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    return dict(zip(values, stacked.tolist(), strict=True))


def validation_loader(
    data: StudyDataset, collate: Collate, config: PretrainConfig, *, rank: int, world_size: int
) -> DataLoader[Batch]:
    """Every `world_size`-th batch of the validation studies, from batch `rank` on.

    A contrastive loss depends on which studies share a batch; here that depends on nothing but `batch_size`.
    """
    data = copy.copy(data)
    data.set_epoch(0)
    batches = [part.tolist() for part in torch.arange(len(data)).split(config.batch_size)]
    return DataLoader(
        data,
        batch_sampler=batches[rank::world_size],
        collate_fn=collate,
        num_workers=config.workers,
        generator=torch.Generator(),  # its own, or it would draw from the generator that dropout uses
    )
