"""The settings of one pretraining run; the defaults are those of GLoRIA's released pretraining configuration."""

from __future__ import annotations

from dataclasses import dataclass

from gloria_core.training.precision import PRECISIONS, Precision
from gloria_core.training.schedule import OPTIMIZERS, SCHEDULES, ScheduleName


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `pretrain`. A run resumes only with exactly the settings it began with.

    `batch_size` is the whole batch, over all processes. `weight_decay` is L2 for `adam`, decoupled for `adamw`.
    `gradient_clip` bounds the gradient's norm (0: no bound). `warmup_fraction` of all optimiser steps is warm-up.
    `stage_factors` multiply the learning rate of each stage of an objective that has stages; () takes its own.
    `patience` ends the run after so many epochs without a better validation loss (0: never). Between the checkpoints
    at the ends of epochs there is one every `checkpoint_steps` steps and every `checkpoint_seconds` seconds (0: none);
    they change no number. Raises ValueError naming the field.
    """

    epochs: int
    batch_size: int
    learning_rate: float = 5e-5
    weight_decay: float = 1e-6
    optimizer: str = "adam"
    betas: tuple[float, float] = (0.5, 0.999)
    gradient_clip: float = 0.25
    schedule: ScheduleName = "cosine"
    warmup_fraction: float = 0.05
    stage_factors: tuple[float, ...] = ()
    plateau_factor: float = 0.5
    plateau_patience: int = 5
    precision: Precision = "auto"
    patience: int = 10
    seed: int = 0
    workers: int = 0
    checkpoint_steps: int = 0
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, known in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        least = {
            "epochs": 1,
            "batch_size": 1,
            "plateau_patience": 0,
            "patience": 0,
            "workers": 0,
            "checkpoint_steps": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {bound}")
        for name in ("weight_decay", "gradient_clip", "checkpoint_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must not be negative")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate!r}; it must be positive")
        if not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction!r}; it must lie in [0, 1)")
        if not 0 < self.plateau_factor < 1:
            raise ValueError(f"plateau_factor is {self.plateau_factor!r}; it must lie in (0, 1)")
        if not all(factor > 0 for factor in self.stage_factors):
            raise ValueError(f"stage_factors is {self.stage_factors!r}; every factor must be positive")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas!r}; it must be two numbers in [0, 1)")
