"""Maps of a fixed panel of studies while a model is trained, so that one can watch attention form (or fail to).

    film = MapFilm(folder, data, phrases)
    pretrain(..., after_epoch=film)
    frames = film.frames()

Each epoch's maps are one file, so that a run that was killed and resumed has a whole film.
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


def panel(phrases: Sequence[Phrase], labels: Sequence[str], n: int) -> list[Phrase]:
    """The first phrase of each label in turn, one a study, `n` at most: chosen by name, never by how a map looks."""
    chosen: list[Phrase] = []
    for label in labels:
        taken = {phrase.row for phrase in chosen}
        found = next((phrase for phrase in phrases if phrase.label == label and phrase.row not in taken), None)
        if found is not None and len(chosen) < n:
            chosen.append(found)
    return chosen


@dataclass(frozen=True)
class Frame:
    """Maps after `epoch`, one (H, W) a phrase on the pixels of its original image, NaN outside the crop."""

    epoch: int
    maps: tuple[np.ndarray, ...]


class MapFilm:
    """Called with (epoch, model) after every epoch; saves the maps of `phrases` every `every` epochs.

    `frame`, `cache`: the studies that the phrases count in. `kind`: a map that the model has (`kinds_of`); one that it
    lacks is left out, and so is a phrase beyond the token limit, whose map is NaN throughout.
    It draws no random number, so that a run with a film has the numbers of a run without.
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
        found = original_maps(model, self.frame, self.cache, self.phrases, kinds=(self.kind,), precision="float32")
        maps = []
        for phrase, by_kind in zip(self.phrases, found, strict=True):
            geometry, values = self.cache.geometry(phrase.image), by_kind[self.kind]
            maps.append(np.full((geometry.height, geometry.width), np.nan) if values is None else values)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"epoch_{epoch:04d}.npz.tmp"
        with temporary.open("wb") as file:
            np.savez_compressed(file, *(values.astype(np.float32) for values in maps))
        temporary.replace(self.folder / f"epoch_{epoch:04d}.npz")

    def frames(self) -> list[Frame]:
        """What has been saved, in the order of epochs."""
        out = []
        for path in sorted(self.folder.glob("epoch_*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                maps = tuple(stored[f"arr_{number}"] for number in range(len(stored.files)))
            out.append(Frame(int(path.stem.removeprefix("epoch_")), maps))
        return out
