"""Where a word points: maps of words and phrases over the regions of an image.

Three maps, of the same word and region vectors, and not the same thing:

- `attention`: what the loss used. GLoRIA's (Huang et al. 2021, equation 5; gloria_loss.py) is a softmax over words,
  times 4, then a softmax over regions: nearly flat, at most 0.13 on 19 x 19 regions.
- `word_softmax`: its first step, the share of each word among all words at a region; constant for a one-word text.
- `cosine`: the cosine of region and word, what BioViL (Boecking et al. 2022) shows. The only one with a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloria_core.objectives import Objective
from gloria_core.tasks.features import (
    EncodedTexts,
    blank_images,
    blank_texts,
    image_batches,
    inference,
    select,
    text_features,
)
from gloria_core.tasks.phrases import Phrase
from gloria_core.training.precision import Precision
from gloria_core.types import ImageFeatures, TextFeatures

Kind = Literal["attention", "word_softmax", "cosine"]
KINDS: tuple[Kind, ...] = ("attention", "word_softmax", "cosine")


def maps(objective: Objective, images: ImageFeatures, texts: TextFeatures, *, kind: Kind = "attention") -> Tensor:
    """(N, W, h, w) maps of image n with text n; one image with N texts is allowed too.

    Rows of words that do not count (padding, and what the objective leaves out) are zero. Where the objective attends
    by sentence (`rows.unit`), all words of a sentence have the same row. Raises ValueError for an unknown kind or
    unpaired inputs, NotImplementedError for an objective without word-region vectors.
    """
    n = len(texts.words)
    if len(images.pooled) == 1 and n > 1:
        images = _take(images, torch.zeros(n, dtype=torch.int64))
    if len(images.pooled) != n:
        raise ValueError(f"{len(images.pooled)} images and {n} texts: maps are of image n with text n")
    if kind == "attention":
        return objective.attention(images, texts)
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; available: {', '.join(KINDS)}")
    regions, words, mask = objective.local_embeddings(images, texts)
    mask = mask[:, :, None, None]
    if kind == "cosine":
        regions, words = F.normalize(regions, dim=-1), F.normalize(words, dim=-1)
    found = torch.einsum("nhwd,ntd->nthw", regions, words)
    if kind == "word_softmax":
        found = found.masked_fill(~mask, -torch.inf).softmax(dim=1)
    return found.masked_fill(~mask, 0.0)


def kinds_of(model: nn.Module) -> tuple[Kind, ...]:
    """The maps that a model has: none of words and regions where its objective never projects them."""
    objective = model.objective
    kinds: list[Kind] = [] if objective.rows is None else ["attention"]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            objective.local_embeddings(blank_images(model, device), blank_texts(model).to(device))
    except NotImplementedError:
        return tuple(kinds)
    return (*kinds, "word_softmax", "cosine")


def words_of_span(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Columns of the words that share a character with [start, end); `spans` is `TextBatch.spans[i]`.

    Specials have span (0, 0) and are never in it. Empty where the words were cut off by the token limit.
    """
    return [column for column, (s, e) in enumerate(spans) if s < e and s < end and start < e]


def phrase_map(rows: Tensor, words: Sequence[int]) -> Tensor:
    """(W, h, w) maps of one text, columns of words -> (h, w), their mean. Raises ValueError for no words."""
    if not len(words):
        raise ValueError("a phrase map needs at least one word")
    return rows[list(words)].mean(dim=0)


def upsample(values: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) cells -> (..., height, width) pixels, bilinear between cell centres, held at the border.

    Cells are taken to tile the pixels evenly, as `Geometry.map_to_original` takes them. (The receptive field of a
    ResNet cell is centred half a cell higher and further left; the padding of its layers blurs that difference.)
    """
    flat = values.reshape(-1, 1, *values.shape[-2:])
    return F.interpolate(flat, (height, width), mode="bilinear", align_corners=False).reshape(
        *values.shape[:-2], height, width
    )


def phrase_words(texts: EncodedTexts, row: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Columns of all words of text `row` that lie in one of the spans."""
    return sorted({word for span in spans for word in words_of_span(texts.batch.spans[row], *span)})


def phrase_grids(
    model: nn.Module,
    images: ImageFeatures,
    asked: Sequence[tuple[int, Phrase]],
    kinds: Sequence[Kind] | None = None,
    *,
    precision: Precision = "auto",
) -> list[dict[Kind, Tensor | None]]:
    """For every (image, phrase) its (h, w) map of each kind, float64; None where its words were cut off.

    `kinds`: all that the model has, by default. The first of each pair is a row of `images`. Each distinct text is
    encoded once.
    """
    # uncleaned even for published weights: the spans of the phrases count characters of the text as it is
    kinds = kinds_of(model) if kinds is None else kinds
    distinct = list(dict.fromkeys(phrase.text for _, phrase in asked))
    texts = text_features(model, distinct, precision=precision, clean=False)
    number = {text: i for i, text in enumerate(distinct)}
    out: list[dict[Kind, Tensor | None]] = []
    for first in range(0, len(asked), 32):
        part = asked[first : first + 32]
        rows = [number[phrase.text] for _, phrase in part]
        pair = _take(images, torch.tensor([image for image, _ in part])), select(texts.features, rows)
        with inference(model, None, "float32") as where:
            found = {kind: maps(model.objective, *(p.to(where) for p in pair), kind=kind).cpu() for kind in kinds}
        for i, (_, phrase) in enumerate(part):
            words = phrase_words(texts, rows[i], phrase.spans)
            by_kind: dict[Kind, Tensor | None] = dict.fromkeys(kinds)
            for kind in kinds if words else ():
                by_kind[kind] = phrase_map(found[kind][i].double(), words)
            out.append(by_kind)
    return out


def original_maps(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    phrases: Sequence[Phrase],
    *,
    kinds: Sequence[Kind] | None = None,
    precision: Precision = "auto",
) -> list[dict[Kind, np.ndarray | None]]:
    """For every phrase its maps on the pixels of the original image: kind -> (H, W), NaN outside what the model saw.

    For figures; `phrases.original_region` is the truth on the same pixels. None where the words were cut off.
    """
    used, crop = sorted({phrase.row for phrase in phrases}), model.config.crop
    out: list[dict[Kind, np.ndarray | None]] = [{} for _ in phrases]
    for block, images in image_batches(model, frame.iloc[used], cache, precision=precision):
        here = {row: i for i, row in enumerate(used[block])}
        mine = [i for i, phrase in enumerate(phrases) if phrase.row in here]
        grids = phrase_grids(
            model, images, [(here[phrases[i].row], phrases[i]) for i in mine], kinds, precision=precision
        )
        for i, by_kind in zip(mine, grids, strict=True):
            geometry = cache.geometry(phrases[i].image)
            out[i] = {
                kind: None if grid is None else geometry.map_to_original(grid, crop=crop)
                for kind, grid in by_kind.items()
            }
    return out


def _take(images: ImageFeatures, rows: Tensor) -> ImageFeatures:
    rows = rows.to(images.pooled.device)
    extra = None if images.cls_attention is None else images.cls_attention[rows]
    return ImageFeatures(images.pooled[rows], images.regions[rows], extra)
