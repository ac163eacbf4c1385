"""Token ids that know their word and their sentence; the door to everything about tokenizers.

The word rule is GLoRIA's (Huang et al., ICCV 2021, `text_model.py::aggregate_tokens`): a piece that begins with "##"
belongs to the word before it, `[CLS]` and `[SEP]` are words of their own, nothing counts after the first `[SEP]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gloria_core.data.reports import ReportError, Span, sentences
from gloria_core.data.wordpiece import (
    CLINICAL_BERT,
    TokenizerError,
    load_tokenizer,
    tokenizer_from_json,
    tokenizer_to_json,
    train_wordpiece,
)
from gloria_core.types import TextBatch

__all__ = [
    "CLINICAL_BERT",
    "TokenizerError",
    "continuation_table",
    "load_tokenizer",
    "text_batch_from_ids",
    "tokenize",
    "tokenizer_from_json",
    "tokenizer_to_json",
    "train_wordpiece",
    "vocabulary_list",
]


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_tokens: int = 97,
    sentence_spans: Sequence[Sequence[Span]] | None = None,
    allow_empty: bool = False,
    names: Sequence[str] | None = None,
) -> TextBatch:
    """Tokenises N texts, padded to the longest of them and cut to `max_tokens` pieces, `[SEP]` kept (GLoRIA: 97).

    `sentence_spans[i]` are the (start, end) sentences of text i; by default those of `reports.sentences`. A word
    belongs to the sentence in which it begins; a word outside every span has sentence -1. The words of the result are
    slices of the text. Special tokens that are spelt out in a text ("[SEP]") are read as ordinary characters.

    Raises: ReportError for a text without any token (named by `names[i]`, else by its number) unless `allow_empty`;
    ValueError for max_tokens < 3.
    """
    if max_tokens < 3:
        raise ValueError(f"max_tokens is {max_tokens}; it must hold [CLS], one piece and [SEP]")
    keep = max_tokens - 2
    rows, words, spans = [], [], []
    for number, (text, encoded) in enumerate(zip(texts, _encode(tokenizer, texts), strict=True)):
        ids = encoded.ids[:keep]
        if not ids and not allow_empty:
            name = names[number] if names is not None else f"text {number}"
            raise ReportError(f"{name} has no word: {text[:40]!r}. Exclude it or choose another section (text='both')")
        limits = sentences(text) if sentence_spans is None else sentence_spans[number]
        word_of, word_spans = _merge(encoded.word_ids[:keep], encoded.offsets[:keep])
        sentence_of = _sentence_of(word_spans, limits)
        rows.append(
            (
                [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id],
                [0, *(word + 1 for word in word_of), len(word_spans) + 1],
                [-1, *(sentence_of[word] for word in word_of), -1],
            )
        )
        words.append((tokenizer.cls_token, *(text[a:b] for a, b in word_spans), tokenizer.sep_token))
        spans.append(((0, 0), *word_spans, (0, 0)))
    ids, word_ids, sentence_ids = (
        _pad([row[part] for row in rows], fill) for part, fill in ((0, tokenizer.pad_token_id), (1, -1), (2, -1))
    )
    return TextBatch(
        input_ids=ids,
        attention_mask=(word_ids >= 0).long(),
        token_type_ids=torch.zeros_like(ids),
        word_ids=word_ids,
        sentence_ids=sentence_ids,
        unknown=(ids == tokenizer.unk_token_id) & (word_ids >= 0),
        words=tuple(words),
        spans=tuple(spans),
    )


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """Pieces without specials, with offsets and word numbers; the tokenizer is left as it was found."""
    backend = tokenizer.backend_tokenizer
    before = backend.truncation, backend.padding, backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        # one by one: the batch call starts a thread pool, which forked loader workers cannot use
        return [backend.encode(text, add_special_tokens=False) for text in texts]
    finally:
        truncation, padding, backend.encode_special_tokens = before
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _merge(word_ids: Sequence[int | None], offsets: Sequence[Span]) -> tuple[list[int], list[Span]]:
    """Numbers words without gaps from 0, and gives each word the range that its pieces cover."""
    numbers: list[int] = []
    spans: list[Span] = []
    previous: int | None = None
    for word, (start, end) in zip(word_ids, offsets, strict=True):
        if word is None or word != previous:
            spans.append((start, end))
        else:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        previous = word
        numbers.append(len(spans) - 1)
    return numbers, spans


def _sentence_of(words: Sequence[Span], limits: Sequence[Span]) -> list[int]:
    """Number of the sentence in which each word begins; both lists are in the order of the text."""
    found, current = [], 0
    for start, _ in words:
        while current < len(limits) and limits[current][1] <= start:
            current += 1
        found.append(current if current < len(limits) and limits[current][0] <= start else -1)
    return found


def _pad(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long).view(len(rows), width)


# ------------------------------------------------------------------------------------------------- ids only


def continuation_table(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(vocabulary,) bool: True for the pieces that continue a word ("##...")."""
    return torch.tensor([token.startswith("##") for token in vocabulary_list(tokenizer)], dtype=torch.bool)


def vocabulary_list(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Token strings by id; ids that the vocabulary leaves out are empty strings."""
    vocabulary = tokenizer.get_vocab()
    tokens = [""] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        tokens[index] = token
    return tokens


def text_batch_from_ids(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor,
    *,
    continuation: Tensor,
    sep_id: int,
    unk_id: int,
    vocabulary: Sequence[str] | None = None,
) -> TextBatch:
    """Word ids by GLoRIA's published scan (`text_model.py::aggregate_tokens`), for token ids without their text.

    A piece that does not continue opens a word; so a continuation right after `[CLS]` joins the `[CLS]` word, as in
    the released loop. The first `[SEP]` is a word of its own and ends the text; later tokens have word -1. All words
    are sentence 0. `words` is filled when the `vocabulary` is given; `spans` stays empty.

    Shape: input_ids, attention_mask, token_type_ids (N, L); continuation (vocabulary,) bool.
    Raises: ValueError for a row without `[SEP]` (the released loop loses its last word and counts padding).
    """
    n, length = input_ids.shape
    is_sep = input_ids == sep_id
    lacking = (~is_sep.any(dim=1)).nonzero().flatten().tolist()
    if lacking:
        raise ValueError(f"rows {lacking} have no [SEP] (id {sep_id}); truncate texts so that [SEP] is kept")
    position = torch.arange(length, device=input_ids.device).expand(n, length)
    end = is_sep.long().argmax(dim=1, keepdim=True)
    valid = position <= end
    opens = valid & (~continuation.to(input_ids.device)[input_ids] | (position == 0))
    word_ids = (opens.long().cumsum(dim=1) - 1).masked_fill(~valid, -1)
    inner = valid & (word_ids > 0) & (position != end)
    words: tuple[tuple[str, ...], ...] = ()
    if vocabulary is not None:
        words = tuple(_joined(i, w, vocabulary) for i, w in zip(input_ids.tolist(), word_ids.tolist(), strict=True))
    return TextBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        word_ids=word_ids,
        sentence_ids=torch.where(inner, 0, -1),
        unknown=(input_ids == unk_id) & valid,
        words=words,
    )


def _joined(ids: Sequence[int], word_ids: Sequence[int], vocabulary: Sequence[str]) -> tuple[str, ...]:
    pieces = [""] * (max(word_ids) + 1)
    for token, word in zip(ids, word_ids, strict=True):
        if word >= 0:
            pieces[word] += vocabulary[token].removeprefix("##")
    return tuple(pieces)
