"""CXR-CLIP's loss against a loop written from its equations, and against numbers of the released code."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from gloria_core import objectives
from gloria_core.types import Batch, TextBatch

WIDTHS = {"pooled_dim": 10, "region_dim": 8, "text_dim": 6}
WORDS = [3, 1, 5, 2]


def build(**options):
    torch.manual_seed(0)
    return objectives.build("cxr_clip", **(WIDTHS | options)).double()


def batch_of(studies, views, texts):
    """A batch of which only the numbers of views and texts matter."""
    ids = torch.zeros(studies * texts, 2, dtype=torch.int64)
    return Batch(
        pixels=torch.zeros(studies, views, 1, 1, 1),
        text=TextBatch(ids, ids, ids, ids, ids, ids.bool()),
        labels=torch.zeros(studies, 0),
        index=torch.arange(studies),
    )


def features_of(make_features, views, texts, *, extra=0):
    return make_features(len(WORDS) * views, [n + t for n in WORDS for t in range(texts)], extra=extra)


def reference(image, text, scale, *, icl, tcl, smoothing):
    """Loops over studies, views and texts. image (B, V, D), text (B, T, D), not normalised."""

    def cross_entropy(rows, columns, epsilon):
        total = 0.0
        for i, row in enumerate(rows):
            logits = torch.stack([scale * torch.dot(row, c) / row.norm() / c.norm() for c in columns])
            p = logits.softmax(0).log()
            total = total - (1 - epsilon) * p[i] - epsilon * p.mean()
        return total / len(rows)

    def mean(values):
        return sum(values) / len(values)

    views, texts = range(image.shape[1]), range(text.shape[1])
    i2t = mean([cross_entropy(image[:, a], text[:, c], smoothing) for a in views for c in texts])
    t2i = mean([cross_entropy(text[:, c], image[:, a], smoothing) for a in views for c in texts])
    terms = {"image_to_text": i2t, "text_to_image": t2i}
    total = (i2t + t2i) / 2
    if len(views) > 1:
        terms["icl"] = mean([cross_entropy(image[:, a], image[:, b], 0) for a in views for b in views if a != b])
        total = total + icl * terms["icl"]
    if len(texts) > 1:
        terms["tcl"] = mean([cross_entropy(text[:, a], text[:, b], 0) for a in texts for b in texts if a != b])
        total = total + tcl * terms["tcl"]
    return total, terms


@pytest.mark.parametrize("behavior", ["published", "corrected"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("views", "texts"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2)])
def test_loss_equals_the_equations(make_features, views, texts, smoothing, behavior):
    images, words = features_of(make_features, views, texts)
    objective = build(behavior=behavior, icl_weight=0.7, tcl_weight=0.4, label_smoothing=smoothing).train()
    image, text = objective.global_embeddings(images, words)
    expected, terms = reference(
        image.unflatten(0, (-1, views)),
        text.unflatten(0, (-1, texts)),
        objective.logit_scale.exp(),
        icl=0.7,
        tcl=0.4,
        smoothing=smoothing,
    )
    output = objective(images, words, batch_of(len(WORDS), views, texts))
    torch.testing.assert_close(output.total, expected)
    assert list(output.terms) == list(terms)
    for name, value in terms.items():
        torch.testing.assert_close(output.terms[name], value)
    if (views, texts) == (1, 1):
        torch.testing.assert_close(objective(images, words).total, expected)


def rows(function):
    """Unit rows of function(row, column) for 4 studies and 8 dimensions, both counted from 1."""
    i, d = torch.arange(1, 5).double()[:, None], torch.arange(1, 9).double()
    vectors = function(i, d)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_numbers_of_the_released_code(make_features):
    """What `loss/cxr_clip.py` gives in float64 for these vectors, with the scale 1 / 0.07."""
    image = [rows(lambda i, d: (0.1 * i * d).sin()), rows(lambda i, d: (0.1 * i * d).cos())]
    text = [rows(lambda i, d: (0.2 * i * d + 0.3).sin()), rows(lambda i, d: (0.15 * i * d + 0.7).cos())]
    images, words = features_of(make_features, 2, 2)
    objective = build(behavior="published", pooled_dim=8)
    objective.logit_scale.data.fill_(math.log(1 / 0.07))
    objective.image_head, objective.text_head = nn.Identity(), nn.Identity()
    images = replace(images, pooled=torch.stack(image, dim=1).flatten(0, 1))
    objective._pooled_text = lambda texts: torch.stack(text, dim=1).flatten(0, 1)
    batch = batch_of(4, 2, 2)
    output = objective.eval()(images, words, batch)
    expected = {
        "image_to_text": 8.319300959922263,
        "text_to_image": 4.097441713553897,
        "icl": 5.074066674655830,
        "tcl": 5.970413601578043,
    }
    assert {name: term.item() for name, term in output.terms.items()} == pytest.approx(expected, abs=1e-10)
    assert output.total.item() == pytest.approx(14.267644812182933, abs=1e-10)
    objective.icl_weight = objective.tcl_weight = 0.0
    assert objective(images, words, batch).total.item() == pytest.approx(6.208371336738080, abs=1e-10)
    objective.icl_weight, objective.tcl_weight, objective.label_smoothing = 1.0, 0.5, 0.1
    assert objective(images, words, batch).total.item() == pytest.approx(14.267644812182933, abs=1e-10)
    assert objective.train()(images, words, batch).total.item() == pytest.approx(14.333444516601137, abs=1e-10)


def test_defaults_are_the_papers():
    objective = objectives.build("cxr_clip", **WIDTHS)
    assert (objective.icl_weight, objective.tcl_weight, objective.label_smoothing) == (1.0, 0.5, 0.0)
    assert objective.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert objective.image_head.out_features == objective.text_head.out_features == 512
    assert (objective.needs.views, objective.needs.texts) == (2, 2)
    assert objective.text_pooling == "eos"


def permuted(features, order, per_study):
    index = torch.tensor([study * per_study + k for study in order for k in range(per_study)])
    values = {field.name: getattr(features, field.name) for field in fields(features)}
    return replace(features, **{name: value[index] for name, value in values.items() if value is not None})


@pytest.mark.parametrize("views", [1, 2])
def test_order_of_the_studies_does_not_matter(make_features, views):
    images, texts = features_of(make_features, views, 2)
    objective, batch, order = build(), batch_of(4, views, 2), [2, 0, 3, 1]
    plain = objective(images, texts, batch)
    other = objective(permuted(images, order, views), permuted(texts, order, 2), batch)
    torch.testing.assert_close(plain.total, other.total)
    if views == 2:  # breaking a pair of views is something else
        broken = objective(permuted(images, [1, 0, 2, 3, 4, 5, 7, 6], 1), texts, batch)
        torch.testing.assert_close(broken.terms["image_to_text"], plain.terms["image_to_text"])
        assert not torch.isclose(broken.terms["icl"], plain.terms["icl"])


def test_padding_does_not_matter(make_features):
    objective, batch = build(), batch_of(4, 2, 2)
    for pooling in ("eos", "cls", "mean"):
        objective.text_pooling = pooling
        plain = objective(*features_of(make_features, 2, 2), batch)
        padded = objective(*features_of(make_features, 2, 2, extra=5), batch)
        torch.testing.assert_close(plain.total, padded.total)


@pytest.mark.parametrize(("views", "texts"), [(1, 1), (2, 2)])
def test_gradient_reaches_every_parameter(make_features, views, texts):
    objective = build()
    objective(*features_of(make_features, views, texts), batch_of(4, views, texts)).total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_text_pooling(make_features):
    _, texts = make_features(1, [3, 1])
    lengths = [5, 3]  # with [CLS] and [SEP]
    expected = {
        "eos": torch.stack([texts.tokens[n, lengths[n] - 1] for n in range(2)]),
        "cls": torch.stack([texts.tokens[n, 0] for n in range(2)]),
        "mean": torch.stack([texts.tokens[n, : lengths[n]].mean(dim=0) for n in range(2)]),
    }
    for name, vectors in expected.items():
        torch.testing.assert_close(build(text_pooling=name)._pooled_text(texts), vectors)


def test_the_scale_is_limited_where_corrected(make_features):
    images, texts = make_features(4, WORDS)
    for behavior, limit in (("published", 1000.0), ("corrected", 100.0)):
        objective = build(behavior=behavior, temperature=0.001)
        cosines = objective.similarity(images, texts)
        for mode in (objective.eval, objective.train):
            mode()
            expected = -(limit * cosines).log_softmax(dim=1).diagonal().mean()
            torch.testing.assert_close(objective(images, texts).terms["image_to_text"], expected, rtol=1e-5, atol=1e-6)
    assert objective.logit_scale.item() == pytest.approx(math.log(100))  # put back, so that it can come down again
    objective(images, texts).total.backward()
    assert objective.logit_scale.grad.abs() > 0


def test_local_vectors_are_the_global_projections(make_features):
    images, texts = make_features(2, [3, 1], widths=(8, 8, 6), extra=1)
    objective = build(pooled_dim=8)
    regions, words, mask = objective.local_embeddings(images, texts)
    assert regions.shape == (2, 4, 4, 512)
    assert words.shape == (2, 6, 512)
    assert mask.sum(dim=1).tolist() == [3, 1]
    assert not mask[:, 0].any()
    torch.testing.assert_close(regions[1, 2, 3], objective.image_head(images.regions[1, 2, 3]))
    torch.testing.assert_close(words[0, 2], objective.text_head(texts.words[0, 2]))
    # a linear map of a mean is the mean of the maps, so the regions average to the image
    whole = objective.global_embeddings(replace(images, pooled=images.regions.mean(dim=(1, 2))), texts)[0]
    torch.testing.assert_close(regions.mean(dim=(1, 2)), whole)
    with pytest.raises(NotImplementedError, match='region_stage="layer4"'):
        build().local_embeddings(*make_features(2, [3, 1]))


def test_clear_errors(make_features):
    images, texts = features_of(make_features, 2, 2)
    with pytest.raises(ValueError, match="8 images with 2 a study and 8 texts with 1 a study"):
        build()(images, texts, replace(batch_of(4, 2, 2), text=batch_of(4, 2, 1).text))
    with pytest.raises(NotImplementedError, match="no word-region attention"):
        build().attention(images, texts)
    assert objectives.objective_class("cxr_clip").rows is None
    for options in (
        {"temperature": 0.0},
        {"icl_weight": -1.0},
        {"tcl_weight": -0.5},
        {"label_smoothing": 1.0},
        {"text_pooling": "bos"},
        {"behavior": "legacy"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)
