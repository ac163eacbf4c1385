"""The settings of one pretraining run; the defaults are those of GLoRIA's released pretraining configuration."""

from typing import Annotated

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from gloria_core.training.precision import Precision
from gloria_core.training.schedule import OptimizerName, ScheduleName

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class PretrainConfig:
    """Settings of `pretrain`. A run resumes only with exactly the settings it began with.

    `batch_size` is the whole batch, over all processes. `weight_decay` is L2 for `adam`, decoupled for `adamw`.
    `gradient_clip` bounds the gradient's norm (0: no bound). `warmup_fraction` of all optimiser steps is warm-up.
    `patience` ends the run after so many epochs without a better validation loss (0: never). A checkpoint is written
    at the end of every epoch, and within it every `checkpoint_steps` steps (0: none); they change no number.
    Raises pydantic's ValidationError, a ValueError, naming the field.
    """

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat = 5e-5
    weight_decay: NonNegativeFloat = 1e-6
    optimizer: OptimizerName = "adam"
    betas: tuple[Share, Share] = (0.5, 0.999)
    gradient_clip: NonNegativeFloat = 0.25
    schedule: ScheduleName = "cosine"
    warmup_fraction: Share = 0.05
    precision: Precision = "auto"
    patience: NonNegativeInt = 10
    seed: int = 0
    workers: NonNegativeInt = 0
    checkpoint_steps: NonNegativeInt = 200
