"""The texts of studies: which section is read, in which wording, and which part of it; or a report made from labels.

`StudyDataset` is the door to this module. Two texts a study follow CXR-CLIP (You et al. 2023, section 2.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import finding_columns
from gloria_core.data.prompts import NO_FINDING, PromptSet, report_from_labels, zero_shot_prompts
from gloria_core.data.reports import ReportError, Span, published_sentences, sentences

AUGMENTED = "meta_{section}_augmented"
"""Column of a section's other wording, such as its translation to another language and back."""


class StudyTexts:
    """Texts for every row of a manifest frame, drawn with a generator that the caller gives.

    text: the section that is read; "both" has findings and impression, or whichever of them has text.
    sentence: "all" the section whole, "random" one sentence of it, "published" one sentence by GLoRIA's released rule.
    augmented: read a section in its other wording (columns `meta_findings_augmented`, `meta_impression_augmented`) half
        of the time, where the study has one; a section that is shown twice is shown in both wordings.
    prompts: studies whose section is empty get a report from their labels (`report_from_labels`), with `n_negative`
        absent findings; `fixed` takes the deterministic one, which has no negatives.

    Raises: ReportError naming studies without text (with `prompts`: without labels either), PromptError for a label
    that lacks a sentence some study may need, ValueError for options that do not go together.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        *,
        text: Literal["impression", "findings", "both"],
        sentence: Literal["all", "random", "published"],
        augmented: bool = False,
        prompts: PromptSet | None = None,
        n_negative: int = 0,
        fixed: bool = False,
    ) -> None:
        columns = ("findings", "impression") if text == "both" else (text,)
        self.sentence, self.prompts, self.n_negative, self.fixed = sentence, prompts, n_negative, fixed
        if sentence == "published" and (augmented or prompts is not None):
            raise ValueError("sentence='published' cuts reports only; it takes no augmented_texts and no prompts")
        self._sections = _sections(frame, columns)
        self._other = _other_wordings(frame, columns) if augmented else None
        self._labels: dict[int, dict[str, float]] = {}
        if prompts is None:
            remedy = "use text='both', or exclude them" if len(columns) == 1 else "give them text or exclude them"
            _refuse_empty(self._sections, frame, f"the {' and '.join(columns)} of", remedy)
        else:
            self._labels = _labels(frame, [not row for row in self._sections])
            _check_prompts(prompts, self._labels.values(), n_negative=n_negative, fixed=fixed)
        if sentence == "published":
            self._sections = _published(self._sections, frame)

    def draw(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[Span, ...]]]:
        """`count` texts of study `index`, each with the spans of its sentences."""
        return [self._cut(text, rng) for text in self._whole(index, count, rng)]

    def _whole(self, index: int, count: int, rng: np.random.Generator) -> Iterator[str]:
        """The texts before a sentence is cut from them; each is drawn when it is asked for."""
        parts = self._sections[index]
        if not parts:
            for _ in range(count):
                yield self._from_labels(index, rng)
        elif self.sentence == "published":
            for _ in range(count):
                yield parts[rng.integers(len(parts))]
        elif self.sentence == "all" and count > 1:
            order, other = rng.permutation(len(parts)).tolist(), {}
            for number in (order * count)[:count]:
                other[number] = not other[number] if number in other else rng.random() < 0.5
                yield self._wording(index, number, other=other[number])
        else:
            for _ in range(count):
                # a blank line ends a sentence, so no sentence runs across sections
                yield "\n\n".join(self._wording(index, number, rng=rng) for number in range(len(parts)))

    def _wording(self, index: int, number: int, *, rng: np.random.Generator | None = None, other: bool = False) -> str:
        """Section `number`, in its other wording if `other`, or if the generator says so."""
        second = self._other[index][number] if self._other is not None else ""
        if not second:
            return self._sections[index][number]
        if rng is not None:
            other = rng.random() < 0.5
        return second if other else self._sections[index][number]

    def _from_labels(self, index: int, rng: np.random.Generator) -> str:
        if self.fixed:
            return report_from_labels(self._labels[index], self.prompts, deterministic=True)
        return report_from_labels(self._labels[index], self.prompts, rng=rng, n_negative=self.n_negative)

    def _cut(self, text: str, rng: np.random.Generator) -> tuple[str, tuple[Span, ...]]:
        if self.sentence == "published":
            return text, ((0, len(text)),)
        spans = sentences(text)
        if self.sentence == "random":
            start, end = spans[rng.integers(len(spans))]
            return text[start:end], ((0, end - start),)
        return text, tuple(spans)


def _cells(frame: pd.DataFrame, column: str) -> list[str]:
    return frame[column].fillna("").astype(str).tolist() if column in frame else [""] * len(frame)


def _sections(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sections of every study that have text."""
    rows = zip(*(_cells(frame, column) for column in columns), strict=True)
    return [tuple(part for part in row if part.strip()) for row in rows]


def _other_wordings(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """For every section that `_sections` keeps its other wording, "" where it has none."""
    names = [AUGMENTED.format(section=column) for column in columns]
    if not set(names) & set(frame.columns):
        raise ValueError(f"augmented_texts: the manifest has no column {' or '.join(names)}")
    found: list[tuple[str, ...]] = [()] * len(frame)
    for column, name in zip(columns, names, strict=True):
        cells = zip(_cells(frame, column), _cells(frame, name), strict=True)
        for i, (own, other) in enumerate(cells):
            if own.strip():
                found[i] += (other if other.strip() else "",)
            elif other.strip():
                study = frame["study_id"].iloc[i]
                raise ReportError(f"study {study}: {name} has text, but {column} is empty; give it or clear {name}")
    return found


def _published(parts: list[tuple[str, ...]], frame: pd.DataFrame) -> list[tuple[str, ...]]:
    cleaned = [tuple(s for part in row for s in published_sentences(part, word_limit=5) if s) for row in parts]
    _refuse_empty(cleaned, frame, "after GLoRIA's cleaning the text of", "exclude them, or use sentence='random'")
    return cleaned


def _labels(frame: pd.DataFrame, wanted: list[bool]) -> dict[int, dict[str, float]]:
    """Row -> labels by name, of the studies that get a report from them."""
    names = finding_columns(frame)
    values = frame[names].to_numpy(float)
    known = ~np.isnan(values).all(axis=1) | ~np.array(wanted, bool)
    _refuse_empty(known.tolist(), frame, "text and labels of", "give them either, or exclude them")
    return {i: dict(zip(names, values[i].tolist(), strict=True)) for i in np.flatnonzero(wanted).tolist()}


def _check_prompts(prompts: PromptSet, studies: Iterable[Mapping[str, float]], *, n_negative: int, fixed: bool) -> None:
    """Raise PromptError now for what would be lacking in the middle of an epoch."""
    kinds = {1.0: "pos"} if fixed else {1.0: "pos", -1.0: "unc"} | ({0.0: "neg"} if n_negative else {})
    wanted = set()
    for labels in studies:
        said = {(name, kinds[value]) for name, value in labels.items() if value in kinds and name != NO_FINDING}
        wanted |= said if any(kind != "neg" for _, kind in said) else said | {(NO_FINDING, "pos")}
    for name, kind in sorted(wanted):
        zero_shot_prompts(prompts, name, kind=kind)


def _refuse_empty(rows: Sequence[object], frame: pd.DataFrame, what: str, remedy: str) -> None:
    empty = [str(study) for row, study in zip(rows, frame["study_id"], strict=True) if not row]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ReportError(f"{what} {len(empty)} studies is empty (study_id {listed}); {remedy}")
