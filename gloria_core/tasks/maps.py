"""Where a word points: maps of words and phrases over the regions of an image.

Three kinds of map, from the same word and region vectors:

- `attention`: what the loss used. GLoRIA's (Huang et al. 2021, equation 5; gloria_loss.py) is a softmax over words,
  times 4, then a softmax over regions: nearly flat, at most 0.13 on 19 x 19 regions.
- `word_softmax`: its first step, the share of each word among all words at a region; constant for a one-word text.
- `cosine`: the cosine of region and word, as in BioViL (Boecking et al. 2022). The only one with a sign.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gloria_core.objectives import Objective
from gloria_core.tasks.features import EncodedTexts, image_batches, inference, select, text_features
from gloria_core.tasks.phrases import Phrase
from gloria_core.types import ImageFeatures, TextFeatures

Kind = Literal["attention", "word_softmax", "cosine"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def maps(objective: Objective, images: ImageFeatures, texts: TextFeatures, *, kind: Kind = "attention") -> Tensor:
    """(N, W, h, w) maps of image n with text n; one image with N texts is allowed too.

    Rows of words that do not count (padding, and what the objective leaves out) are zero. Where the objective attends
    by sentence (`rows.unit`), all words of a sentence have the same row. Raises ValueError for an unknown kind or
    unpaired inputs, NotImplementedError for an objective without word-region vectors.
    """
    n = len(texts.words)
    if len(images.pooled) == 1 and n > 1:
        images = select(images, [0] * n)
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
    values = torch.einsum("nhwd,ntd->nthw", regions, words)
    if kind == "word_softmax":
        values = values.masked_fill(~mask, -torch.inf).softmax(dim=1)
    return values.masked_fill(~mask, 0.0)


def kinds_of(model: nn.Module) -> tuple[Kind, ...]:
    """The kinds of map that a model has; without projected words and regions at most the attention."""
    attention = ("attention",) if model.objective.rows else ()
    return attention + (("word_softmax", "cosine") if model.objective.has_local_embeddings else ())


def words_of_span(spans: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Columns of the words that share a character with [start, end); `spans` is `TextBatch.spans[i]`.

    Special tokens have span (0, 0) and are never in it. Empty where the words were cut off by the token limit.
    """
    return [column for column, (s, e) in enumerate(spans) if s < e and s < end and start < e]


def phrase_words(texts: EncodedTexts, row: int, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Columns of all words of text `row` that lie in one of the spans."""
    return sorted({word for span in spans for word in words_of_span(texts.batch.spans[row], *span)})


def upsample(values: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) cells -> (..., height, width) pixels, bilinear between cell centres, constant beyond the outer ones.

    Cells tile the pixels evenly, as in `Geometry.map_to_original`. (The receptive field of a ResNet cell is centred
    half a cell higher and further left; the padding of its layers blurs that difference.)
    """
    flat = values.reshape(-1, 1, *values.shape[-2:])
    pixels = F.interpolate(flat, (height, width), mode="bilinear", align_corners=False)
    return pixels.reshape(*values.shape[:-2], height, width)


def phrase_maps(
    model: nn.Module, images: ImageFeatures, pairs: Sequence[tuple[int, Phrase]], kinds: Sequence[Kind] | None = None
) -> list[dict[Kind, Tensor | None]]:
    """For each pair (row of `images`, phrase) its map of each kind (default: all that the model has).

    A map is (h, w) float64, the mean over the words of the phrase; None where they are beyond the token limit.
    """
    kinds = kinds_of(model) if kinds is None else kinds
    distinct = list(dict.fromkeys(phrase.text for _, phrase in pairs))
    # not cleaned even for published weights: the spans of the phrases count characters of the original text
    texts = text_features(model, distinct, clean=False)
    number = {text: i for i, text in enumerate(distinct)}
    results: list[dict[Kind, Tensor | None]] = []
    for first in range(0, len(pairs), 32):
        part = pairs[first : first + 32]
        rows = [number[phrase.text] for _, phrase in part]
        some_images, some_texts = select(images, [image for image, _ in part]), select(texts.features, rows)
        with inference(model, "float32") as where:
            inputs = some_images.to(where), some_texts.to(where)
            values = {kind: maps(model.objective, *inputs, kind=kind).cpu().double() for kind in kinds}
        for i, (_, phrase) in enumerate(part):
            words = phrase_words(texts, rows[i], phrase.spans)
            results.append({kind: values[kind][i, words].mean(dim=0) if words else None for kind in kinds})
    return results


def phrases_by_batch(
    model: nn.Module, frame: pd.DataFrame, cache, phrases: Sequence[Phrase], *, batch_size: int = 64
) -> Iterator[tuple[ImageFeatures, list[tuple[int, int]]]]:
    """Encode the images of the phrases; yields images and, for each phrase on them, (row of the images, number)."""
    used = sorted({phrase.row for phrase in phrases})
    for block, images in image_batches(model, frame.iloc[used], cache, batch_size=batch_size):
        here = {row: i for i, row in enumerate(used[block])}
        yield images, [(here[phrase.row], number) for number, phrase in enumerate(phrases) if phrase.row in here]


def original_maps(
    model: nn.Module, frame: pd.DataFrame, cache, phrases: Sequence[Phrase], *, kinds: Sequence[Kind] | None = None
) -> list[dict[Kind, np.ndarray | None]]:
    """For each phrase its maps in pixels of the original image: kind -> (H, W), NaN outside what the model saw.

    `phrases.region` gives the truth in the same pixels. None where the words are beyond the token limit.
    """
    results: list[dict[Kind, np.ndarray | None]] = [{} for _ in phrases]
    for images, on_images in phrases_by_batch(model, frame, cache, phrases):
        grids = phrase_maps(model, images, [(image, phrases[number]) for image, number in on_images], kinds)
        for (_, number), by_kind in zip(on_images, grids, strict=True):
            geometry = cache.geometry(phrases[number].image)
            for kind, grid in by_kind.items():
                pixels = None if grid is None else geometry.map_to_original(grid, crop=model.config.crop)
                results[number][kind] = pixels
    return results
