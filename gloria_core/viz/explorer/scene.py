"""The explorer's scene: one image, its texts and some models become plain values, from which every picture is drawn.

All the computing happens here, once for an image: each model sees the image once, each text is encoded once, and one
call of `maps` a kind gives the maps of all words. What is left for a click is to average rows and to colour pixels.

Pieces of the explorer's scene in forms that a browser draws as they are: pictures, outlines, colours, formulas.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from contourpy import contour_generator
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from gloria_core.data.geometry import Geometry
from gloria_core.tasks.features import image_batches, inference, text_features
from gloria_core.tasks.grounding import area_share, cnr, pointing_hit
from gloria_core.tasks.maps import Kind, kinds_of, maps, upsample, words_of_span
from gloria_core.tasks.phrases import seen
from gloria_core.types import ImageFeatures, TextBatch, TextFeatures
from gloria_core.viz.explorer.subject import SWAPPED, Subject, Text, swapped

SHOWN_SIDE = 1024
"""Longest side in pixels of the picture that is sent; a map is computed on the file's own pixels all the same."""
COLOUR_MAPS = {"viridis": "viridis", "cividis": "cividis", "gray": "gray", "orange-purple": "PuOr_r"}
"""Name on screen -> matplotlib's. All keep their order for colour-blind readers; the last is for maps with a sign."""

_LETTER = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}


def text64(data: bytes) -> str:
    """Bytes as base64 text."""
    return b64encode(data).decode("ascii")


def picture(image: NDArray[np.uint8]) -> str:
    """(H, W) gray pixels as a base64 PNG, no side longer than `SHOWN_SIDE`."""
    shown = Image.fromarray(image)
    longest = max(image.shape)
    if longest > SHOWN_SIDE:
        height, width = (max(1, round(side * SHOWN_SIDE / longest)) for side in image.shape)
        shown = shown.resize((width, height), Image.Resampling.BOX)
    buffer = BytesIO()
    shown.save(buffer, "PNG")
    return text64(buffer.getvalue())


def colours() -> dict[str, str]:
    """Name -> 256 colours of 3 bytes each, as base64."""
    steps = np.arange(256)
    return {
        name: text64((matplotlib.colormaps[source](steps, bytes=True)[:, :3]).tobytes())
        for name, source in COLOUR_MAPS.items()
    }


def outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Closed lines around a mask (H, W), each [x0, y0, x1, y1, ...] in pixels counted from the outer corner."""
    # a frame of background closes the line of a region that touches the border of the image
    padded = np.pad(np.asarray(mask, dtype=float), 1)
    lines = contour_generator(z=padded).lines(0.5)
    # padded cell i is pixel i - 1, whose centre lies at i - 0.5
    return [np.round(line - 0.5, 2).ravel().tolist() for line in lines]


@cache
def formula(latex: str, *, size: float = 17.0) -> str:
    """A formula as SVG in the colour of the text around it, so that no typesetting library has to be loaded.

    Raises ValueError for LaTeX that matplotlib's mathtext does not know.
    """
    glyphs = TextPath((0, 0), f"${latex}$", size=size, prop=FontProperties(math_fontfamily="cm"))
    box = glyphs.get_extents()
    parts = []
    for points, code in glyphs.iter_segments(curves=True, simplify=False):
        pairs = points.reshape(-1, 2) * (1, -1)
        letter = _LETTER[code]
        parts.append(letter if letter == "Z" else letter + " ".join(f"{value:.2f}" for value in pairs.ravel()))
    left, top, width, height = box.x0 - 1, -box.y1 - 1, box.width + 2, box.height + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}" '
        f'width="{width:.0f}" height="{height:.0f}" aria-hidden="true">'
        f'<path fill="currentColor" d="{"".join(parts)}"/></svg>'
    )


VERSION = 1
_NORMS = {"softmax": "softmax over the regions", "sigmoid": "sigmoid of each region by itself"}
_WORD = re.compile(r"\w")
_ABOUT = {
    "word_softmax": (r"s_{rt} = \mathrm{softmax}_t\,(v_r \cdot w_t)", "softmax over the words at each region"),
    "cosine": (r"c_{rt} = \cos(v_r, w_t)", "not normalised; from −1 to 1, and the sign counts"),
}


@dataclass(frozen=True)
class Side:
    """One model on one image: its maps' kinds, where its crop lies, and the image's features (of one image)."""

    model: nn.Module
    kinds: tuple[Kind, ...]
    geometry: Geometry
    features: ImageFeatures

    @property
    def frame(self) -> list[float]:
        """[x, y, width, height] of the crop in pixels of the original image; it may reach beyond the image."""
        crop = self.model.config.crop
        (x0, y0), (x1, y1) = self.geometry.points_to_original([[0, 0], [crop, crop]], crop=crop)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]


class SceneMaker:
    """Makes the scene of one subject; texts of one's own can be added, and cost one pass of the text encoder each.

    `models`: name -> model, shown in this order. Raises ValueError for no model, or one without word-region maps.
    """

    def __init__(self, models: Mapping[str, nn.Module], subject: Subject) -> None:
        if not models:
            raise ValueError("the explorer needs at least one model")
        self.subject = subject
        self.sides = {name: look(model, subject.image, name=name) for name, model in models.items()}
        self._regions = [
            [side.geometry.mask_from_original(truth.mask, crop=side.model.config.crop) for truth in subject.truths]
            for side in self.sides.values()
        ]
        self.texts: list[dict[str, Any]] = []
        self.maps: dict[str, bytes] = {}
        self.shapes: dict[str, list[int]] = {}
        self.scores: dict[str, list] = {}
        self.add(subject.texts)

    def add(self, texts: Sequence[Text]) -> None:
        """Encode more texts, each also with left and right exchanged where it names a side.

        Raises ReportError for a text without a word.
        """
        known = {text["id"] for text in self.texts}
        fresh = [text for text in texts if text.name not in known]
        every = [other for text in fresh for other in (text, swapped(text)) if other is not None]
        if not every:
            return
        encoded = [
            text_features(side.model, [text.text for text in every], precision="float32", clean=False)
            for side in self.sides.values()
        ]
        entries = {text.name: _entry(text, encoded[0].batch, i, self.subject) for i, text in enumerate(every)}
        for name in [text.name for text in fresh]:
            other = entries.get(name + SWAPPED)
            if other is not None and len(other["words"]) == len(entries[name]["words"]):
                entries[name]["swap"] = other["id"]
                other["phrases"] = entries[name]["phrases"]
        for number, side in enumerate(self.sides.values()):
            found = _all_maps(side, encoded[number].features)
            for i, entry in enumerate(entries.values()):
                key = f"{number}/{entry['id']}"
                grids = _by_word(found[:, i], encoded[number].batch.spans[i], entry["words"])
                self.maps[key], self.shapes[key] = grids.astype("<f4").tobytes(), list(grids.shape)
                self.scores[key] = _scores(grids, units(entry), side, self._regions[number])
        self.texts += entries.values()

    def scene(self) -> dict[str, Any]:
        """Everything but the maps themselves, in JSON's types; a copy, so that two scenes can be told apart."""
        subject = self.subject
        height, width = subject.image.shape
        return {
            "version": VERSION,
            "title": subject.title,
            "image": {"name": subject.name, "width": width, "height": height, "png": picture(subject.image)},
            "colours": colours(),
            "models": [_describe(name, side) for name, side in self.sides.items()],
            "texts": list(self.texts),
            "truths": [
                {
                    "label": truth.label,
                    "lines": [] if truth.boxes else outlines(truth.mask),
                    "boxes": [list(box) for box in truth.boxes],
                    "chance": [self._chance(number, i) for number in range(len(self.sides))],
                }
                for i, truth in enumerate(subject.truths)
            ],
            "shapes": dict(self.shapes),
            "scores": dict(self.scores),
        }

    def _chance(self, side: int, truth: int) -> float | None:
        this = list(self.sides.values())[side]
        visible = np.where(seen(this.geometry, this.model.config.crop), 0.0, np.nan)
        return _plain(area_share(visible, self._regions[side][truth]))


def look(model: nn.Module, image: NDArray[np.uint8], *, name: str = "model") -> Side:
    """Let a model see one radiograph (H, W). Raises ValueError for a model that has no map to show."""
    kinds = kinds_of(model)
    if not kinds:
        raise ValueError(f"{name}: {model.config.objective} has neither attention nor word and region vectors to show")
    geometry = Geometry.fit(*image.shape, model.config.image_size)
    one = pd.DataFrame({"study_id": ["image"], "images": ["image"], "views": [""]})
    _, features = next(image_batches(model, one, {"image": geometry.apply(image)}, precision="float32"))
    return Side(model, kinds, geometry, features)


def units(entry: Mapping[str, Any]) -> list[list[int]]:
    """The word numbers of all that can be chosen in a text: its words, its sentences, its phrases, then all of it."""
    words = range(len(entry["words"]))
    by_sentence = [[w for w in words if entry["words"][w][2] == number] for number in range(entry["sentences"])]
    return [*([w] for w in words), *by_sentence, *(phrase["words"] for phrase in entry["phrases"]), list(words)]


def unit_map(grids: NDArray, kind: int, words: Sequence[int]) -> NDArray | None:
    """(K, W, h, w) maps -> (h, w): the mean over the words that have a map; None where none has."""
    rows = grids[kind, list(words)]
    known = ~np.isnan(rows).any(axis=(1, 2))
    return rows[known].astype(np.float64).mean(axis=0) if known.any() else None


def _entry(text: Text, batch: TextBatch, row: int, subject: Subject) -> dict[str, Any]:
    """A text with its words as the first model reads them; punctuation can be read, but not chosen."""
    known = torch.where(batch.word_ids[row] >= 0, batch.sentence_ids[row], -1)
    sentence_of = dict(zip(batch.word_ids[row].tolist(), known.tolist(), strict=True))
    chosen = [
        [start, end, sentence_of[column]]
        for column, (start, end) in enumerate(batch.spans[row])
        if start < end and _WORD.search(batch.words[row][column])
    ]
    spans = [(start, end) for start, end, _ in chosen]
    phrases = [
        {"truth": number, "words": [w for s, e in truth.spans.get(text.name, ()) for w in words_of_span(spans, s, e)]}
        for number, truth in enumerate(subject.truths)
    ]
    return {
        "id": text.name,
        "name": text.title,
        "text": text.text,
        "own": text.own,
        "hidden": text.name.endswith(SWAPPED),
        "swap": None,
        "words": chosen,
        "sentences": 1 + max((sentence for *_, sentence in chosen), default=-1),
        "phrases": [phrase for phrase in phrases if phrase["words"]],
        # characters from here on lie beyond the token limit
        "end": max((end for _, end in batch.spans[row]), default=0),
    }


def _all_maps(side: Side, texts: TextFeatures) -> NDArray[np.float32]:
    """(K, N, W, h, w) maps of N texts, NaN in the rows of words that the method leaves out."""
    found = []
    with inference(side.model, None, "float32") as where:
        for kind in side.kinds:
            rows = maps(side.model.objective, side.features.to(where), texts.to(where), kind=kind).float().cpu()
            unused = (rows == 0).flatten(2).all(dim=2)
            found.append(rows.masked_fill(unused[:, :, None, None], torch.nan).numpy())
    width = max(rows.shape[1] for rows in found)
    pad = [np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0), (0, 0)), constant_values=np.nan) for r in found]
    return np.stack(pad)


def _by_word(rows: NDArray, spans: Sequence[tuple[int, int]], words: Sequence[Sequence[int]]) -> NDArray:
    """(K, W, h, w) rows of one model's words -> rows of the words on screen, found by their place in the text."""
    out = np.full((len(rows), len(words), *rows.shape[2:]), np.nan, dtype=np.float32)
    for number, (start, end, _) in enumerate(words):
        columns = [column for column in words_of_span(spans, start, end) if column < rows.shape[1]]
        for kind in range(len(rows)):
            mean = unit_map(rows, kind, columns) if columns else None
            if mean is not None:
                out[kind, number] = mean
    return out


def _scores(grids: NDArray, chosen: Sequence[Sequence[int]], side: Side, regions: Sequence[NDArray]) -> list:
    """[kind][truth][unit] -> [CNR, pointing game] on the pixels of the crop, None where there is none."""
    crop = side.model.config.crop
    visible = seen(side.geometry, crop)
    out: list = [[[] for _ in regions] for _ in side.kinds]
    for kind in range(len(side.kinds)):
        for words in chosen if regions else ():
            values = unit_map(grids, kind, words) if words else None
            if values is not None:
                pixels = upsample(torch.from_numpy(values), crop, crop).numpy()
                values = np.where(visible, pixels, np.nan)
            for truth, mask in enumerate(regions):
                pair = None if values is None else [_plain(cnr(values, mask)), _plain(pointing_hit(values, mask))]
                out[kind][truth].append(pair)
    return out


def _describe(name: str, side: Side) -> dict[str, Any]:
    objective, config = side.model.objective, side.model.config
    kinds = []
    for kind in side.kinds:
        latex, norm, unit = *_ABOUT.get(kind, ("", "")), "word"
        if kind == "attention":
            unit, norm = objective.rows.unit, f"{_NORMS[objective.rows.normalisation]}; what the loss used"
            latex = objective.attention_formula
        kinds.append(
            {
                "name": kind,
                "label": "attention (loss)" if kind == "attention" else kind.replace("_", " "),
                "signed": kind == "cosine",
                "unit": unit,
                "rows": f"Rows: one a {unit}, {norm}.",
                "latex": latex,
                "formula": formula(latex) if latex else "",
            }
        )
    return {
        "name": name,
        "objective": config.objective,
        "behavior": config.behavior,
        "section": config.text_section,
        "frame": side.frame,
        "kinds": kinds,
    }


def _plain(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
