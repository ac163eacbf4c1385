"""ConVIRT's loss against its equations, term by term."""

import pytest
import torch

from gloria_core import objectives

WIDTHS = {"pooled_dim": 10, "region_dim": 8, "text_dim": 6}


def build(**options):
    return objectives.build("convirt", **WIDTHS, **options).double()


def test_loss_equals_the_equations(make_features):
    images, texts = make_features(4, [3, 1, 5, 2])
    torch.manual_seed(0)
    objective = build(temperature=0.2, image_weight=0.6, projection_dim=7)
    v = objective.image_head[2](torch.relu(objective.image_head[0](images.pooled)))
    total = torch.zeros(()).double()
    pooled = torch.stack([texts.tokens[n][texts.token_mask[n]].max(dim=0).values for n in range(4)])
    u = objective.text_head[2](torch.relu(objective.text_head[0](pooled)))
    for i in range(4):
        to_text = torch.stack([torch.cosine_similarity(v[i], u[k], dim=0) / 0.2 for k in range(4)])
        to_image = torch.stack([torch.cosine_similarity(v[k], u[i], dim=0) / 0.2 for k in range(4)])
        total = total - 0.6 * to_text.log_softmax(dim=0)[i] / 4 - 0.4 * to_image.log_softmax(dim=0)[i] / 4
    torch.testing.assert_close(objective(images, texts).total, total)


def test_defaults_are_the_papers():
    objective = build()
    assert (objective.temperature, objective.image_weight) == (0.1, 0.75)
    assert objective.image_head[2].out_features == 512


def test_padding_never_wins_the_maximum(make_features):
    images, texts = make_features(2, [3, 1])
    texts.tokens[texts.token_mask] -= 100  # every real value lies far below the zeros of the padding
    objective = build()
    objective.text_head = torch.nn.Identity()
    assert objective.global_embeddings(images, texts)[1].max() < -90


def test_perfect_and_uninformative_pairs(make_features):
    images, texts = make_features(3, [2, 2, 2])
    objective = build()
    objective.global_embeddings = lambda images, texts: (torch.eye(3), torch.eye(3))
    assert objective(images, texts).total < 1e-3
    objective.global_embeddings = lambda images, texts: (torch.ones(3, 2), torch.ones(3, 2))
    assert objective(images, texts).total.item() == pytest.approx(torch.tensor(3.0).log().item())


def test_clear_errors(make_features):
    images, texts = make_features(2, [3, 2, 1])
    with pytest.raises(ValueError, match="pairs image b with text b"):
        build()(images, texts)
    with pytest.raises(NotImplementedError, match="no word-region attention"):
        build().attention(images, texts)
    for options in ({"temperature": 0.0}, {"image_weight": 1.5}, {"behavior": "legacy"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(**options)


def test_local_vectors_are_the_heads_of_the_whole(make_features):
    images, texts = make_features(2, [3, 1], widths=(8, 8, 6), extra=1)
    objective = objectives.build("convirt", pooled_dim=8, region_dim=8, text_dim=6, projection_dim=5).double()
    regions, words, mask = objective.local_embeddings(images, texts)
    assert (regions.shape, words.shape) == ((2, 4, 4, 5), (2, 6, 5))
    assert mask.sum(dim=1).tolist() == [3, 1]
    assert not mask[:, 0].any()
    torch.testing.assert_close(regions[1, 2, 3], objective.image_head(images.regions[1, 2, 3]))
    torch.testing.assert_close(words[0, 2], objective.text_head(texts.words[0, 2]))
    with pytest.raises(NotImplementedError, match='region_stage="layer4"'):
        build().local_embeddings(*make_features(2, [3, 1]))
