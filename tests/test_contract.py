"""The contract that every objective keeps. Objectives are found, never listed: a new paper is tested by being there."""

import textwrap
from dataclasses import fields, replace

import pytest
import torch

from gloria_core import objectives
from gloria_core.checkpoints import native
from gloria_core.checkpoints.model import ModelConfig, build_model
from gloria_core.data.tokenizer import train_wordpiece
from gloria_core.types import Batch, TextBatch

NAMES = objectives.available()
WORDS = [[1, 2], [1], [3, 1, 1, 2], [1, 1, 1]]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["small left effusion .", "no edema or consolidation", "the heart is large"], vocab_size=64)


@pytest.fixture(scope="module", params=NAMES)
def model(request, tokenizer):
    config = ModelConfig(
        objective=request.param,
        image_encoder="resnet_tiny",
        text_encoder="bert_tiny",
        image_size=64,
        crop=64,
        text_dropout=0.0,
        **{"last_layers": 2, **objectives.objective_class(request.param).encoders},
    )
    return build_model(config, tokenizer).eval()


@pytest.fixture(scope="module")
def batch(model, make_texts) -> Batch:
    needs, n = model.objective.needs, len(WORDS)
    generator = torch.Generator().manual_seed(0)
    text = make_texts([words for words in WORDS for _ in range(needs.texts)], vocabulary=len(model.tokenizer))
    sentence = torch.where(text.sentence_ids >= 0, (text.word_ids - 1) // 2, -1)  # a new sentence every two words
    return Batch(
        pixels=torch.randn(n, needs.views, 3, 64, 64, generator=generator),
        text=replace(text, sentence_ids=sentence),
        labels=torch.zeros(n, 0),
        index=torch.arange(n),
    )


def pad(texts: TextBatch, columns: int) -> TextBatch:
    """The same texts with more padding."""
    empty = {"word_ids": -1, "sentence_ids": -1}
    return replace(
        texts,
        **{
            field.name: torch.nn.functional.pad(value, (0, columns), value=empty.get(field.name, 0))
            for field in fields(texts)
            if isinstance(value := getattr(texts, field.name), torch.Tensor)
        },
    )


def rows(texts: TextBatch, order: list[int]) -> TextBatch:
    tensors = {
        f.name: getattr(texts, f.name) for f in fields(texts) if isinstance(getattr(texts, f.name), torch.Tensor)
    }
    return replace(texts, **{name: value[order] for name, value in tensors.items()})


def test_loss_is_finite_and_reaches_every_parameter(model, batch):
    model.zero_grad()
    output = model(batch)
    assert output.total.ndim == 0
    assert output.total.isfinite()
    assert output.terms
    assert all(term.isfinite() and term.ndim == 0 for term in output.terms.values())
    output.total.backward()
    lacking = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert not [name for name in lacking if name.startswith("objective.")]
    # a key's bias shifts all scores of a query alike, and softmax lets no gradient through
    assert not [name for name in lacking if not name.endswith("key.bias")]
    model.zero_grad()


def test_padding_does_not_matter(model, batch):
    with torch.no_grad():
        plain, padded = model(batch), model(replace(batch, text=pad(batch.text, 7)))
    torch.testing.assert_close(plain.total, padded.total, rtol=1e-5, atol=1e-5)


def test_order_of_the_batch_does_not_matter(model, batch):
    if model.objective.needs.texts != 1:
        pytest.skip("several texts a study: the order is tested with the objective")
    order = [2, 0, 3, 1]
    shuffled = replace(batch, pixels=batch.pixels[order], text=rows(batch.text, order), index=batch.index[order])
    with torch.no_grad():
        plain, other = model(batch), model(shuffled)
    torch.testing.assert_close(plain.total, other.total, rtol=1e-5, atol=1e-5)


def test_attention_is_what_the_loss_used(model, batch):
    images, texts = model.encode_images(batch.pixels), model.encode_texts(batch.text)
    if model.objective.rows is None:
        with pytest.raises(NotImplementedError):
            model.objective.attention(images, texts)
        return
    with torch.no_grad():
        attention = model.objective.attention(images, texts)
        output = model.objective(images, texts, batch)
    assert attention.shape == (len(texts.sentence), texts.words.shape[1], *images.regions.shape[1:3])
    if output.attention is not None:
        torch.testing.assert_close(attention, output.attention)
    used = attention.flatten(2).sum(dim=2)
    assert used.any()
    assert (used[~texts.word_mask] == 0).all()
    if model.objective.rows.normalisation == "softmax":
        torch.testing.assert_close(used[used > 0], torch.ones_like(used[used > 0]))


def test_similarity_of_unequal_numbers(model, batch):
    with torch.no_grad():
        images = model.encode_images(batch.pixels[:3])
        texts = model.encode_texts(rows(batch.text, [0, 1]))
        scores = model.objective.similarity(images, texts)
        single = model.objective.similarity(model.encode_images(batch.pixels[1:2]), texts)
    assert scores.shape == (len(images.pooled), 2)
    assert scores.isfinite().all()
    torch.testing.assert_close(single[0], scores[model.objective.needs.views], rtol=1e-4, atol=1e-5)


def test_global_embeddings(model, batch):
    with torch.no_grad():
        images, texts = model.encode_images(batch.pixels[:3]), model.encode_texts(rows(batch.text, [0, 1]))
        left, right = model.objective.global_embeddings(images, texts)
    assert left.shape == (len(images.pooled), right.shape[1])
    assert len(right) == 2


@pytest.mark.parametrize("behavior", ["published", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_both_behaviors_and_no_unknown_option(name, behavior):
    widths = {"pooled_dim": 8, "region_dim": 6, "text_dim": 4}
    assert objectives.build(name, **widths, behavior=behavior).behavior == behavior
    with pytest.raises(TypeError, match="temprature"):
        objectives.build(name, **widths, behavior=behavior, temprature=0.1)


def test_round_trip_through_a_file_gives_the_same_numbers(model, batch, tmp_path):
    again = native.load(native.save(tmp_path / "model.pt", model))
    assert again.config == model.config
    with torch.no_grad():
        before, after = model(batch), again(batch)
        images, texts = model.encode_images(batch.pixels), model.encode_texts(batch.text)
        assert torch.equal(model.objective.similarity(images, texts), again.objective.similarity(images, texts))
    assert torch.equal(before.total, after.total)
    assert list(before.terms) == list(after.terms)


TOY = """
    import torch
    from torch import nn
    from gloria_core.models.heads import contrastive_terms, cosine_matrix
    from gloria_core.objectives.base import Objective
    from gloria_core.types import ObjectiveOutput


    class Toy(Objective):
        def __init__(self, *, pooled_dim, region_dim, text_dim, behavior="corrected", scale=3.0):
            super().__init__()
            self.behavior, self.scale, self.head = behavior, scale, nn.Linear(pooled_dim, text_dim)

        def forward(self, images, texts, batch=None):
            total = sum(contrastive_terms(self.scale * self.similarity(images, texts)))
            return ObjectiveOutput(total=total, terms={"toy": total.detach()})

        def similarity(self, images, texts):
            return cosine_matrix(*self.global_embeddings(images, texts))

        def embed_images(self, images):
            return self.head(images.pooled)

        def embed_texts(self, texts):
            return texts.sentence
"""


def test_a_new_paper_is_one_new_file(tmp_path, monkeypatch, tokenizer, make_texts):
    (tmp_path / "toy_paper.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    assert objectives.available() == sorted([*NAMES, "toy_paper"])
    config = ModelConfig(
        objective="toy_paper",
        objective_options={"scale": 2.0},
        image_encoder="resnet_tiny",
        text_encoder="bert_tiny",
        last_layers=2,
    )
    model = build_model(config, tokenizer).eval()
    texts = make_texts(WORDS, vocabulary=len(tokenizer))
    batch = Batch(torch.randn(4, 1, 3, 64, 64), texts, torch.zeros(4, 0), torch.arange(4))
    model(batch).total.backward()
    again = native.load(native.save(tmp_path / "toy.pt", model))
    assert again.objective.scale == 2.0
    assert torch.equal(again(batch).total, model(batch).total)


def test_unknown_objective_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown objective 'clip'; available: .*gloria"):
        objectives.build("clip", pooled_dim=1, region_dim=1, text_dim=1)
