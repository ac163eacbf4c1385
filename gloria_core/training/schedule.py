"""The optimiser, and its learning rate as a function of the optimiser step.

The rate is computed, not accumulated: `Schedule.at(step)` is a closed form, so a resumed run has the same rate at the
same step by construction. (The released code of GLoRIA configures ReduceLROnPlateau in such a way that it never fires.)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Literal

import torch
from torch import nn

ScheduleName = Literal["cosine", "plateau", "constant"]
SCHEDULES = ("cosine", "plateau", "constant")
OPTIMIZERS = ("adam", "adamw")


class Schedule:
    """Learning rate of optimiser step t = 0, 1, ..., T - 1, with T = `total_steps` and w warm-up steps.

    For t < w, every schedule rises in a straight line: `base * (t + 1) / w`, with w = round(warmup_fraction * T).
    After it
        cosine:   `base * (1 + cos(pi * (t - w) / (T - w))) / 2` (Loshchilov & Hutter, SGDR, ICLR 2017, one period)
        constant: `base`
        plateau:  `base * factor ** k`; k grows by one when the validation loss has not fallen by 0.01 % of its best
                  value for more than `plateau_patience` epochs (torch's ReduceLROnPlateau, relative threshold 1e-4).
    """

    def __init__(
        self,
        name: ScheduleName,
        *,
        base: float,
        total_steps: int,
        warmup_fraction: float = 0.0,
        plateau_factor: float = 0.5,
        plateau_patience: int = 5,
    ) -> None:
        if name not in SCHEDULES:
            raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        self.name, self.base, self.total_steps = name, base, total_steps
        self.warmup_steps = round(warmup_fraction * total_steps)
        self.plateau_factor, self.plateau_patience = plateau_factor, plateau_patience
        self.reductions, self.bad_epochs, self.best = 0, 0, math.inf

    def at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.base * (step + 1) / self.warmup_steps
        if self.name == "cosine":
            done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            return self.base * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.base * self.plateau_factor**self.reductions

    def after_epoch(self, valid_total: float) -> None:
        """Tell the plateau rule the validation loss of the epoch that ended; the other schedules ignore it."""
        if self.name != "plateau":
            return
        if math.isinf(self.best) or valid_total < self.best - 1e-4 * abs(self.best):
            self.best, self.bad_epochs = valid_total, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.plateau_patience:
            self.reductions, self.bad_epochs = self.reductions + 1, 0

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on; only the plateau rule remembers anything."""
        return {"reductions": self.reductions, "bad_epochs": self.bad_epochs, "best": self.best}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take back what `state_dict` gave."""
        self.reductions, self.bad_epochs = int(state["reductions"]), int(state["bad_epochs"])
        self.best = float(state["best"])


class StagedSchedule:
    """One `Schedule` after the other, for objectives that train in stages (PRIOR, Cheng et al., ICCV 2023, section 4).

    `starts`: first epoch of each stage, 0 first. `factors`: the base rate of stage k is `base * factors[k]`; () is all
    ones. Every other argument is `Schedule`'s. Raises ValueError where factors and stages differ in number.
    """

    def __init__(
        self,
        name: ScheduleName,
        *,
        base: float,
        epochs: int,
        steps_per_epoch: int,
        starts: tuple[int, ...] = (0,),
        factors: tuple[float, ...] = (),
        warmup_fraction: float = 0.0,
        plateau_factor: float = 0.5,
        plateau_patience: int = 5,
    ) -> None:
        if factors and len(factors) != len(starts):
            raise ValueError(f"stage_factors has {len(factors)} numbers, the objective has {len(starts)} stages")
        self.starts, self.steps_per_epoch = starts, steps_per_epoch
        ends = (*starts[1:], epochs)
        self.stages = [
            Schedule(
                name,
                base=base * factor,
                total_steps=(end - start) * steps_per_epoch,
                warmup_fraction=warmup_fraction,
                plateau_factor=plateau_factor,
                plateau_patience=plateau_patience,
            )
            for start, end, factor in zip(starts, ends, factors or (1.0,) * len(starts), strict=True)
        ]

    def begins(self, epoch: int) -> bool:
        """Whether a stage after the first begins with this epoch."""
        return epoch in self.starts[1:]

    def at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0 over all stages."""
        stage = bisect_right(self.starts, step // self.steps_per_epoch) - 1
        return self.stages[stage].at(step - self.starts[stage] * self.steps_per_epoch)

    def after_epoch(self, epoch: int, valid_total: float) -> None:
        """Tell the plateau rule of the stage of `epoch` (from 0) the validation loss with which it ended."""
        self.stages[bisect_right(self.starts, epoch) - 1].after_epoch(valid_total)

    def state_dict(self) -> list[dict[str, float]]:
        """What `load_state_dict` needs to go on."""
        return [stage.state_dict() for stage in self.stages]

    def load_state_dict(self, state: list[dict[str, float]]) -> None:
        """Take back what `state_dict` gave."""
        for stage, values in zip(self.stages, state, strict=True):
            stage.load_state_dict(values)


def make_optimizer(
    model: nn.Module, name: str, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters of `model`.

    `adam` adds the decay to every gradient (L2), as the released code of GLoRIA does. `adamw` decouples it
    (Loshchilov & Hutter, ICLR 2019) and spares biases, norms and temperatures: parameters with fewer than two axes.
    Raises ValueError for another name, and where nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model is trainable: both encoders are frozen and the objective has none")
    if name == "adam":
        return torch.optim.Adam(trainable, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    if name != "adamw":
        raise ValueError(f"optimizer {name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)
