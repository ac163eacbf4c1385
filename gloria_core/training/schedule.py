"""The optimiser, and its learning rate as a function of the step.

The rate is a closed form of the step and has no state, so a resumed run has the same rates by construction.
"""

import math
from typing import Literal

import torch
from torch import nn

ScheduleName = Literal["cosine", "constant"]
OptimizerName = Literal["adam", "adamw"]


def learning_rate(
    step: int, *, total_steps: int, base: float = 1.0, warmup_steps: int = 0, schedule: ScheduleName = "cosine"
) -> float:
    """Rate of optimiser step t = 0, 1, ..., T - 1, with T = `total_steps` and w = `warmup_steps`.

    For t < w it rises linearly: base * (t + 1) / w. After that "constant" is base, and "cosine" falls to zero:
    base * (1 + cos(pi * (t - w) / (T - w))) / 2 (Loshchilov & Hutter, SGDR, ICLR 2017, one period).
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def make_optimizer(
    model: nn.Module, name: OptimizerName, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters of `model`.

    `adam` adds the decay to every gradient (L2), as the released code of GLoRIA does. `adamw` decouples it
    (Loshchilov & Hutter, ICLR 2019) and spares biases, norms and temperatures: parameters with fewer than two axes.
    Raises ValueError where nothing is trainable.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model is trainable: both encoders are frozen and the objective has none")
    if name == "adam":
        return torch.optim.Adam(trainable, lr=learning_rate, betas=betas, weight_decay=weight_decay)
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=betas)
