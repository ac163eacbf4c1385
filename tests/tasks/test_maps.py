"""Maps of words and phrases against loops over words and regions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gloria_core.data.geometry import Geometry
from gloria_core.tasks.features import image_batches, text_features
from gloria_core.tasks.maps import kinds_of, maps, phrase_maps, upsample, words_of_span
from gloria_core.tasks.phrases import Phrase

TEXTS = ["Small left effusion.", "Large right opacity, no effusion.", "opacity"]


@pytest.fixture
def pair(model, frame, cache):
    _, images = next(image_batches(model, frame.iloc[:3], cache))
    return model.objective.eval(), images, text_features(model, TEXTS)


@torch.no_grad()
def test_maps_equal_a_loop_over_words_and_regions(pair):
    objective, images, texts = pair
    regions, words, mask = objective.local_embeddings(images, texts.features)
    cosine, softmax = (maps(objective, images, texts.features, kind=k) for k in ("cosine", "word_softmax"))
    attention = maps(objective, images, texts.features)
    assert torch.equal(attention, objective.attention(images, texts.features))
    n, w = mask.shape
    assert cosine.shape == softmax.shape == attention.shape == (n, w, *regions.shape[1:3])
    for i in range(n):
        used = mask[i].nonzero().flatten().tolist()
        for y in range(regions.shape[1]):
            for x in range(regions.shape[2]):
                dots = torch.stack([words[i, t] @ regions[i, y, x] for t in used])
                lengths = torch.stack([words[i, t].norm() * regions[i, y, x].norm() for t in used])
                torch.testing.assert_close(cosine[i, used, y, x], dots / lengths, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(softmax[i, used, y, x], dots.softmax(0), atol=1e-5, rtol=1e-4)
        unused = (~mask[i]).nonzero().flatten()
        assert not cosine[i, unused].any() and not softmax[i, unused].any()


@torch.no_grad()
def test_attention_is_the_softmax_over_regions_of_the_word_softmax(pair):
    objective, images, texts = pair
    attention, softmax = (maps(objective, images, texts.features, kind=k) for k in ("attention", "word_softmax"))
    mask = objective.local_embeddings(images, texts.features)[2]
    expected = (objective.temp_attention * softmax).flatten(2).softmax(-1).view_as(softmax)
    torch.testing.assert_close(attention[mask], expected[mask], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_one_image_with_several_texts(pair):
    objective, images, texts = pair
    alone = type(images)(images.pooled[1:2], images.regions[1:2])
    for kind in ("attention", "word_softmax", "cosine"):
        paired = maps(objective, images, texts.features, kind=kind)
        repeated = maps(objective, alone, texts.features, kind=kind)
        torch.testing.assert_close(repeated[1], paired[1], atol=1e-6, rtol=1e-4)
        assert not torch.allclose(repeated[0], paired[0])


def test_map_errors(pair, make_model):
    objective, images, texts = pair
    with pytest.raises(ValueError, match="unknown kind 'saliency'"):
        maps(objective, images, texts.features, kind="saliency")
    two = type(images)(images.pooled[:2], images.regions[:2])
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        maps(objective, two, texts.features)
    with pytest.raises(NotImplementedError, match="ConVIRT"):
        maps(make_model("convirt").objective, images, texts.features, kind="cosine")


def test_words_of_span(model):
    spans = text_features(model, TEXTS).batch.spans[1]
    text = TEXTS[1]

    def words(part):
        start = text.index(part)
        return [text[slice(*spans[c])] for c in words_of_span(spans, start, start + len(part))]

    assert words("right opacity") == ["right", "opacity"]
    assert words("pac") == ["opacity"]
    assert words(text) == ["Large", "right", "opacity", ",", "no", "effusion", "."]
    assert words_of_span(spans, 400, 410) == [] == words_of_span(spans, 0, 0)


def test_a_phrase_map_is_the_mean_of_its_words_or_none(pair, model):
    _, images, texts = pair
    text = TEXTS[1]
    phrase = Phrase(0, "Lung Opacity", "impression", text, ((text.index("right"), text.index(",")),), "a.png")
    beyond = replace(phrase, spans=((400, 410),))
    with torch.no_grad():
        rows = maps(model.objective, images, texts.features, kind="cosine")[1]
    found, none = phrase_maps(model, images, [(1, phrase), (0, beyond)], ("cosine",))
    columns = [texts.batch.words[1].index(word) for word in ("right", "opacity")]
    torch.testing.assert_close(found["cosine"], rows[columns].double().mean(dim=0), atol=1e-5, rtol=1e-4)
    assert none == {"cosine": None}


def test_upsampled_cells_lie_where_the_geometry_puts_them():
    values = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = upsample(values, 32, 32)
    assert found.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(found[1, 2], Geometry.fit(32, 32, 32).map_to_original(values[1, 2]), atol=1e-6)
    one = torch.zeros(1, 4, 4)
    one[0, 1, 2] = 1.0
    rows, columns = np.nonzero(upsample(one, 32, 32)[0].numpy() == upsample(one, 32, 32).max().item())
    assert rows.mean() == 1 * 8 + 3.5 and columns.mean() == 2 * 8 + 3.5


def test_kinds_of_a_model(make_model):
    assert kinds_of(make_model()) == ("attention", "word_softmax", "cosine")
    assert kinds_of(make_model("convirt")) == ()  # its regions are of another stage than its projection
