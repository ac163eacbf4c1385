"""What a pretraining run writes: `last.pt`, `best.pt`, `history.csv` and a TensorBoard log; no file is half-written.

Order at the end of an epoch: best.pt, last.pt, history.csv. A run killed in between starts again from the older last.pt
and writes the same files once more; last.pt alone says how far the run is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import VisionLanguageModel


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
