"""Training snapshots: maps of a few fixed phrases after each epoch, to see how attention forms.

    snapshots = watch(data, folder, n=3, every=2)
    pretrain(..., after_epoch=snapshots)
    snapshots.load()

Each epoch is one file, so a run that was interrupted and resumed has all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from gloria_core.data.cache import ImageCache
from gloria_core.data.dataset import PreparedDataset
from gloria_core.data.files import atomic_file
from gloria_core.data.manifest import finding_columns
from gloria_core.tasks.maps import Kind, kinds_of, original_maps
from gloria_core.tasks.phrases import Phrase, phrases_from_masks


def one_phrase_per_label(phrases: Sequence[Phrase], labels: Sequence[str], n: int) -> list[Phrase]:
    """The first phrase of each label, at most `n`, each of another study: chosen before any map is seen."""
    chosen: list[Phrase] = []
    for label in labels:
        used = {phrase.row for phrase in chosen}
        chosen += [phrase for phrase in phrases if phrase.label == label and phrase.row not in used][:1]
    return chosen[:n]


@dataclass(frozen=True)
class MapSnapshots:
    """Called with (epoch, model) after every epoch; saves the maps of `phrases` every `every` epochs.

    `frame`, `cache`: the studies that `Phrase.row` counts. A model without maps of this `kind` saves nothing; a phrase
    beyond the token limit has a map of NaN. No random number is drawn, so the training run is the same without it.
    """

    folder: Path
    frame: pd.DataFrame
    cache: ImageCache
    phrases: Sequence[Phrase]
    kind: Kind = "cosine"
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1")

    def __call__(self, epoch: int, model: nn.Module) -> None:
        if not self.phrases or epoch % self.every or self.kind not in kinds_of(model):
            return
        by_phrase = original_maps(model, self.frame, self.cache, self.phrases, kinds=(self.kind,))
        maps = []
        for phrase, by_kind in zip(self.phrases, by_phrase, strict=True):
            geometry, values = self.cache.geometry(phrase.image), by_kind[self.kind]
            maps.append(np.full((geometry.height, geometry.width), np.nan) if values is None else values)
        with atomic_file(self.folder / f"epoch_{epoch:04d}.npz") as file:
            np.savez_compressed(file, *(values.astype(np.float32) for values in maps))

    def load(self) -> dict[int, list[np.ndarray]]:
        """By epoch, in their order: one map (H, W) for each phrase in pixels of its image, NaN outside the crop."""
        snapshots = {}
        for path in sorted(self.folder.glob("epoch_*.npz")):
            with np.load(path, allow_pickle=False) as stored:
                snapshots[int(path.stem.removeprefix("epoch_"))] = list(stored.values())
        return snapshots


def watch(data: PreparedDataset, folder: Path, *, n: int, every: int) -> MapSnapshots:
    """Snapshots of at most `n` validation studies, each with a phrase whose region is known; perhaps of none."""
    frame = data.frame[data.frame["split"] == "valid"].reset_index(drop=True)
    labels = [*data.competition, *(name for name in finding_columns(frame) if name not in data.competition)]
    phrases = one_phrase_per_label(phrases_from_masks(frame), labels, n)
    return MapSnapshots(folder, frame, data.cache, phrases, every=every)
