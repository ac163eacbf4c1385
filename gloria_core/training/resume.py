"""What a killed run needs to go on to the same numbers: counters, random states, a check that it is the same run.

What a pretraining run writes: `last.pt`, `best.pt`, `history.csv` and a TensorBoard log; no file is half-written.

Order at the end of an epoch: best.pt, last.pt, history.csv. A run killed in between starts again from the older last.pt
and writes the same files once more; last.pt alone says how far the run is.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import ModelConfig, VisionLanguageModel
from gloria_core.data.dataset import StudyDataset
from gloria_core.training.config import PretrainConfig
from gloria_core.training.distributed import world_size


class RunFiles:
    """The files of one run in `folder`. Only a process with `writes=True` writes; others may call all the same."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.last, self.best = folder / "last.pt", folder / "best.pt"
        self._log = None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            for path in (self.last, self.best):  # what a kill in the middle of a save leaves beside the file
                for leftover in folder.glob(f".{path.name}.*.tmp"):
                    leftover.unlink()

    def open_log(self, step: int) -> None:
        """Go on with the TensorBoard log after `step` optimiser steps; what a killed run logged later is void."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter  # two seconds to import

        self._log = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add each value to the log under its name."""
        if self._log is not None:
            for name, value in values.items():
                self._log.add_scalar(name, value, step)

    def save_last(self, model: VisionLanguageModel, training_state: Mapping[str, Any]) -> None:
        """Write last.pt; the log is on disk before it, so that no step before the checkpoint can be missing there."""
        if self.writes:
            if self._log is not None:
                self._log.flush()
            native.save(self.last, model, training_state=dict(training_state))

    def save_best(self, model: VisionLanguageModel, extra: Mapping[str, Any]) -> None:
        """Write best.pt, with `extra` saying which epoch it is."""
        if self.writes:
            native.save(self.best, model, extra=dict(extra))

    def write_history(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Write history.csv, one row an epoch, in full precision."""
        if self.writes and rows:
            temporary = self.folder / "history.csv.tmp"
            pd.DataFrame(rows).to_csv(temporary, index=False)
            temporary.replace(self.folder / "history.csv")

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()
            self._log = None


class TrainingError(RuntimeError):
    """Pretraining cannot go on; the message says where it stood and what to do."""


@dataclass
class TrainingState:
    """Where a run stands. `epoch` counts finished epochs, `batch` the finished batches of the one under way,
    whose sums over steps, counts, images and seconds are kept until it ends."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = math.inf
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def epochs_without_gain(self) -> int:
        """Epochs finished since the best validation loss; early stopping compares it with the patience."""
        return self.epoch - self.best_epoch

    def add(self, values: Mapping[str, float]) -> None:
        """Add one step's finite values to the sums of the epoch (a float16 overflow has an infinite gradient norm)."""
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def clear_epoch(self) -> None:
        """Forget the sums of an epoch that is in the history."""
        self.sums, self.counts, self.images, self.train_seconds, self.seconds = {}, {}, 0, 0.0, 0.0

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> TrainingState:
        """Take back what `asdict` gave."""
        return cls(**{item.name: state[item.name] for item in fields(cls)})

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries only, so that a checkpoint loads without running code."""
        return asdict(self)


def random_state(device: torch.device) -> dict[str, Any]:
    """States of Python's, numpy's, torch's and (on a GPU) CUDA's generators, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - third-party code draws from it
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put all generators back to where `random_state` found them."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def all_random_states(device: torch.device) -> list[dict[str, Any]]:
    """`random_state` of every rank, in order of rank."""
    if world_size() == 1:
        return [random_state(device)]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, random_state(device))
    return states


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators inside the block, and give the caller's back after it."""
    held = random_state(device)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(held, device)


def run_identity(
    config: PretrainConfig,
    model: ModelConfig,
    train: StudyDataset,
    valid: StudyDataset,
    *,
    precision: str,
    processes: int,
) -> dict[str, Any]:
    """Everything that must not change between the parts of one run, by a name that a message can show."""
    options = ("crop", "sentence", "augment", "views", "texts", "seed")
    parts = {"training": train, "validation": valid}
    return {
        **asdict(config),
        "chosen precision": precision,
        "processes": processes,
        **{f"{name} studies": _fingerprint(data.frame) for name, data in parts.items()},
        **{f"{name} {option}": getattr(data, option) for name, data in parts.items() for option in options},
        **{f"model.{name}": value for name, value in asdict(model).items()},
    }


def _fingerprint(frame: pd.DataFrame) -> str:
    """Sixteen hex digits that change with any study, its text or images, or its place in the order."""
    rows = frame[["study_id", "images", "findings", "impression"]].fillna("").astype(str)
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:16]


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise TrainingError naming every field in which the run saved at `path` differs from the one now asked for."""
    missing = object()
    names = [*saved, *(name for name in wanted if name not in saved)]
    lines = [
        f"  {name}: saved {saved.get(name)!r}, now {wanted.get(name)!r}"
        for name in names
        if _plain(saved.get(name, missing)) != _plain(wanted.get(name, missing))
    ]
    if lines:
        raise TrainingError(
            f"{path} belongs to another run:\n" + "\n".join(lines) + "\nSet these back to go on with it, or give "
            "another folder (or delete this one) to train anew."
        )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
