"""What pretraining shows while it runs: one table that updates in place in a notebook, one line an epoch elsewhere.

In a Jupyter kernel one output is displayed once and then updated through its display id, at most once a second, so a
saved or papermill-executed notebook holds the last state and nothing else. In a terminal or a log file each finished
epoch prints one line. Nothing here knows about models or tensors.
"""

from __future__ import annotations

import html
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def in_kernel() -> bool:
    """True inside a Jupyter kernel (JupyterLab, VS Code, Voila, papermill), False in a terminal or a plain process."""
    if "IPython" not in sys.modules:
        return False
    if multiprocessing.parent_process() is not None:
        return False  # forked from a kernel: displays do not reach its front end, printed lines do
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None) is not None


class Progress:
    """Live display of a training run. `pretrain` calls `start`, then `step` and `epoch`, then `finish`.

    `every` is the least time in seconds between two updates; `rows` the number of finished epochs shown (the first and
    the last ones, without the training terms; history.csv has everything); `stream` is where lines go outside a kernel
    (standard output).
    """

    def __init__(self, *, every: float = 1.0, rows: int = 20, stream: TextIO | None = None) -> None:
        self.every, self.rows, self.stream = every, rows, stream
        self.epochs = self.steps_per_epoch = 0
        self.history: list[dict[str, float]] = []
        self.headline = ""
        self._handle = None
        self._last = self._began = 0.0
        self._first_step: int | None = None

    def start(self, *, epochs: int, steps_per_epoch: int, history: Sequence[Mapping[str, float]] = ()) -> None:
        """A run of `epochs` epochs begins, or goes on after the epochs in `history`."""
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.history = [dict(row) for row in history]
        self._began, self._first_step = time.monotonic(), None
        self.headline = f"resuming after epoch {len(self.history)} of {epochs}" if self.history else "starting"
        if self.history and not in_kernel():
            self._print(self.headline)
        self._show(force=True)

    def step(
        self, *, epoch: int, step: int, values: Mapping[str, float], learning_rate: float, images_per_second: float
    ) -> None:
        """Optimiser step `step` (1..steps_per_epoch) of epoch `epoch` (from 1) is done, with its loss terms."""
        done = (epoch - 1) * self.steps_per_epoch + step
        if self._first_step is None:
            self._first_step, self._began = done, time.monotonic()
        now = time.monotonic()
        if now - self._last < self.every:
            return
        terms = ", ".join(f"{name} {value:.3f}" for name, value in values.items() if name != "total")
        left = self._left(done, now)
        self.headline = (
            f"epoch {epoch}/{self.epochs} · step {step}/{self.steps_per_epoch} · loss {values['total']:.3f}"
            + (f" ({terms})" if terms else "")
            + f" · lr {learning_rate:.1e} · {images_per_second:.0f} img/s"
            + (f" · about {duration(left)} left" if left is not None else "")
        )
        self._show()

    def epoch(self, row: Mapping[str, float]) -> None:
        """An epoch is finished; `row` is its row of the history."""
        self.history.append(dict(row))
        if not in_kernel():
            self._print(_line(row, self.epochs))
        self._show(force=True)

    def finish(self, message: str) -> None:
        """The run is over; `message` says how it ended and stays on display."""
        self.headline = message
        if not in_kernel():
            self._print(message)
        self._show(force=True)

    def _left(self, done: int, now: float) -> float | None:
        steps = done - self._first_step
        return (now - self._began) / steps * (self.epochs * self.steps_per_epoch - done) if steps > 0 else None

    def _print(self, text: str) -> None:
        print(text, file=self.stream or sys.stdout, flush=True)

    def _show(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if not in_kernel() or (not force and now - self._last < self.every):
            return
        self._last = now
        if self._handle is None:
            from IPython.display import display  # only a kernel needs IPython

            self._handle = display(self, display_id=True)
        else:
            self._handle.update(self)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        if not self.history:
            return [], []
        hidden = ("step", "images_per_second")
        names = [name for name in self.history[0] if name not in hidden and not name.startswith("train_")]
        names.insert(2, "train_total")
        if any("valid_total" in row for row in self.history):
            best = min(row["valid_total"] for row in self.history)
        else:
            best = None
        rows = []
        for row in self.history:
            cells = [_cell(name, row[name]) for name in names]
            if best is not None and row["valid_total"] == best:
                cells[names.index("valid_total")] += " *"
            rows.append(cells)
        if len(rows) > self.rows:
            head = self.rows // 2
            rows = [*rows[:head], ["…"] * len(names), *rows[head - self.rows :]]
        return [name.replace("_", " ") for name in names], rows

    def __repr__(self) -> str:
        names, rows = self._table()
        widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [names, *rows]
        ]
        return "\n".join([self.headline, *(lines if rows else []), *(["* best so far"] if rows else [])])

    def _repr_html_(self) -> str:
        names, rows = self._table()
        text = f"<p><b>{html.escape(self.headline)}</b></p>"
        if not rows:
            return text
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        return f"{text}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>* best so far</p>"


class Silence(Progress):
    """Shows nothing: for the processes beside the first, and for scripts that want no output."""

    def _print(self, text: str) -> None:
        pass

    def _show(self, *, force: bool = False) -> None:
        pass


def _cell(name: str, value: float) -> str:
    if name in ("epoch", "step"):
        return str(int(value))
    if name == "learning_rate":
        return f"{value:.2e}"
    return duration(value) if name == "seconds" else f"{value:.4g}"


def _line(row: Mapping[str, float], epochs: int) -> str:
    losses = ", ".join(
        f"{name.replace('_', ' ', 1)} {row[name]:.4g}" for name in row if name.startswith(("train", "valid"))
    )
    rate = f"lr {row['learning_rate']:.1e}, {row['images_per_second']:.0f} img/s, {duration(row['seconds'])}"
    return f"epoch {int(row['epoch'])}/{epochs}: {losses}; {rate}"
