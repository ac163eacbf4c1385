"""Phrases with a known place: which words of which text name which pixels.

A manifest row's `masks` say it exactly where they have spans of the report; masks without spans and `boxes` say it by
label, and then a prompt is the phrase. Either way a phrase belongs to the frontal image that the model sees; masks of
other views do not count.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.dataset import PreparedDataset
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import read_gray
from gloria_core.data.manifest import boxes_of, finding_columns, masks_of
from gloria_core.data.prompts import NO_FINDING, prompts_for
from gloria_core.data.reports import sentences
from gloria_core.tasks.annotated_images import annotations_of
from gloria_core.tasks.features import frontal_image

Span = tuple[int, int]
_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Phrase:
    """Words of one text that name one region of one image.

    `row` is the position in the frame, `text` the whole text that is encoded, `spans` the characters of it that are the
    phrase. The region is the union of `masks` (files under the root) and `boxes` (x, y, width, height), both in pixels
    of the original image `image`.
    """

    row: int
    label: str
    section: str
    text: str
    spans: tuple[Span, ...]
    image: str
    masks: tuple[str, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()

    @classmethod
    def of_text(cls, text: str, label: str, *, row: int = 0, section: str = "prompt", image: str = "") -> "Phrase":
        """A phrase that is all of a text, without a region."""
        return cls(row, label, section, text, ((0, len(text)),), image)

    @property
    def known(self) -> bool:
        """Whether its region is known."""
        return bool(self.masks or self.boxes)

    @property
    def words(self) -> str:
        """The words of the phrase, parts joined by an ellipsis."""
        return " … ".join(self.text[start:end] for start, end in self.spans)


def phrases_from_masks(frame: pd.DataFrame, *, sections: Sequence[str] = ("impression",)) -> list[Phrase]:
    """Every phrase that the `masks` of the frame ground in one of the report sections.

    Masks of one label that share their spans ("bilateral effusions") are one phrase, with their union as region.
    Masks without spans in these sections name no words and give no phrase. A phrase is on the study's frontal image,
    or on its first where it has none. That spans lie in their text was checked when the manifest was read.
    """
    phrases = []
    for position, row in enumerate(frame.to_dict("records")):
        grouped: dict[tuple, list[str]] = {}
        for mask in annotations_of(row, "masks"):
            for section in sections:
                spans = tuple(sorted((start, end) for name, start, end in mask.get("spans", ()) if name == section))
                if spans:
                    grouped.setdefault((mask["label"], section, spans), []).append(mask["path"])
        for (label, section, spans), paths in grouped.items():
            image = frontal_image(row)[1]
            phrases.append(Phrase(position, label, section, row[section], spans, image, masks=tuple(paths)))
    return phrases


def phrases_from_prompts(frame: pd.DataFrame, prompts: Mapping[str, str]) -> list[Phrase]:
    """One phrase per study and label with masks or boxes: the label's prompt, all of it, on their union.

    Boxes count for labels that have no mask. Labels that are not in `prompts` are left out.
    """
    phrases = []
    for position, row in enumerate(frame.to_dict("records")):
        masks, boxes = (annotations_of(row, source) for source in ("masks", "boxes"))
        for label in dict.fromkeys(entry["label"] for entry in (*masks, *boxes) if entry["label"] in prompts):
            paths = tuple(mask["path"] for mask in masks if mask["label"] == label)
            frames = tuple(tuple(box["xywh"]) for box in boxes if box["label"] == label and not paths)
            whole = Phrase.of_text(prompts[label], label, row=position, image=frontal_image(row)[1])
            phrases.append(replace(whole, masks=paths, boxes=frames))
    return phrases


def phrases_without_region(frame: pd.DataFrame, prompts: Mapping[str, str]) -> list[Phrase]:
    """One phrase a study: the first sentence of its report, else the prompt of a present label or "No Finding".

    A study without a report whose label has no prompt gives none.
    """
    phrases = []
    for position, row in enumerate(frame.to_dict("records")):
        image = frontal_image(row)[1]
        label = next((name for name in prompts if row.get(name) == 1), NO_FINDING)
        section = next((name for name in ("impression", "findings") if sentences(row[name])), "")
        if section:
            spans = tuple(sentences(row[section])[:1])
            phrases.append(Phrase(position, label, section, row[section], spans, image))
        elif label in prompts:
            phrases.append(Phrase.of_text(prompts[label], label, row=position, image=image))
    return phrases


def choose_phrases(
    data: PreparedDataset, frame: pd.DataFrame, *, prompt_set: str = "", n_studies: int = 0
) -> tuple[list[Phrase], str]:
    """Phrases of at most `n_studies` studies of `data` (rows of `frame`; 0: of all), and a text that says their kind.

    Words of reports that masks name; where there are none, prompts (`prompts_for`) of labels that have masks or boxes;
    where there are none either, sentences and prompts without a region (`Phrase.known`), to be drawn and not scored.
    """
    annotated = [part["label"] for row in frame.to_dict("records") for part in (*masks_of(row), *boxes_of(row))]
    chosen = prompts_for(data.name, dict.fromkeys([*finding_columns(frame), *annotated]), prompt_set)
    prompts = {label: kinds["pos"][0] for label, kinds in chosen.classes.items() if kinds["pos"]}
    phrases, meaning = phrases_from_masks(frame), "words of the reports that masks name"
    if not phrases:
        phrases = phrases_from_prompts(frame, prompts)
        meaning = f"prompts (set {chosen.name!r}) of labels with a mask or a box: no mask names words of a report"
    if not phrases:
        phrases = phrases_without_region(frame, prompts)
        meaning = f"sentences of reports, or prompts (set {chosen.name!r}): no region is known, so no map is scored"
    first = set(sorted({phrase.row for phrase in phrases})[: n_studies or None])
    return [phrase for phrase in phrases if phrase.row in first], meaning


def region(phrase: Phrase, geometry: Geometry, root: Path | str, crop: int | None = None) -> np.ndarray:
    """Bool (height, width): the phrase's region in pixels of the original image.

    With `crop`: (crop, crop), in the pixels that the model saw; empty where it lies outside them.
    """
    mask = np.zeros((geometry.height, geometry.width) if crop is None else (crop, crop), dtype=bool)
    for path in phrase.masks:
        original = read_gray(Path(root) / path) > 0
        mask |= original if crop is None else geometry.mask_from_original(original, crop=crop)
    for box in phrase.boxes:
        x, y, width, height = box if crop is None else geometry.box_from_original(box, crop=crop)
        mask |= _covered(y, height, mask.shape[0])[:, None] & _covered(x, width, mask.shape[1])
    return mask


def seen(geometry: Geometry, crop: int) -> np.ndarray:
    """(crop, crop) bool: True on the radiograph, False on the padding around it."""
    return geometry.mask_from_original(np.ones((geometry.height, geometry.width), dtype=bool), crop=crop)


def swap_sides(phrase: Phrase) -> Phrase | None:
    """The same phrase with left and right exchanged in it, and nowhere else; None if it names no side.

    The spans move with the text, because the two words differ in length. Case of the first letter is kept.
    """
    if not any(_SIDE.search(phrase.text, start, end) for start, end in phrase.spans):
        return None
    pieces, spans, done, length = [], [], 0, 0
    for start, end in sorted(phrase.spans):
        changed = _SIDE.sub(_other_side, phrase.text[start:end])
        pieces += [phrase.text[done:start], changed]
        begin = length + start - done
        spans.append((begin, begin + len(changed)))
        done, length = end, begin + len(changed)
    return replace(phrase, text="".join([*pieces, phrase.text[done:]]), spans=tuple(spans))


def whole_sentences(phrases: Sequence[Phrase]) -> list[Phrase]:
    """The same regions named by whole sentences: every span grows to the sentences of its text that it touches.

    A sentence that names several regions then stands for each of them, so that a map of it can be right for one at most
    in part.
    """
    grown = []
    for phrase in phrases:
        touched = [
            (first, last)
            for first, last in sentences(phrase.text)
            if any(first < end and start < last for start, end in phrase.spans)
        ]
        grown.append(replace(phrase, spans=tuple(touched) or phrase.spans))
    return grown


def another_text(phrases: Sequence[Phrase], *, seed: int = 0) -> list[Phrase | None]:
    """For each phrase one of another label and another study, drawn at random; None where there is none.

    Image and region stay the same; only the words change.
    """
    rng, partners = np.random.default_rng(seed), []
    labels, rows = np.array([p.label for p in phrases], dtype=object), np.array([p.row for p in phrases])
    for phrase in phrases:
        others = np.flatnonzero((labels != phrase.label) & (rows != phrase.row))
        chosen = phrases[others[rng.integers(len(others))]] if len(others) else None
        partners.append(None if chosen is None else replace(phrase, text=chosen.text, spans=chosen.spans))
    return partners


def _other_side(match: re.Match[str]) -> str:
    word = match.group()
    other = _SIDES[word.lower()]
    return other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other


def _covered(start: float, length: float, pixels: int) -> np.ndarray:
    """(pixels,) bool: those whose centre lies in the interval; of one without a centre, the pixel where it starts."""
    centres = np.arange(pixels) + 0.5
    inside = (centres >= start) & (centres < start + length)
    return inside if inside.any() else np.floor(start) == np.arange(pixels)
