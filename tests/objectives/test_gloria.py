"""GLoRIA's vectorised loss against loops over captions, images and words, written from the paper's equations."""

import math
from dataclasses import replace

import pytest
import torch

from gloria_core.models.word_region import aggregate, attend, gram_matrix, word_cosines, word_region_similarity
from gloria_core.objectives import build
from gloria_core.types import TextFeatures

WIDTHS = (10, 8, 6)


def make(**options):
    torch.manual_seed(1)
    return build("gloria", pooled_dim=WIDTHS[0], region_dim=WIDTHS[1], text_dim=WIDTHS[2], **options).double()


def used_words(texts: TextFeatures, n: int, behavior: str) -> list[int]:
    """Columns of text n that take part in training."""
    n_words = int(texts.word_mask[n].sum()) - 2
    if behavior == "corrected":
        return list(range(1, n_words + 1))
    unknown = int(texts.unknown_mask[n].sum())
    return list(range(1 + n_words - unknown))


def scaled(projected, behavior):
    """Projected regions as the scores take them: over sqrt(D) when corrected, as they are when published."""
    return projected / projected.shape[-1] ** 0.5 if behavior == "corrected" else projected


def naive_attention(regions, words, temperature):
    """a_rt of one image and one text: softmax over words, then over regions of `temperature` times that."""
    rows = []
    for region in regions:
        scores = torch.stack([region @ word for word in words])
        rows.append(torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum())
    over_words = torch.exp(temperature * torch.stack(rows))
    return over_words / over_words.sum(dim=0)


def naive_z(regions, words, *, aggregation, temp_attention=4.0, temp_similarity=5.0):
    """Z of one image and one text."""
    attention = naive_attention(regions, words, temp_attention)
    cosines = []
    for t, word in enumerate(words):
        context = sum(attention[r, t] * regions[r] for r in range(len(regions)))
        cosines.append(word @ context / (word.norm() * context.norm()).clamp(min=1e-8))
    powers = [torch.exp(temp_similarity * cosine) for cosine in cosines]
    return {
        "sum": lambda: torch.log(sum(powers)),
        "mean": lambda: torch.log(sum(powers) / len(powers)),
        "max": lambda: temp_similarity * max(cosines),
    }[aggregation]()


def naive_info_nce(logits):
    """Both directions, by the definition of the softmax."""
    rows = columns = 0.0
    for i in range(len(logits)):
        rows -= torch.log(torch.exp(logits[i, i]) / torch.exp(logits[i]).sum()) / len(logits)
        columns -= torch.log(torch.exp(logits[i, i]) / torch.exp(logits[:, i]).sum()) / len(logits)
    return rows, columns


def naive_loss(objective, images, texts, *, aggregation="sum"):
    projected = torch.einsum("bhwr,dr->bhwd", images.regions, objective.local_embedder.weight).flatten(1, 2)
    projected = scaled(projected, objective.behavior)
    whole = images.pooled @ objective.global_embedder.weight.T + objective.global_embedder.bias
    n = len(projected)
    local, cosine = torch.zeros(n, n, dtype=projected.dtype), torch.zeros(n, n, dtype=projected.dtype)
    for b in range(n):
        for i in range(n):
            words = [texts.words[i, t] for t in used_words(texts, i, objective.behavior)]
            local[b, i] = naive_z(projected[b], words, aggregation=aggregation)
            cosine[b, i] = whole[b] @ texts.sentence[i] / (whole[b].norm() * texts.sentence[i].norm())
    return sum(naive_info_nce(10 * local)) + sum(naive_info_nce(10 * cosine))


@pytest.mark.parametrize("behavior", ["published", "corrected"])
@pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
@pytest.mark.parametrize("words", [[3, 1, 7], [1], [90, 2]], ids=["mixed", "one-pair", "long"])
def test_loss_and_gradients_equal_loops(make_features, behavior, aggregation, words):
    images, texts = make_features(len(words), words, side=3)
    objective = make(behavior=behavior, aggregation=aggregation)
    if len(words) > 1 and words[-1] > 1:
        texts.unknown_mask[-1, 2] = True
    inputs = [texts.words.requires_grad_(), images.regions.requires_grad_(), *objective.parameters()]
    fast = objective(images, texts).total
    slow = naive_loss(objective, images, texts, aggregation=aggregation)
    torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("behavior", ["published", "corrected"])
def test_attention_equals_loops_and_is_zero_elsewhere(make_features, behavior):
    images, texts = make_features(3, [4, 1, 6], side=3)
    texts.unknown_mask[0, 2] = True
    objective = make(behavior=behavior)
    attention = objective.attention(images, texts)
    regions = scaled(objective.local_embedder(images.regions), behavior).flatten(1, 2)
    for n in range(3):
        used = used_words(texts, n, behavior)
        expected = naive_attention(regions[n], [texts.words[n, t] for t in used], 4.0)
        torch.testing.assert_close(attention[n, used].flatten(1), expected.T, rtol=1e-8, atol=1e-10)
        unused = [t for t in range(attention.shape[1]) if t not in used]
        assert attention[n, unused].abs().sum() == 0
    torch.testing.assert_close(attention, objective(images, texts).attention)


@pytest.mark.parametrize("behavior", ["published", "corrected"])
def test_loss_can_be_rebuilt_from_the_attention(make_features, behavior):
    """The maps handed out are the ones in the loss: contexts made from them give its diagonal."""
    images, texts = make_features(4, [4, 1, 6, 2])
    objective = make(behavior=behavior)
    regions, words, mask = objective.local_embeddings(images, texts)
    local = word_region_similarity(
        regions, words, mask, temp_attention=4.0, temp_similarity=5.0, aggregation="sum", chunk_size=3
    )
    contexts = torch.einsum("nwhx,nhxd->nwd", objective.attention(images, texts), regions)
    cosines = torch.nn.functional.cosine_similarity(words, contexts, dim=-1)
    rebuilt = torch.stack([torch.logsumexp(5.0 * cosines[n][mask[n]], dim=0) for n in range(4)])
    torch.testing.assert_close(local.diagonal(), rebuilt, rtol=1e-8, atol=1e-10)


def test_windows_of_both_behaviors(make_features):
    images, texts = make_features(2, [3, 5])
    texts.unknown_mask[1, 1] = texts.unknown_mask[1, 4] = True
    published = make(behavior="published").local_embeddings(images, texts)[2]
    corrected = make(behavior="corrected").local_embeddings(images, texts)[2]
    assert published.int().tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0]]  # [CLS] in; two words cut
    assert corrected.int().tolist() == [[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0]]


def test_attention_is_nearly_flat_by_construction():
    """A word that wins every word-softmax in one region only gets e^4 / (e^4 + R - 1) there, and no more."""
    scores = torch.full((1, 361, 1, 2), -100.0)
    scores[..., 1] = 0.0
    scores[0, 7, 0] = torch.tensor([100.0, -100.0])
    weights = attend(scores, torch.ones(1, 2, dtype=torch.bool), 4.0)
    assert weights[0, 7, 0, 0].item() == pytest.approx(math.exp(4) / (math.exp(4) + 360), rel=1e-5)


def test_zero_word_has_zero_cosine_and_finite_gradient():
    regions = torch.randn(2, 9, 4, requires_grad=True)
    words = torch.zeros(1, 3, 4)
    words[0, 1] = 1.0
    words.requires_grad_()
    cosines = word_cosines(regions, words, torch.ones(1, 3, dtype=torch.bool), 4.0, gram_matrix(regions))
    assert cosines[:, 0, [0, 2]].abs().max() == 0
    cosines.sum().backward()
    assert regions.grad.isfinite().all()
    assert words.grad.isfinite().all()


def test_image_of_zero_regions_is_finite():
    regions = torch.zeros(1, 4, 3, requires_grad=True)
    cosines = word_cosines(regions, torch.ones(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), 4.0, gram_matrix(regions))
    cosines.sum().backward()
    assert cosines.abs().max() == 0
    assert regions.grad.isfinite().all()


@pytest.mark.parametrize("dim", [4, 64], ids=["contexts", "gram"])
def test_both_ways_to_the_length_of_a_context(dim):
    """With fewer dimensions than regions the contexts are formed, else the Gram matrix is used: same cosines."""
    torch.manual_seed(0)
    regions, words = torch.randn(2, 9, dim).double(), torch.randn(3, 5, dim).double()
    mask = torch.ones(3, 5, dtype=torch.bool)
    found = word_cosines(regions, words, mask, 4.0, gram_matrix(regions))
    for b in range(2):
        for n in range(3):
            attention = naive_attention(regions[b], words[n], 4.0)
            contexts = attention.T @ regions[b]
            expected = torch.nn.functional.cosine_similarity(words[n], contexts, dim=-1)
            torch.testing.assert_close(found[b, n], expected, rtol=1e-8, atol=1e-10)


def test_aggregate_by_hand():
    values, mask = torch.log(torch.tensor([[[1.0, 3.0, 9.0]]])), torch.tensor([[True, True, False]])
    assert aggregate(values, mask, "sum").exp().item() == pytest.approx(4)
    assert aggregate(values, mask, "mean").exp().item() == pytest.approx(2)
    assert aggregate(values, mask, "max").exp().item() == pytest.approx(3)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunks_change_nothing(make_features, chunk_size):
    words = [3, 12, 1, 9, 4, 30, 2]
    images, texts = make_features(len(words), words)
    results = []
    for size in (0, chunk_size):
        objective = make(chunk_size=size)
        output = objective(images, texts)
        output.total.backward()
        results.append((output.total, [p.grad for p in objective.parameters()], objective.similarity(images, texts)))
    for plain, chunked in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, chunked, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][2], results[1][2])


def test_memory_budget_splits_images_and_texts(make_features, monkeypatch):
    images, texts = make_features(6, [3, 1, 5, 2, 4, 6])
    objective = make()
    whole, loss = objective.similarity(images, texts), objective(images, texts).total
    monkeypatch.setattr("gloria_core.models.word_region.MEMORY_BUDGET", 16 * 6 * 2)  # two images with one text
    with torch.no_grad():
        torch.testing.assert_close(objective.similarity(images, texts), whole)
    split = objective(images, texts).total
    torch.testing.assert_close(split, loss)
    split.backward()


def test_bfloat16_autocast_is_near(make_features):
    images, texts = make_features(4, [3, 8, 5, 2])
    images = replace(images, pooled=images.pooled.float(), regions=images.regions.float())
    texts = replace(texts, words=texts.words.float(), sentence=texts.sentence.float())
    objective = make().float()
    exact = objective(images, texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(images, texts)
    assert rough.total.dtype == torch.float32
    assert rough.total != exact.total
    torch.testing.assert_close(rough.total, exact.total, rtol=0.02, atol=0.02)
    torch.testing.assert_close(rough.attention, exact.attention, rtol=0.05, atol=0.01)


def test_similarity_corrected_is_on_the_cosine_scale(make_features):
    images, texts = make_features(3, [4, 2])
    objective = make()
    local, whole = objective.local_similarity(images, texts), objective.global_similarity(images, texts)
    regions = scaled(objective.local_embedder(images.regions), "corrected").flatten(1, 2)
    for b in range(3):
        for n in range(2):
            words = [texts.words[n, t] for t in used_words(texts, n, "corrected")]
            torch.testing.assert_close(local[b, n], naive_z(regions[b], words, aggregation="mean") / 5)
    torch.testing.assert_close(objective.similarity(images, texts), (local + whole) / 2)
    assert local.abs().max() <= 1
    weighted = make(local_weight=0.0)
    torch.testing.assert_close(weighted.similarity(images, texts), weighted.global_similarity(images, texts))


def test_similarity_corrected_does_not_grow_with_length(make_features):
    """Ten equal words are no more alike than the mean of them; the training score grows by log 10."""
    images, texts = make_features(2, [1, 10])
    texts.words[1, 1:11] = texts.words[0, 1]
    objective = make()
    local = objective.local_similarity(images, texts)
    summed = word_region_similarity(
        *objective.local_embeddings(images, texts), temp_attention=4.0, temp_similarity=5.0, aggregation="sum"
    )
    growth = summed - 5 * local
    torch.testing.assert_close(growth, torch.tensor([[0.0, math.log(10)]] * 2).double())


def test_similarity_published_takes_the_best_word_and_ignores_options(make_features):
    images, texts = make_features(3, [4, 2])
    objective = make(behavior="published", temp_attention=1.0, temp_similarity=2.0, aggregation="mean")
    regions = objective.local_embedder(images.regions).flatten(1, 2)
    local = objective.local_similarity(images, texts)
    for b in range(3):
        for n in range(2):
            words = [texts.words[n, t] for t in used_words(texts, n, "corrected")]
            torch.testing.assert_close(local[b, n], naive_z(regions[b], words, aggregation="max"))
    whole = objective.global_similarity(images, texts)
    torch.testing.assert_close(objective.similarity(images, texts), (local + whole) / 2)


def test_one_image_and_many_texts(make_features):
    images, texts = make_features(1, [3, 2, 5])
    objective = make()
    attention = objective.attention(images, texts)
    assert attention.shape == (3, 7, 4, 4)
    regions = scaled(objective.local_embedder(images.regions), "corrected").flatten(1, 2)
    expected = naive_attention(regions[0], list(texts.words[2, 1:6]), 4.0)
    torch.testing.assert_close(attention[2, 1:6].flatten(1), expected.T, rtol=1e-8, atol=1e-10)


def test_clear_errors(make_features):
    images, texts = make_features(2, [3, 2, 1])
    with pytest.raises(ValueError, match="pairs image b with text b"):
        make()(images, texts)
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        make().attention(images, texts)
    images, texts = make_features(2, [3, 0])
    with pytest.raises(ValueError, match=r"without words.*\[1\]"):
        make()(images, texts)
    for options in ({"aggregation": "median"}, {"behavior": "legacy"}, {"temp_loss": 0.0}, {"local_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options)).split("_")[0].replace("local", "weight")):
            make(**options)


def test_weights_of_the_terms(make_features):
    images, texts = make_features(3, [3, 2, 4])
    output = make(local_weight=0.25, global_weight=2.0)(images, texts)
    terms = output.terms
    expected = 0.25 * (terms["local_image_to_text"] + terms["local_text_to_image"])
    expected = expected + 2.0 * (terms["global_image_to_text"] + terms["global_text_to_image"])
    torch.testing.assert_close(output.total, expected)
