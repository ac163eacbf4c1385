"""From word pieces to words: how many there are, what they add up to, and which of them count."""

from __future__ import annotations

import torch
from torch import Tensor

from gloria_core.types import TextBatch


def words_from_pieces(tokens: Tensor, word_ids: Tensor, n_words: int) -> tuple[Tensor, Tensor]:
    """Add the pieces of every word: one `scatter_add`, bit-identical to a loop over tokens.

    Shape: tokens (N, L, D), word_ids (N, L) with -1 for padding -> words (N, W, D), number of pieces (N, W)
    """
    n, _, dim = tokens.shape
    kept = word_ids >= 0
    index = word_ids.clamp(min=0)
    words = tokens.new_zeros(n, n_words, dim)
    words = words.scatter_add(1, index[..., None].expand(-1, -1, dim), tokens * kept[..., None])
    counts = torch.zeros(n, n_words, dtype=torch.int64, device=tokens.device).scatter_add(1, index, kept.long())
    return words, counts


def extent(texts: TextBatch) -> tuple[int, int]:
    """Longest number of tokens and of words in the batch, in one transfer from the device."""
    length = texts.input_ids.shape[1]
    position = torch.arange(1, length + 1, device=texts.input_ids.device)
    n_tokens = ((texts.attention_mask > 0) * position).max()
    n_tokens, last_word = torch.stack([n_tokens, texts.word_ids.max()]).tolist()
    if last_word < 0:
        raise ValueError("a batch of texts without a single token")
    return n_tokens, last_word + 1


def word_masks(texts: TextBatch, word_ids: Tensor, unknown: Tensor, n_tokens: int, n_words: int) -> dict[str, Tensor]:
    """Masks (N, W) of words, specials and unknown words, and the sentence of every word."""
    kept, index = word_ids >= 0, word_ids.clamp(min=0)
    last = word_ids.max(dim=1, keepdim=True).values
    column = torch.arange(n_words, device=word_ids.device)[None]
    first = torch.ones_like(word_ids, dtype=torch.bool)
    first[:, 1:] = word_ids[:, 1:] != word_ids[:, :-1]
    begins = (first & kept).long()

    def at_word(value: Tensor) -> Tensor:
        """The value of a word's first piece."""
        return torch.zeros(len(index), n_words, dtype=torch.int64, device=index.device).scatter_add(1, index, value)

    word_mask = column <= last
    sentence = at_word(begins * (texts.sentence_ids[:, :n_tokens] + 1)) - 1
    return {
        "word_mask": word_mask,
        "special_mask": word_mask & ((column == 0) | (column == last)),
        "unknown_mask": at_word(begins * unknown).bool(),
        "word_sentence": sentence,
    }
