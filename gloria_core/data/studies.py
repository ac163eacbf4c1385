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
from gloria_core.data.reports import ReportError, Span, published_sentences, sentences

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
    views: images per study. One view is a frontal where the study has one; several are different images as long as the
        study has them, then repeats. Without augmentation the first ones are taken, frontals first; with it, random
        ones.
    texts: independent draws per study. With text="both" and sentence="all" each draw is one section (CXR-CLIP).
    augment: False centre crop; "crop" random crop, as GLoRIA (256 -> 224); True random crop and a mild jitter of
        brightness and contrast. Never a flip: reports say left and right.
    labels: label columns in this order; by default all of the manifest.

    Item i depends on (seed, epoch, i) only.
    Raises: ReportError naming studies whose chosen section is empty, ValueError for unknown options or columns.
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
        self._frontals = [
            [i for i, view in enumerate(views_of.split(";")) if view.strip().upper() != "LATERAL"]
            for views_of in self.frame["views"].astype(str)
        ]
        self._sections = _sections(self.frame, self._study_ids, text)
        if sentence == "published":
            self._sections = _published(self._sections, self._study_ids)

    def __len__(self) -> int:
        return len(self._study_ids)

    def set_epoch(self, epoch: int) -> None:
        """Draws sentences, crops and views anew; call it before the epoch's loader is made."""
        self.epoch = int(epoch)

    def __getitem__(self, index: int) -> StudyItem:
        index = range(len(self))[index]
        # separate streams: changing how texts are drawn leaves the crops alone
        draw_text, draw_image = (np.random.default_rng([self.seed, self.epoch, index, part]) for part in range(2))
        chosen = [self._text(index, draw_text) for _ in range(self.texts)]
        pixels = np.stack([self._image(index, number, draw_image) for number in self._choose(index, draw_image)])
        return StudyItem(
            pixels=pixels,
            texts=tuple(text for text, _ in chosen),
            spans=tuple(spans for _, spans in chosen),
            labels=self._labels[index],
            index=index,
            study_id=self._study_ids[index],
        )

    def _text(self, index: int, draw: np.random.Generator) -> tuple[str, tuple[Span, ...]]:
        parts = self._sections[index]
        if self.sentence == "published":
            text = parts[draw.integers(len(parts))]
            return text, ((0, len(text)),)
        if self.sentence == "all" and self.texts > 1:
            parts = (parts[draw.integers(len(parts))],)
        text = "\n\n".join(parts)  # a blank line ends a sentence, so no sentence runs across sections
        spans = sentences(text)
        if self.sentence == "random":
            start, end = spans[draw.integers(len(spans))]
            return text[start:end], ((0, end - start),)
        return text, tuple(spans)

    def _choose(self, index: int, draw: np.random.Generator) -> list[int]:
        """Numbers of the images to show."""
        count, frontals = len(self._images[index]), self._frontals[index]
        if self.views == 1:
            numbers = frontals or list(range(count))
            repeats = numbers
        else:
            numbers = frontals + [i for i in range(count) if i not in frontals]
            repeats = frontals or numbers
        if self.augment:
            numbers = [numbers[i] for i in draw.permutation(len(numbers))]
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


def _sections(frame: pd.DataFrame, study_ids: list[str], text: str) -> list[tuple[str, ...]]:
    columns = ("findings", "impression") if text == "both" else (text,)
    rows = zip(*(frame[column].fillna("").astype(str) for column in columns), strict=True)
    found = [tuple(part for part in row if part.strip()) for row in rows]
    remedy = "give them text or exclude them" if text == "both" else "use text='both', or exclude them"
    _refuse_empty(found, study_ids, f"the {' and '.join(columns)} of", remedy)
    return found


def _published(parts: list[tuple[str, ...]], study_ids: list[str]) -> list[tuple[str, ...]]:
    cleaned = [tuple(s for part in row for s in published_sentences(part, word_limit=5) if s) for row in parts]
    _refuse_empty(cleaned, study_ids, "after GLoRIA's cleaning the text of", "exclude them, or use sentence='random'")
    return cleaned


def _refuse_empty(rows: list[tuple[str, ...]], study_ids: list[str], what: str, remedy: str) -> None:
    empty = [study for row, study in zip(rows, study_ids, strict=True) if not row]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ReportError(f"{what} {len(empty)} studies is empty (study_id {listed}); {remedy}")
