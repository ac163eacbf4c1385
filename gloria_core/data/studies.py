"""Studies of a manifest as items: images from the cache, text cut from the report, labels.

Item i depends on the seed, the epoch and i, never on workers, processes or the order in which items are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import pandas as pd
from torch.utils.data import Dataset

from gloria_core.data.manifest import label_columns
from gloria_core.data.prompts import PromptSet
from gloria_core.data.reports import Span
from gloria_core.data.study_texts import StudyTexts

JITTER = 0.1
"""Largest relative change of contrast, and of brightness as a share of the gray range, under augment=True."""


class Images(Protocol):
    """What the dataset asks of an image cache: the gray image of a path as (size, size) uint8."""

    def image(self, path: str) -> np.ndarray: ...


@dataclass(frozen=True)
class StudyItem:
    """One study as the workers hand it over.

    Shape: pixels (V, crop, crop) uint8; `spans[t]` the sentences of `texts[t]`; labels (K,) float32, NaN unknown.
    """

    pixels: np.ndarray
    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    labels: np.ndarray
    index: int
    study_id: str


class StudyDataset(Dataset[StudyItem]):
    """Images, text and labels of the studies in a manifest frame.

    text: the section that is read; "both" joins findings and impression, or whichever of them has text.
    sentence: "all" reads the section whole, "random" one sentence of it, "published" one sentence cut and cleaned by
        GLoRIA's released rule (`pretraining_dataset.py`, its word limit of 5 included).
    views: images per study. One view is a frontal where the study has one. Several are distinct views (by the
        manifest's `views`) as long as the study has them, then further images of these views, then the same images
        again, each with an augmentation of its own (CXR-CLIP, You et al. 2023). Without augmentation the first ones
        are taken, frontals first; with it, random ones.
    texts: texts per study. With text="both" and sentence="all" they are its sections in random order, each once as long
        as the study has them (CXR-CLIP); otherwise independent draws.
    augmented_texts, prompts, n_negative: other wordings, and reports for studies without text; see `StudyTexts`. They
        are drawn anew for every text and epoch; without augmentation reports from labels are the fixed ones.
    augment: False centre crop; "crop" random crop, as GLoRIA (256 -> 224); True random crop and a mild jitter of
        brightness and contrast. Never a flip: reports say left and right.
    labels: label columns in this order; by default all of the manifest.

    Item i depends on (seed, epoch, i) only.
    Raises: ReportError naming studies whose chosen section is empty (with `prompts`: that have no label either),
    PromptError for a label without sentences, ValueError for unknown options or columns.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        cache: Images,
        *,
        crop: int,
        text: Literal["impression", "findings", "both"] = "impression",
        sentence: Literal["all", "random", "published"] = "all",
        views: int = 1,
        texts: int = 1,
        augment: bool | Literal["crop"] = False,
        seed: int = 0,
        labels: Sequence[str] | None = None,
        augmented_texts: bool = False,
        prompts: PromptSet | None = None,
        n_negative: int = 0,
    ) -> None:
        _one_of("text", text, ("impression", "findings", "both"))
        _one_of("sentence", sentence, ("all", "random", "published"))
        _one_of("augment", augment, (False, True, "crop"))
        for name, value in (("crop", crop), ("views", views), ("texts", texts)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.frame = frame.reset_index(drop=True)
        self.cache, self.crop, self.seed, self.epoch = cache, crop, seed, 0
        self.sentence, self.augment, self.views, self.texts = sentence, augment, views, texts
        self.label_names = list(label_columns(frame) if labels is None else labels)
        unknown = [name for name in self.label_names if name not in frame.columns]
        if unknown:
            raise ValueError(f"no label column {unknown}; the manifest has {label_columns(frame)}")
        self._labels = self.frame[self.label_names].to_numpy(dtype=np.float32, na_value=np.nan)
        self._study_ids = self.frame["study_id"].astype(str).tolist()
        self._images = [path.split(";") for path in self.frame["images"]]
        names = self.frame["views"].astype(str).str.upper()
        self._views = [[view.strip() for view in row.split(";")] for row in names]
        self._texts = StudyTexts(
            self.frame,
            text=text,
            sentence=sentence,
            augmented=augmented_texts,
            prompts=prompts,
            n_negative=n_negative,
            fixed=augment is False,
        )

    def __len__(self) -> int:
        return len(self._study_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draws sentences, crops and views anew; call it before the epoch's loader is made."""
        self.epoch = int(epoch)

    def __getitem__(self, index: int) -> StudyItem:
        index = range(len(self))[index]
        # separate streams: changing how texts are drawn leaves the crops alone
        draw_text, draw_image = (np.random.default_rng([self.seed, self.epoch, index, part]) for part in range(2))
        chosen = self._texts.draw(index, self.texts, draw_text)
        pixels = np.stack([self._image(index, number, draw_image) for number in self._choose(index, draw_image)])
        return StudyItem(
            pixels=pixels,
            texts=tuple(text for text, _ in chosen),
            spans=tuple(spans for _, spans in chosen),
            labels=self._labels[index],
            index=index,
            study_id=self._study_ids[index],
        )

    def _choose(self, index: int, draw: np.random.Generator) -> list[int]:
        """Numbers of the images to show."""
        views = self._views[index]
        frontals = [i for i, view in enumerate(views) if view != "LATERAL"]
        numbers = repeats = frontals or list(range(len(views)))
        if self.views > 1:
            numbers = frontals + [i for i in range(len(views)) if i not in frontals]
        if self.augment:
            numbers = [numbers[i] for i in draw.permutation(len(numbers))]
        if self.views > 1:
            kinds = list(dict.fromkeys(views[i] for i in numbers))
            if self.augment:  # every view equally often first, however many images it has
                kinds = [kinds[k] for k in draw.permutation(len(kinds))]
            turn = {i: sum(views[j] == views[i] for j in numbers[:place]) for place, i in enumerate(numbers)}
            numbers = sorted(numbers, key=lambda i: (turn[i], kinds.index(views[i])))
        missing = max(0, self.views - len(numbers))
        return (numbers + repeats * missing)[: self.views]

    def _image(self, index: int, number: int, draw: np.random.Generator) -> np.ndarray:
        image = np.asarray(self.cache.image(self._images[index][number]))
        room = image.shape[0] - self.crop
        if room < 0:
            raise ValueError(f"crop={self.crop} is larger than the cached images ({image.shape[0]} px)")
        top, left = draw.integers(0, room + 1, size=2) if self.augment else (room // 2, room // 2)
        image = image[top : top + self.crop, left : left + self.crop]
        if self.augment is not True:
            return np.ascontiguousarray(image)
        contrast, brightness = draw.uniform(-JITTER, JITTER, size=2)
        gray = np.arange(256)
        table = (gray - 127.5) * (1 + contrast) + 127.5 + 255 * brightness
        return np.clip(np.rint(table), 0, 255).astype(np.uint8)[image]


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
