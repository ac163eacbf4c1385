"""What is explored: a radiograph, its texts and, where they are known, the regions that some words name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gloria_core.data.dataset import PreparedDataset
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import decode_gray, read_gray
from gloria_core.data.reports import ReportError, sections
from gloria_core.tasks.annotated_images import annotations_of
from gloria_core.tasks.features import frontal_image
from gloria_core.tasks.phrases import Phrase, Span, region, swap_sides

SWAPPED = "~swapped"  # ends the name of a text whose sides were exchanged


@dataclass(frozen=True)
class Text:
    """A text that is encoded by itself: `name` is its key, `title` its heading; `own` if the user wrote it."""

    name: str
    title: str
    text: str
    own: bool = False


@dataclass(frozen=True)
class Truth:
    """A known region: `mask` (H, W) bool on the image's own pixels, `boxes` (x, y, width, height) where it is made of
    boxes, `spans` the characters of each text that name it."""

    label: str
    mask: NDArray[np.bool_]
    boxes: tuple[tuple[float, ...], ...] = ()
    spans: Mapping[str, Sequence[Span]] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """One radiograph (H, W) uint8 and its texts. Raises ValueError for other pixels, ReportError for no text at all."""

    image: NDArray[np.uint8]
    texts: tuple[Text, ...]
    truths: tuple[Truth, ...] = ()
    title: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.image.ndim != 2 or self.image.dtype != np.uint8:
            raise ValueError(f"the image must be (H, W) uint8 gray, not {self.image.shape} {self.image.dtype}")
        if not self.texts:
            raise ReportError(f"{self.title or 'the study'} has no text: type a report, or choose another study")


def known_studies(data: PreparedDataset) -> list[str]:
    """The test studies with a mask or a box; all test studies where none has one, all studies without a test split."""
    test = data.frame[data.frame["split"] == "test"]
    known = test[(test["masks"] != "") | (test["boxes"] != "")]
    frame = next(frame for frame in (known, test, data.frame) if len(frame))
    return frame["study_id"].astype(str).tolist()


def study_subject(data: PreparedDataset, study: str, text: str = "") -> Subject:
    """A study of a prepared dataset by its study_id, with the truths of its masks and boxes.

    `text`: shown for a study without a report. Raises KeyError for a study that the manifest does not have, ReportError
    for one without text.
    """
    rows = data.frame[data.frame["study_id"].astype(str) == str(study)]
    if rows.empty:
        raise KeyError(f"study {study!r} is not in the manifest of {data.name}; one is {data.frame.study_id.iloc[0]!r}")
    row = rows.iloc[0].to_dict()
    path = frontal_image(row)[1]
    image = read_gray(data.root / path)
    texts = [Text(name, name.capitalize(), row[name]) for name in ("findings", "impression") if row[name].strip()]
    if not texts and text:
        texts = [Text("prompt", "Prompt (the study has no report)", text)]
    title = f"{row['study_id']} · {data.name}, {row['split']}"
    return Subject(image, tuple(texts), _truths(row, image, data.root), title, path)


def own_subject(image: NDArray[np.uint8] | str | Path | bytes, report: str, *, name: str = "") -> Subject:
    """One's own radiograph (file, its bytes, or gray values) and report, split at its headings if it has any.

    PNG, JPEG and DICOM. Raises ImageError for a file that cannot be used, ReportError for a report without text.
    """
    if isinstance(image, bytes):
        name = name or "upload"
        image = decode_gray(image, name)
    elif isinstance(image, str | Path):
        name = name or Path(image).name
        image = read_gray(image)
    texts = [Text(section, section.capitalize(), text) for section, text in sections(report).items()]
    return Subject(image, tuple(texts), (), name or "array", name or "array")


def swapped(text: Text) -> Text | None:
    """The text with left and right exchanged everywhere; None if it names no side."""
    other = swap_sides(Phrase.of_text(text.text, ""))
    return None if other is None else Text(text.name + SWAPPED, text.title, other.text, text.own)


def _truths(row: Mapping, image: NDArray, root: Path) -> tuple[Truth, ...]:
    """Masks that share label and words are one truth; boxes speak for the labels that have no mask."""
    geometry, truths = Geometry.fit(*image.shape, max(image.shape)), []
    by_words: dict[tuple, list[dict]] = {}
    for mask in annotations_of(row, "masks"):
        words = tuple(sorted((name, start, end) for name, start, end in mask.get("spans", ())))
        by_words.setdefault((mask["label"], words), []).append(mask)
    labels = [label for label, _ in by_words]
    for (label, words), masks in by_words.items():
        sides = sorted({mask["side"] for mask in masks if mask.get("side")})
        name = f"{label} ({', '.join(sides)})" if labels.count(label) > 1 and sides else label
        spans = {text: [(start, end) for other, start, end in words if other == text] for text, *_ in words}
        phrase = replace(Phrase.of_text("", label), masks=tuple(mask["path"] for mask in masks))
        truths.append(Truth(name, region(phrase, geometry, root), spans=spans))
    boxes = [box for box in annotations_of(row, "boxes") if box["label"] not in labels]
    for label in dict.fromkeys(box["label"] for box in boxes):
        several = tuple(tuple(map(float, box["xywh"])) for box in boxes if box["label"] == label)
        mask = region(replace(Phrase.of_text("", label), boxes=several), geometry, root)
        truths.append(Truth(label, mask, boxes=several))
    return tuple(truths)
