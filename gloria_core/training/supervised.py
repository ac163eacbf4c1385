"""The training loop of fine-tuning, segmentation and detection, and what it needs: batches, seeds, stored features.

A fit has a fixed number of optimiser steps. At some of them the validation split is scored; the weights of the best
score are kept, and `patience` scores in a row without a better one end the fit.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import pandas as pd
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gloria_core.training.precision import Precision, choose_precision
from gloria_core.training.schedule import ScheduleName, learning_rate

# Called with one line of text after every validation, for instance `print`.
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What fine-tuning, segmentation and detection have in common. Raises ValueError naming the field.

    Attributes:
        frozen: train only what is new; no gradient reaches the encoder.
        batch_size: studies in a batch, at most.
        learning_rate, weight_decay: of AdamW.
        schedule: "constant", or "cosine", which falls to zero.
        warmup: share of the steps in which the rate rises, at least one step; 0 for none.
        patience: so many validations in a row without a better score end the training.
        precision: see `choose_precision`.
        memory: bytes that the features of a fixed encoder may take.
    """

    frozen: bool = True
    batch_size: PositiveInt = 16
    learning_rate: NonNegativeFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    schedule: ScheduleName = "constant"
    warmup: NonNegativeFloat = 0.0
    patience: PositiveInt = 5
    precision: Precision = "auto"
    memory: NonNegativeInt = 2**30


def fit(
    model: nn.Module,
    study_ids: Sequence[str],
    batches: Iterator[np.ndarray],
    loss: Callable[[np.ndarray], Tensor],
    validate: Callable[[], float],
    config: FitConfig,
    *,
    steps: int,
    validate_at: Collection[int],
    metric: str,
    groups: Sequence[dict[str, object]] | None = None,
    progress: Progress | None = None,
) -> tuple[pd.DataFrame, int]:
    """Train `model` in place and leave it in evaluation mode with its best weights; returns (history, best step).

    `batches`: row numbers of `study_ids`. `loss`: the scalar loss of a batch; it enters autocast itself. `validate_at`:
    the steps (from 1) after which `validate` gives the score called `metric`; the highest is best, or the lowest where
    the name ends in "loss". A score of NaN counts as better, so that without a validation score the last weights stay.
    `groups`: parameters with rates of their own, for AdamW; by default all that are trainable.
    history: one row a validation with step, train_loss (mean over the studies since the last one) and `metric`.
    float16 trains with loss scaling. Raises ValueError naming the studies where the loss is not finite.
    """
    device, sign = next(model.parameters()).device, -1 if metric.endswith("loss") else 1
    groups = groups or [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(device, config.precision) == "float16")
    warmup_steps = max(1, int(steps * config.warmup)) if config.warmup else 0
    scheduled = partial(learning_rate, total_steps=steps, warmup_steps=warmup_steps, schedule=config.schedule)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduled)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    best, best_step, weights, waited = -np.inf, 0, {}, 0
    history, losses, sizes = [], [], []
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        model.train()
        value = loss(rows)
        if not bool(torch.isfinite(value)):
            studies = ", ".join(str(study_ids[row]) for row in rows)
            raise ValueError(
                f"the loss is not finite ({value.item()}) at step {step}, on studies {studies}; "
                "lower the learning rate or use float32"
            )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        rate.step()
        losses.append(value.item())
        sizes.append(len(rows))
        if step not in validate_at:
            continue
        score = validate()
        history.append({"step": step, "train_loss": float(np.average(losses, weights=sizes)), metric: score})
        losses, sizes, waited = [], [], waited + 1
        if progress is not None:
            progress(f"step {step} of {steps}: train_loss {history[-1]['train_loss']:.3f}, {metric} {score:.3f}")
        if not sign * score <= best:
            best, best_step, waited = sign * score, step, 0
            weights = {k: v.detach().clone() for k, v in model.state_dict().items() if k not in frozen}
        if waited >= config.patience:
            break
    model.load_state_dict(weights, strict=False)
    model.eval()
    return pd.DataFrame(history), best_step


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global random numbers start from `seed` inside, and continue afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def shuffled_batches(
    rows: Sequence[int], batch_size: int, rng: np.random.Generator, *, whole: bool = False
) -> Iterator[np.ndarray]:
    """Endless batches from shuffled passes over `rows`, one pass after the other.

    The last batch of a pass may be smaller; with `whole` it is filled from the next pass.
    """
    rest = np.empty(0, int)
    while True:
        order = np.concatenate([rest, rng.permutation(np.asarray(rows, int))])
        end = len(order) - len(order) % batch_size if whole else len(order)
        yield from (order[first : first + batch_size] for first in range(0, end, batch_size))
        rest = order[end:]


class FeatureStore:
    """Features of a frozen network, computed on first use and kept on the CPU while they fit into `limit` bytes.

    What does not fit is computed again each time: the limit changes the time and no number. `encode` maps rows to
    tensors (b, ...); they are kept in their number format and returned on `device`.
    """

    def __init__(
        self, encode: Callable[[list[int]], Sequence[Tensor]], *, limit: int, device: torch.device | str = "cpu"
    ) -> None:
        self.encode, self.limit, self.device, self.used = encode, limit, torch.device(device), 0
        self._stored: dict[int, tuple[Tensor, ...]] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def __call__(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Features of these rows, in their order; a row may occur twice. Shape: -> (b, ...) each"""
        rows = [int(row) for row in rows]
        missing = [row for row in dict.fromkeys(rows) if row not in self._stored]
        new = dict(zip(missing, zip(*self.encode(missing), strict=True), strict=True)) if missing else {}
        for row, parts in new.items():
            size = sum(part.numel() * part.element_size() for part in parts)
            if self.used + size > self.limit:
                self.used = self.limit
                break
            # a view would keep its whole batch in memory
            self._stored[row] = tuple(part.detach().cpu().clone() for part in parts)
            self.used += size
        parts = [self._stored[row] if row in self._stored else new[row] for row in rows]
        return tuple(torch.stack([part.to(self.device) for part in column]) for column in zip(*parts, strict=True))
