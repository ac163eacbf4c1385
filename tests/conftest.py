"""What the tests of models, objectives and checkpoints share: hand-made texts, features and a tiny model."""

import os
from collections.abc import Callable

import pytest
import torch

from gloria_core.types import ImageFeatures, TextBatch, TextFeatures

CLS, SEP, UNK, FIRST = 2, 3, 1, 5  # special ids of the hand-made texts; ids below FIRST are special


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Tests are many small computations; threads would only wait for each other."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def make_texts() -> Callable[..., TextBatch]:
    """Factory of `TextBatch`: `words` pieces for every word, such as [[1, 2, 1], [1]] for texts of 3 and 1 words."""

    def make(words: list[list[int]], *, vocabulary: int = 64, unknown: tuple = (), padding: int = 0, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        rows, numbers = [], []
        for pieces in words:
            ids = torch.randint(FIRST, vocabulary, (sum(pieces),), generator=generator).tolist()
            word_of = [word + 1 for word, count in enumerate(pieces) for _ in range(count)]
            rows.append([CLS, *ids, SEP])
            numbers.append([0, *word_of, len(pieces) + 1])
        width = max(map(len, rows)) + padding
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        word_ids = torch.tensor([row + [-1] * (width - len(row)) for row in numbers])
        for text, word in unknown:
            input_ids[text, (word_ids[text] == word).nonzero()[0]] = UNK
        inner = (word_ids > 0) & (input_ids != SEP)
        return TextBatch(
            input_ids=input_ids,
            attention_mask=(word_ids >= 0).long(),
            token_type_ids=torch.zeros_like(input_ids),
            word_ids=word_ids,
            sentence_ids=torch.where(inner, 0, -1),
            unknown=input_ids == UNK,
        )

    return make


@pytest.fixture(scope="session")
def make_features() -> Callable[..., tuple[ImageFeatures, TextFeatures]]:
    """Factory of random encoder outputs: B images, and texts of the given numbers of words."""

    def make(
        images: int, words: list[int], *, side: int = 4, widths: tuple = (10, 8, 6), extra: int = 0, seed: int = 0
    ):
        pooled_dim, region_dim, text_dim = widths
        generator = torch.Generator().manual_seed(seed)
        n, width = len(words), max(words) + 2 + extra
        column, counts = torch.arange(width), torch.tensor(words)[:, None]
        word_mask = column < counts + 2
        vectors = torch.stack([torch.randn(max(words) + 2, text_dim, generator=generator).double() for _ in words])
        vectors = torch.nn.functional.pad(vectors, (0, 0, 0, extra)) * word_mask[..., None]
        special = word_mask & ((column == 0) | (column == counts + 1))
        return (
            ImageFeatures(
                pooled=torch.randn(images, pooled_dim, generator=generator).double(),
                regions=torch.randn(images, side, side, region_dim, generator=generator).double(),
            ),
            TextFeatures(
                tokens=vectors,
                token_mask=word_mask,
                token_words=torch.where(word_mask, column, -1),
                token_sentences=torch.where(word_mask & ~special, 0, -1),
                words=vectors,
                word_mask=word_mask,
                special_mask=special,
                unknown_mask=torch.zeros(n, width, dtype=torch.bool),
                word_sentence=torch.where(word_mask & ~special, 0, -1),
                sentence=torch.randn(n, text_dim, generator=generator).double(),
            ),
        )

    return make
