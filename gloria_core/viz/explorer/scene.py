"""The explorer's scene: one image, its texts and some models as plain values, from which a browser draws every picture.

All the computing happens here, once for an image: each model encodes the image once, each text is encoded once, and one
call of `maps` a kind gives the maps of all words. A click only averages rows and colours pixels.
"""

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
from gloria_core.tasks.features import EncodedTexts, image_batches, inference, text_features
from gloria_core.tasks.grounding import score_map
from gloria_core.tasks.maps import Kind, kinds_of, maps, upsample, words_of_span
from gloria_core.tasks.phrases import seen
from gloria_core.types import ImageFeatures, TextBatch
from gloria_core.viz.explorer.subject import SWAPPED, Subject, Text, swapped

# Longest side in pixels of the picture that is sent; a map is computed on the file's own pixels all the same.
SHOWN_SIDE = 1024
# Name on screen -> matplotlib's. All keep their order for colour-blind readers; the last is for maps with a sign.
COLOUR_MAPS = {"viridis": "viridis", "cividis": "cividis", "gray": "gray", "orange-purple": "PuOr_r"}

_LETTER = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}
_NORMALISATION = {"softmax": "softmax over the regions", "sigmoid": "sigmoid of each region by itself"}
_KINDS = {
    "word_softmax": (r"s_{rt} = \mathrm{softmax}_t\,(v_r \cdot w_t)", "softmax over the words at each region"),
    "cosine": (r"c_{rt} = \cos(v_r, w_t)", "not normalised; from −1 to 1, and the sign counts"),
}


@dataclass(frozen=True)
class EncodedImage:
    """What one model makes of the image: the kinds of its maps, where its crop lies, its features (of one image)."""

    model: nn.Module
    kinds: tuple[Kind, ...]
    geometry: Geometry
    features: ImageFeatures

    @property
    def crop(self) -> int:
        return self.model.config.crop

    @property
    def frame(self) -> list[float]:
        """[x, y, width, height] of the crop in pixels of the original image; it may reach beyond the image."""
        (x0, y0), (x1, y1) = self.geometry.points_to_original([[0, 0], [self.crop, self.crop]], crop=self.crop)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]

    def visible(self) -> NDArray[np.bool_]:
        """(crop, crop): True on the radiograph, False on the padding around it."""
        return seen(self.geometry, self.crop)


def encode_image(model: nn.Module, image: NDArray[np.uint8], *, name: str = "model") -> EncodedImage:
    """Encode one radiograph (H, W). Raises ValueError for a model that has no map to show."""
    kinds = kinds_of(model)
    if not kinds:
        raise ValueError(f"{name}: {model.config.objective} has neither attention nor word and region vectors to show")
    geometry = Geometry.fit(*image.shape, model.config.image_size)
    one = pd.DataFrame({"study_id": ["image"], "images": ["image"], "views": [""]})
    _, features = next(image_batches(model, one, {"image": geometry.apply(image)}, precision="float32"))
    return EncodedImage(model, kinds, geometry, features)


class SceneMaker:
    """Makes the scene of one subject; more texts can be added, and cost one pass of the text encoder each.

    `models`: name -> model, shown in this order. Raises ValueError for no model, or one without word-region maps.
    """

    def __init__(self, models: Mapping[str, nn.Module], subject: Subject) -> None:
        if not models:
            raise ValueError("the explorer needs at least one model")
        self.subject = subject
        self.encoded = {name: encode_image(model, subject.image, name=name) for name, model in models.items()}
        self._regions = [
            [image.geometry.mask_from_original(truth.mask, crop=image.crop) for truth in subject.truths]
            for image in self.encoded.values()
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
        every = [version for text in texts for version in (text, swapped(text)) if version is not None]
        encoded = [
            text_features(image.model, [text.text for text in every], precision="float32", clean=False)
            for image in self.encoded.values()
        ]
        entries = {text.name: _entry(text, encoded[0].batch, i, self.subject) for i, text in enumerate(every)}
        for text in texts:
            entry, other = entries[text.name], entries.get(text.name + SWAPPED)
            if other is not None and len(other["words"]) == len(entry["words"]):
                entry["swap"], other["phrases"] = other["id"], entry["phrases"]
        for number, image in enumerate(self.encoded.values()):
            maps_of_words = _word_maps(image, encoded[number], entries.values())
            for entry, grids in zip(entries.values(), maps_of_words, strict=True):
                key = f"{number}/{entry['id']}"
                self.maps[key], self.shapes[key] = grids.astype("<f4").tobytes(), list(grids.shape)
                self.scores[key] = _scores(image, grids, units(entry), self._regions[number])
        self.texts += entries.values()

    def scene(self) -> dict[str, Any]:
        """Everything but the maps themselves, in JSON's types; a copy, so that two scenes can be told apart."""
        subject, truths = self.subject, []
        height, width = subject.image.shape
        visible = [image.visible() for image in self.encoded.values()]
        for truth, *masks in zip(subject.truths, *self._regions, strict=True):
            lines = [] if truth.boxes else outlines(truth.mask)
            truths.append({"label": truth.label, "lines": lines, "boxes": [list(box) for box in truth.boxes]})
            truths[-1]["chance"] = [_rounded(mask[shown].mean()) for shown, mask in zip(visible, masks, strict=True)]
        return {
            "title": subject.title,
            "image": {"name": subject.name, "width": width, "height": height, "png": png64(subject.image)},
            "colours": {
                name: base64(matplotlib.colormaps[source](np.arange(256), bytes=True)[:, :3].tobytes())
                for name, source in COLOUR_MAPS.items()
            },
            "models": [_describe(name, image) for name, image in self.encoded.items()],
            "texts": list(self.texts),
            "truths": truths,
            "shapes": dict(self.shapes),
            "scores": dict(self.scores),
        }


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
    """A text with its words as the first model reads them; punctuation can be read, but not chosen.

    Places in the text count characters (code points), as Python does; the page counts them alike.
    """
    sentence_of = dict(zip(batch.word_ids[row].tolist(), batch.sentence_ids[row].tolist(), strict=True))
    chosen = [
        [start, end, sentence_of[column]]
        for column, (start, end) in enumerate(batch.spans[row])
        if start < end and re.search(r"\w", batch.words[row][column])
    ]
    spans = [(start, end) for start, end, _ in chosen]
    phrases = [
        {"truth": number, "words": [w for s, e in truth.spans.get(text.name, ()) for w in words_of_span(spans, s, e)]}
        for number, truth in enumerate(subject.truths)
    ]
    known = {"id": text.name, "name": text.title, "text": text.text, "own": text.own, "words": chosen}
    return known | {
        "hidden": text.name.endswith(SWAPPED),
        "swap": None,
        "sentences": 1 + max((sentence for *_, sentence in chosen), default=-1),
        "phrases": [phrase for phrase in phrases if phrase["words"]],
        # characters from here on lie beyond the token limit
        "end": max((end for _, end in batch.spans[row]), default=0),
    }


def _word_maps(image: EncodedImage, texts: EncodedTexts, entries: Sequence[Mapping[str, Any]]) -> list[NDArray]:
    """For each text (K, W, h, w) maps of the words on screen; NaN for words that were cut off or that are left out.

    The words on screen are the first model's; another model's words are matched by their place in the text.
    """
    with inference(image.model, "float32") as device:
        inputs = image.model.objective, image.features.to(device), texts.features.to(device)
        by_kind = torch.stack([maps(*inputs, kind=kind) for kind in image.kinds]).float().cpu().numpy()
    by_kind[~by_kind.any(axis=(3, 4))] = np.nan  # words that the method leaves out
    found = []
    for i, entry in enumerate(entries):
        grids = np.full((len(by_kind), len(entry["words"]), *by_kind.shape[3:]), np.nan, dtype=np.float32)
        for number, (start, end, _) in enumerate(entry["words"]):
            columns = [c for c in words_of_span(texts.batch.spans[i], start, end) if c < by_kind.shape[2]]
            for kind, rows in enumerate(by_kind):
                mean = unit_map(rows, i, columns)
                if mean is not None:
                    grids[kind, number] = mean
        found.append(grids)
    return found


def _scores(image: EncodedImage, grids: NDArray, chosen: Sequence[Sequence[int]], regions: Sequence[NDArray]) -> list:
    """[kind][truth][unit] -> [CNR, pointing game] on the pixels of the crop, None where there is none."""
    visible, scores = image.visible(), []
    for kind in range(len(image.kinds)):
        scores.append([[] for _ in regions])
        for words in chosen if regions else ():
            values = unit_map(grids, kind, words)
            if values is not None:
                values = np.where(visible, upsample(torch.from_numpy(values), image.crop, image.crop).numpy(), np.nan)
            for truth, mask in enumerate(regions):
                found = {} if values is None else score_map(values, mask)
                pair = [_rounded(found[name]) for name in ("cnr", "pointing_game")] if found else None
                scores[kind][truth].append(pair)
    return scores


def _describe(name: str, image: EncodedImage) -> dict[str, Any]:
    objective, config = image.model.objective, image.model.config
    kinds = []
    for kind in image.kinds:
        if kind == "attention":
            latex, unit, label = objective.attention_formula, objective.rows.unit, "attention (loss)"
            norm = f"{_NORMALISATION[objective.rows.normalisation]}; what the loss used"
        else:
            (latex, norm), unit, label = _KINDS[kind], "word", kind.replace("_", " ")
        rows = f"Rows: one a {unit}, {norm}."
        shown = {"name": kind, "label": label, "signed": kind == "cosine", "unit": unit, "rows": rows}
        kinds.append(shown | {"latex": latex, "formula": formula(latex) if latex else ""})
    described = {"name": name, "objective": config.objective, "behavior": config.behavior}
    return described | {"section": config.text_section, "frame": image.frame, "kinds": kinds}


def base64(data: bytes) -> str:
    """Bytes as base64 text."""
    return b64encode(data).decode("ascii")


def png64(image: NDArray[np.uint8]) -> str:
    """(H, W) gray pixels as a base64 PNG, no side longer than `SHOWN_SIDE`."""
    shown, buffer = Image.fromarray(image), BytesIO()
    shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BOX, reducing_gap=None)
    shown.save(buffer, "PNG")
    return base64(buffer.getvalue())


def outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Closed lines around a mask (H, W), each [x0, y0, x1, y1, ...] in pixels counted from the outer corner."""
    # a frame of background closes the line of a region that touches the border of the image
    lines = contour_generator(z=np.pad(np.asarray(mask, dtype=float), 1)).lines(0.5)
    # padded cell i is pixel i - 1, whose centre lies at i - 0.5
    return [np.round(line - 0.5, 2).ravel().tolist() for line in lines]


@cache
def formula(latex: str) -> str:
    """A formula as SVG in the colour of the text around it, so that no typesetting library has to be loaded.

    Raises ValueError for LaTeX that matplotlib's mathtext does not know.
    """
    glyphs = TextPath((0, 0), f"${latex}$", size=17.0, prop=FontProperties(math_fontfamily="cm"))
    box, parts = glyphs.get_extents(), []
    for points, code in glyphs.iter_segments(curves=True, simplify=False):
        pairs = [] if code == Outline.CLOSEPOLY else (points.reshape(-1, 2) * (1, -1)).flat
        parts.append(_LETTER[code] + " ".join(f"{value:.2f}" for value in pairs))
    left, top, width, height = box.x0 - 1, -box.y1 - 1, box.width + 2, box.height + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}" '
        f'width="{width:.0f}" height="{height:.0f}" aria-hidden="true">'
        f'<path fill="currentColor" d="{"".join(parts)}"/></svg>'
    )


def _rounded(value: float) -> float | None:
    """Six digits; None for what JSON cannot say (no score, or an infinite one)."""
    return round(float(value), 6) if np.isfinite(value) else None
