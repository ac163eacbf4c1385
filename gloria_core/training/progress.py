"""What pretraining shows while it runs."""

import multiprocessing
import sys
from collections.abc import Mapping

from tqdm.auto import tqdm


def in_kernel() -> bool:
    """True inside a Jupyter kernel (JupyterLab, VS Code, Voila, papermill), False in a terminal or a plain process."""
    if "IPython" not in sys.modules or multiprocessing.parent_process() is not None:
        return False  # the displays of a process forked from a kernel do not reach its front end
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is not None


class Progress:
    """A bar of optimiser steps with the loss terms of the last one, and a line for each finished epoch.

    The bar is left out where output goes to a file. `show=False` shows nothing.
    """

    def __init__(self, *, epochs: int, steps_per_epoch: int, step: int = 0, show: bool = True) -> None:
        self.epochs, self.show = epochs, show
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
        losses = ", ".join(f"{name} {row[name]:.4g}" for name in row if name.startswith(("train", "valid")))
        cost = f"{row['images_per_second']:.0f} images/s, {row['seconds']:.0f} s"
        self.say(f"epoch {row['epoch']}/{self.epochs}: {losses}, lr {row['learning_rate']:.1e}, {cost}")

    def finish(self, message: str) -> None:
        """The run is over; `message` says how it ended."""
        self.bar.close()
        self.say(message)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.show:
            self.bar.write(text)
