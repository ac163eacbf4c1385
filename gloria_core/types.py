"""The vocabulary of the study: what a study is, what an encoder returns, what an objective gives back.

Shape letters, used in every docstring and einsum of the package:

| letter | meaning                                   |
|--------|-------------------------------------------|
| B      | images (after views are flattened: B * V) |
| N      | texts (after texts per study: B * T)      |
| V      | views of one study                        |
| W      | words, specials included (see TextBatch)  |
| S      | sentences                                 |
| R      | image regions, R = h * w                  |
| D      | embedding width                           |
| K      | classes                                   |
| L      | tokens (word pieces)                      |
"""

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

# `published` repeats the authors' released code, quirks included; `corrected` is the default for new training.
Behavior = Literal["published", "corrected"]


class _Movable:
    """Gives a dataclass of tensors `to(device)`; other fields are left alone.

    `PADDING`: what axis 1 of a field is lengthened with, where that is not zero.
    """

    PADDING: ClassVar[dict[str, int]] = {}

    def to(self, device: torch.device | str) -> Self:
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return replace(self, **{name: value.to(device) for name, value in values if hasattr(value, "to")})


@dataclass(frozen=True)
class TextBatch(_Movable):
    """N tokenised texts, padded to the longest of them.

    Words are numbered over the kept tokens: `[CLS]` is word 0, the n words of the text are 1..n, `[SEP]` is n + 1.
    Padding has word -1. Specials and padding have sentence -1; sentences count from 0.

    Shape:
        input_ids, attention_mask, token_type_ids, word_ids, sentence_ids: (N, L) int64
        unknown: (N, L) bool, True where the piece is the tokenizer's unknown token
    `words[i][j]` is the text of word j of text i (specials included), `spans[i][j]` its (start, end) in the text
    that was tokenised, (0, 0) for specials. Both are for people and figures; no forward pass reads them.
    """

    PADDING: ClassVar[dict[str, int]] = {"word_ids": -1, "sentence_ids": -1}

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    word_ids: Tensor
    sentence_ids: Tensor
    unknown: Tensor
    words: tuple[tuple[str, ...], ...] = ()
    spans: tuple[tuple[tuple[int, int], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Batch(_Movable):
    """One training batch of B studies, each with V views and T texts.

    Shape:
        pixels: (B, V, C, H, W) float32, normalised
        text:   N = B * T texts, study-major (study 0's T texts first)
        labels: (B, K) float32, NaN where unknown, -1 where uncertain
        index:  (B,) int64, rows of the dataset's frame
    """

    pixels: Tensor
    text: TextBatch
    labels: Tensor
    index: Tensor

    @property
    def views(self) -> int:
        return self.pixels.shape[1]

    @property
    def texts_per_study(self) -> int:
        return len(self.text) // len(self.pixels)


@dataclass(frozen=True)
class ImageFeatures(_Movable):
    """What an image encoder returns, before any objective's projection.

    Shape: `pooled` (B, Dg) the global feature; `regions` (B, h, w, Dr) row-major from the top left;
    `cls_attention` (B, h, w) or None.
    """

    pooled: Tensor
    regions: Tensor
    cls_attention: Tensor | None = None


@dataclass(frozen=True)
class TextFeatures(_Movable):
    """What a text encoder returns, before any objective's projection.

    Shape:
        tokens (N, L, D), token_mask (N, L) bool: True for `[CLS]`, every piece and `[SEP]`
        token_words, token_sentences (N, L) int64: word and sentence number of every token, as in `TextBatch`
        words (N, W, D): word pieces summed or averaged by the encoder; zero where `word_mask` is False
        word_mask (N, W) bool: True for `[CLS]`, every word and `[SEP]`
        special_mask (N, W) bool: True for `[CLS]` and `[SEP]` only
        unknown_mask (N, W) bool: True for words that begin with the unknown token
        word_sentence (N, W) int64: sentence number, -1 for specials and padding
        sentence (N, D): one vector a text
        cls_attention (N, L) or None: attention of `[CLS]` to every token in the last layer, mean over heads, before
            dropout; made where an objective needs it (`Needs.token_attention`)
    """

    PADDING: ClassVar[dict[str, int]] = {"token_words": -1, "token_sentences": -1, "word_sentence": -1}

    tokens: Tensor
    token_mask: Tensor
    token_words: Tensor
    token_sentences: Tensor
    words: Tensor
    word_mask: Tensor
    special_mask: Tensor
    unknown_mask: Tensor
    word_sentence: Tensor
    sentence: Tensor
    cls_attention: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss of one batch: `total` (scalar), terms by name (scalars, unweighted), `attention` (N, W, h, w) or None."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None


@dataclass(frozen=True)
class Needs:
    """What an objective wants of a batch; the loader and the encoders are set up from it.

    `views`, `texts`: images and texts per study. `cls_attention`: attention of the class token to the patches, where
    the image encoder has one. `token_attention`: `TextFeatures.cls_attention`. `sentence`: `TextFeatures.sentence` is
    read; without it no pooler of BERT's is made. `pixels`: the images themselves, as a target.
    """

    views: int = 1
    texts: int = 1
    sentence_ids: bool = False
    cls_attention: bool = False
    token_attention: bool = False
    sentence: bool = True
    pixels: bool = False


@dataclass(frozen=True)
class AttentionRows:
    """What the rows of `Objective.attention` stand for and how each row is normalised over its regions."""

    unit: Literal["word", "sentence"]
    normalisation: Literal["softmax", "sigmoid"]
