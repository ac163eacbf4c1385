"""What pretraining shows while it runs."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping

import pandas as pd
from tqdm.auto import tqdm


def in_kernel() -> bool:
    """True inside a Jupyter kernel (JupyterLab, VS Code, Voila, papermill), False in a terminal or a plain process."""
    if "IPython" not in sys.modules or multiprocessing.parent_process() is not None:
        return False  # the displays of a process forked from a kernel do not reach its front end
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is not None


class Progress:
    """A bar of optimiser steps with the loss terms of the last one, and the history of the finished epochs.

    In a notebook the history is a table that is updated; elsewhere one line is printed for each epoch. The bar is left
    out where output goes to a file. `show=False` shows nothing.
    """

    def __init__(self, *, epochs: int, steps_per_epoch: int, step: int = 0, show: bool = True) -> None:
        self.epochs, self.show, self.table = epochs, show, None
        hidden = not (show and (in_kernel() or sys.stderr.isatty()))
        total = epochs * steps_per_epoch
        self.bar = tqdm(total=total, initial=step, unit="step", disable=hidden)
        if 0 < step < total:
            self.say(f"resuming after step {step} of {total}")

    def step(self, values: Mapping[str, float]) -> None:
        """One optimiser step is done, with these loss terms."""
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()}, refresh=False)
        self.bar.update()

    def epoch(self, history: list[dict[str, float]]) -> None:
        """An epoch is finished; the last row of `history` is its own."""
        row = history[-1]
        if not in_kernel():
            losses = ", ".join(f"{name} {row[name]:.4g}" for name in row if name.startswith(("train", "valid")))
            cost = f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
            self.say(f"epoch {row['epoch']}/{self.epochs}: {losses}, lr {row['learning_rate']:.1e}, {cost}")
        elif self.show:
            from IPython.display import display  # only a kernel needs it

            frame = pd.DataFrame(history).set_index("epoch")
            terms = [name for name in frame if name.startswith("train_") and name != "train_total"]
            frame = frame.drop(columns=["step", *terms])
            if self.table is None:
                self.table = display(frame, display_id=True)
            else:
                self.table.update(frame)

    def finish(self, message: str) -> None:
        """The run is over; `message` says how it ended."""
        self.bar.close()
        self.say(message)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self.bar.write(text)
