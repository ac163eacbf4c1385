"""What a killed run needs to go on to the same numbers: where it stood, random states, and a check of its settings."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gloria_core.checkpoints.model import ModelConfig
from gloria_core.data.dataset import StudyDataset
from gloria_core.data.files import content_hash
from gloria_core.training.config import PretrainConfig
from gloria_core.training.distributed import world_size


class TrainingError(RuntimeError):
    """Pretraining cannot go on; the message says where it stood and what to do."""


@dataclass
class TrainingState:
    """Where a run stands: `epoch` finished epochs, and `batch` finished batches of the one under way.

    `sums` and `counts` add up the numbers of its steps, `seconds` the time they took.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = math.inf
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def add(self, values: Mapping[str, float]) -> None:
        """One more step; its finite values count (a float16 overflow has an infinite gradient norm)."""
        self.step, self.batch = self.step + 1, self.batch + 1
        for name, value in values.items():
            if math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def end_epoch(self) -> dict[str, float]:
        """The means over the steps of the epoch, which are then forgotten."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.epoch, self.batch, self.sums, self.counts, self.seconds = self.epoch + 1, 0, {}, {}, 0.0
        return means


def random_state(device: torch.device) -> dict[str, torch.Tensor | None]:
    """States of torch's generators, those that dropout and the objectives draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the generators back to where `random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def all_random_states(device: torch.device) -> list[dict[str, Any]]:
    """`random_state` of every rank, in order of rank."""
    states: list[Any] = [random_state(device)] * world_size()
    if world_size() > 1:
        dist.all_gather_object(states, random_state(device))
    return states


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
    identity = {**asdict(config), "chosen precision": precision, "processes": processes}
    for name, data in (("training", train), ("validation", valid)):
        content = data.frame[["study_id", "images", "findings", "impression"]].fillna("")
        identity[f"{name} studies"] = content_hash(content.to_csv(index=False))
        for option in ("crop", "sentence", "augment", "views", "texts", "seed"):
            identity[f"{name} {option}"] = getattr(data, option)
    return identity | {f"model.{name}": value for name, value in asdict(model).items()}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise TrainingError naming every field in which the run saved at `path` differs from the one now asked for."""
    lines = [
        f"  {name}: saved {saved.get(name)!r}, now {wanted.get(name)!r}"
        for name in dict.fromkeys([*saved, *wanted])
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        raise TrainingError(
            f"{path} belongs to another run:\n" + "\n".join(lines) + "\nSet these back to go on with it, or give "
            "another folder (or delete this one) to train anew."
        )
