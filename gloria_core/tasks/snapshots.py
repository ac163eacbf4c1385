"""Training snapshots: maps of a few fixed phrases after each epoch, to see how attention forms.

    snapshots = MapSnapshots(folder, frame, cache, phrases)
    pretrain(..., after_epoch=snapshots)
    snapshots.load()

Each epoch is one file, so a run that was interrupted and resumed has all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from gloria_core.tasks.maps import Kind, kinds_of, original_maps
from gloria_core.tasks.phrases import Phrase


def one_phrase_per_label(phrases: Sequence[Phrase], labels: Sequence[str], n: int) -> list[Phrase]:
    """The first phrase of each label, at most `n`, each of another study: chosen before any map is seen."""
    chosen: list[Phrase] = []
    for label in labels:
        used = {phrase.row for phrase in chosen}
        chosen += [phrase for phrase in phrases if phrase.label == label and phrase.row not in used][:1]
    return chosen[:n]


@dataclass(frozen=True)
class Snapshot:
    """Maps after `epoch`, one (H, W) for each phrase in pixels of its original image, NaN outside the crop."""

    epoch: int
    maps: tuple[np.ndarray, ...]


class MapSnapshots:
    """Called with (epoch, model) after every epoch; saves the maps of `phrases` every `every` epochs.

    `frame`, `cache`: the studies that `Phrase.row` counts. A model without maps of this `kind` saves nothing; a phrase
    beyond the token limit has a map of NaN. No random number is drawn, so the training run is the same without it.
    """

    def __init__(
        self,
        folder: Path,
        frame: pd.DataFrame,
        cache,
        phrases: Sequence[Phrase],
        *,
        kind: Kind = "cosine",
        every: int = 1,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.folder, self.frame, self.cache, self.kind, self.every = Path(folder), frame, cache, kind, every
        self.phrases = tuple(phrases)

    def __call__(self, epoch: int, model: nn.Module) -> None:
        if not self.phrases or epoch % self.every or self.kind not in kinds_of(model):
            return
        by_phrase = original_maps(model, self.frame, self.cache, self.phrases, kinds=(self.kind,), precision="float32")
        maps = []
        for phrase, by_kind in zip(self.phrases, by_phrase, strict=True):
            geometry, values = self.cache.geometry(phrase.image), by_kind[self.kind]
            maps.append(np.full((geometry.height, geometry.width), np.nan) if values is None else values)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"epoch_{epoch:04d}.npz.tmp"
        with temporary.open("wb") as file:
            np.savez_compressed(file, *(values.astype(np.float32) for values in maps))
        temporary.replace(temporary.with_suffix(""))

    def load(self) -> list[Snapshot]:
        """All saved snapshots in the order of epochs."""
        snapshots = []
        for path in sorted(self.folder.glob("epoch_*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                maps = tuple(stored[f"arr_{number}"] for number in range(len(stored.files)))
            snapshots.append(Snapshot(int(path.stem.removeprefix("epoch_")), maps))
        return snapshots
