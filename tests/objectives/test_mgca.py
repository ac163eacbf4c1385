"""MGCA's vectorised losses against loops over texts, tokens and patches, written from the equations."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from gloria_core.objectives import build
from gloria_core.objectives.mgca import clipped_weights, sinkhorn
from gloria_core.types import ImageFeatures, TextFeatures

WIDTHS = {"pooled_dim": 10, "region_dim": 8, "text_dim": 6}
SMALL = {"dim": 5, "hidden": 7, "n_prototypes": 4}
MIXED = [[1, 2, 1], [1], [2, 1, 1, 3, 1]]  # pieces of every word
FULL = [[2] * 55, [1, 1], [1, 3]]  # the first fills 112 tokens: [CLS] 110 pieces [SEP]
BEHAVIORS = pytest.mark.parametrize("behavior", ["published", "corrected"])


def make(**options):
    torch.manual_seed(1)
    objective = build("mgca", **WIDTHS, **{**SMALL, **options}).double()
    for module in objective.modules():  # statistics that are not the identity
        if isinstance(module, torch.nn.BatchNorm1d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return objective.eval()


def features(words, *, side=3, patch_attention=True, tokens=0, columns=0, seed=0):
    """Random features of as many images as texts; `tokens`, `columns`: padding beyond the longest text."""
    generator, n = torch.Generator().manual_seed(seed), len(words)
    numbers = [[0, *[w + 1 for w, count in enumerate(p) for _ in range(count)], len(p) + 1] for p in words]
    length, width = max(map(len, numbers)), max(map(len, words)) + 2
    token_words = torch.tensor([row + [-1] * (length - len(row)) for row in numbers])
    vectors = torch.randn(n, length, 6, generator=generator).double() * (token_words >= 0)[..., None]
    attention = torch.rand(n, length, generator=generator).double() ** 2 * (token_words >= 0)
    attention = attention / attention.sum(dim=1, keepdim=True)
    index = token_words.clamp(min=0)[..., None].expand(-1, -1, 6)
    summed = torch.zeros(n, width, 6).double().scatter_add(1, index, vectors)
    counts, column = torch.tensor([len(p) for p in words])[:, None], torch.arange(width + columns)
    mask = column < counts + 2
    special = mask & ((column == 0) | (column == counts + 1))
    pad = torch.nn.functional.pad
    token_words = pad(token_words, (0, tokens), value=-1)
    images = ImageFeatures(
        pooled=torch.randn(n, 10, generator=generator).double(),
        regions=torch.randn(n, side, side, 8, generator=generator).double(),
        cls_attention=torch.rand(n, side, side, generator=generator).double() if patch_attention else None,
    )
    texts = TextFeatures(
        tokens=pad(vectors, (0, 0, 0, tokens)),
        token_mask=token_words >= 0,
        token_words=token_words,
        token_sentences=token_words.clamp(max=0),
        words=pad(summed, (0, 0, 0, columns)),
        word_mask=mask,
        special_mask=special,
        unknown_mask=torch.zeros_like(mask),
        word_sentence=torch.where(mask & ~special, 0, -1),
        sentence=torch.randn(n, 6, generator=generator).double(),
        cls_attention=pad(attention, (0, tokens)),
    )
    return images, texts


def naive_head(head, rows, training):
    """Linear - BatchNorm - ReLU - Linear - BatchNorm, and length 1, on rows (M, d)."""
    for linear, norm in ((head[0], head[1]), (head[3], head[4])):
        rows = rows @ linear.weight.T + linear.bias
        mean = rows.mean(dim=0) if training else norm.running_mean
        variance = ((rows - mean) ** 2).mean(dim=0) if training else norm.running_var
        rows = (rows - mean) / (variance + 1e-5).sqrt()
        if norm.affine:
            rows = (rows * norm.weight + norm.bias).relu()
    return torch.stack([row / row.norm() for row in rows])


def naive_words(texts, n, behavior):
    """The words of text n after [CLS] as (column, weight), in order, by the scan over its tokens."""
    numbers = [*texts.token_words[n].tolist(), *[-1] * 112]
    attention = [*texts.cls_attention[n].tolist(), *[0.0] * 112]
    sep = max(numbers)
    if behavior == "corrected":
        return [(w, sum(attention[t] for t, of in enumerate(numbers) if of == w)) for w in range(1, sep)]
    found, pending = [], [0, 0.0]
    for t in range(111):
        if numbers[t] == sep:
            found += [pending, [sep, attention[t + 1]]]
            break
        if numbers[t] != pending[0]:
            found.append(pending)
            pending = [numbers[t], 0.0]
        pending[1] += attention[t + 1]
    return [tuple(word) for word in found if word[0] > 0]


def naive_clipped(values):
    """Clipped to the quantiles of what is not zero, and divided by the sum."""
    positive = [value for value in values if value > 0]
    low, high = np.quantile(positive, 0.1), np.quantile(positive, 0.9)
    clipped = [min(max(value, low), high) if value > 0 else 0.0 for value in values]
    return [value / sum(clipped) for value in clipped]


def naive_attend(query, keys, layer):
    """Context and weights of one query (D,) over keys (M, D)."""
    if layer is None:
        weights = torch.exp(keys @ query / 0.1)
        weights = weights / weights.sum()
        return weights @ keys, weights
    (wq, wk, wv), (bq, bk, bv) = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    scores = (keys @ wk.T + bk) @ (wq @ query + bq) / len(query) ** 0.5
    weights = scores.exp() / scores.exp().sum()
    return layer.out_proj.weight @ (weights @ (keys @ wv.T + bv)) + layer.out_proj.bias, weights


def naive_aligned(queries, contexts, weights):
    """sum_i w_i (CE(M)_i + CE(M')_i) / 2 of one pair: queries (Q, D) and as many contexts."""
    total = 0.0
    for i, weight in enumerate(weights):
        row, column = contexts @ queries[i] / 0.1, queries @ contexts[i] / 0.1
        total = total + weight * (row.exp().sum().log() + column.exp().sum().log() - 2 * row[i]) / 2
    return total


def naive_contexts(queries, keys, layer, *, normalised):
    contexts = [naive_attend(query, keys, layer)[0] for query in queries]
    return torch.stack([context / context.norm() if normalised else context for context in contexts])


def naive_sinkhorn(scores):
    q = np.exp(scores.detach().numpy() / 0.05)
    q = q / q.sum()
    n, k = q.shape
    for _ in range(3):
        for j in range(k):
            q[:, j] *= (1 / k) / q[:, j].sum()
        for i in range(n):
            q[i] *= (1 / n) / q[i].sum()
    return torch.from_numpy(np.stack([row / row.sum() for row in q]))


def naive_terms(objective, images, texts, prototypes):
    """Every term of the loss; `prototypes` are unit rows."""
    training, n, behavior = objective.training, len(images.pooled), objective.behavior
    v = naive_head(objective.image_head, images.pooled, training)
    r = naive_head(objective.text_head, texts.words[:, 0], training)
    patches = naive_head(objective.region_head, images.regions.flatten(0, 2), training).unflatten(0, (n, -1))
    used = [naive_words(texts, i, behavior) for i in range(n)]
    rows = [[texts.words[i, column] for column, _ in used[i]] for i in range(n)]
    if behavior == "published":
        rows = [row + [torch.zeros(6).double()] * (111 - len(row)) for row in rows]
    projected = naive_head(objective.word_head, torch.stack([vector for row in rows for vector in row]), training)
    words = projected.split([len(row) for row in rows])
    logits = torch.stack([torch.stack([v[i] @ r[j] / 0.07 for j in range(n)]) for i in range(n)])
    terms = {
        "ita_image_to_text": sum(logits[i].exp().sum().log() - logits[i, i] for i in range(n)) / n,
        "ita_text_to_image": sum(logits[:, i].exp().sum().log() - logits[i, i] for i in range(n)) / n,
        "cta_word": 0.0,
        "cta_patch": 0.0,
    }
    normalised = behavior == "corrected" or images.cls_attention is None
    for i in range(n):
        weights = naive_clipped([weight for _, weight in used[i]]) + [0.0] * (len(words[i]) - len(used[i]))
        contexts = naive_contexts(words[i], patches[i], objective.word_attention, normalised=True)
        terms["cta_word"] += naive_aligned(words[i], contexts, weights) / n
        keys = words[i][: len(used[i])]
        contexts = naive_contexts(patches[i], keys, objective.patch_attention, normalised=normalised)
        uniform = [1 / len(contexts)] * len(contexts)
        weights = uniform if images.cls_attention is None else naive_clipped(images.cls_attention[i].flatten().tolist())
        terms["cta_patch"] += naive_aligned(patches[i], contexts, weights) / n
    z_v, z_r = v @ prototypes.T, r @ prototypes.T
    q_v, q_r = naive_sinkhorn(z_v), naive_sinkhorn(z_r)
    p_v, p_r = ((z / 0.2).exp() / (z / 0.2).exp().sum(dim=1, keepdim=True) for z in (z_v, z_r))
    terms["cpa"] = -sum((q_v[i] @ p_r[i].log() + q_r[i] @ p_v[i].log()) for i in range(n)) / (2 * n)
    if not objective.bidirectional:
        del terms["cta_patch"]
    return terms


@BEHAVIORS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("words", "patch_attention", "options"),
    [
        pytest.param(MIXED, True, {}, id="class-token"),
        pytest.param(MIXED, False, {}, id="no-class-token"),
        pytest.param(FULL, True, {}, id="112-tokens"),
        pytest.param(MIXED, True, {"use_local_attention": True}, id="layers"),
        pytest.param(MIXED, False, {"bidirectional": False}, id="one-way"),
    ],
)
def test_losses_and_gradients_equal_loops(behavior, training, words, patch_attention, options):
    images, texts = features(words, patch_attention=patch_attention)
    objective = make(behavior=behavior, **options).train(training)
    values = [images.pooled, images.regions, texts.words]
    inputs = [value.requires_grad_() for value in values] + list(objective.parameters())
    prototypes = torch.nn.functional.normalize(objective.prototypes.weight, dim=1)
    if behavior == "published":  # the gradient is that of the unit rows themselves
        prototypes = prototypes.detach().requires_grad_()
        theirs = [prototypes if value is objective.prototypes.weight else value for value in inputs]
    else:
        theirs = inputs
    slow = naive_terms(objective, images, texts, prototypes)
    expected = torch.autograd.grad(sum(slow.values()), theirs)
    output = objective(images, texts)
    assert list(output.terms) == list(slow)
    for name, value in output.terms.items():
        torch.testing.assert_close(value, slow[name], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(output.total, sum(slow.values()), rtol=1e-9, atol=1e-10)
    for ours, loop in zip(torch.autograd.grad(output.total, inputs), expected, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-7, atol=1e-9)


def test_words_and_their_weights_by_hand():
    """[CLS] a ##a b [SEP] [PAD]: published weights are those of the next token, so [SEP] gets none."""
    images, texts = features([[2, 1], [1, 1, 1, 1]])
    texts.cls_attention[0] = torch.tensor([0.1, 0.2, 0.3, 0.25, 0.15, 0.0])
    published, corrected = make(behavior="published"), make()
    masks = [objective.local_embeddings(images, texts)[2] for objective in (published, corrected)]
    assert masks[0].int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]
    assert masks[1].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    low, high = 0.15 + 0.1 * (0.55 - 0.15), 0.15 + 0.9 * (0.55 - 0.15)  # words a, b: 0.3 + 0.25 and 0.15
    weights = published.word_weights(texts)[0]
    torch.testing.assert_close(weights, torch.tensor([0, high, low, 0, 0, 0]).double() / (low + high))
    low, high = 0.25 + 0.1 * (0.5 - 0.25), 0.25 + 0.9 * (0.5 - 0.25)  # 0.2 + 0.3 and 0.25
    weights = corrected.word_weights(texts)[0]
    torch.testing.assert_close(weights, torch.tensor([0, high, low, 0, 0, 0]).double() / (low + high))


def test_a_caption_that_fills_112_tokens_loses_its_tail():
    images, texts = features(FULL)
    kept = {b: make(behavior=b).local_embeddings(images, texts)[2][0] for b in ("published", "corrected")}
    assert kept["published"].sum() == 54  # of 55 words, without the last and without [SEP]
    assert kept["corrected"].sum() == 55
    assert make(behavior="published").word_weights(texts)[0, 55:].abs().sum() == 0
    assert (make().word_weights(texts)[0, 1:56] > 0).all()


@BEHAVIORS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_does_not_matter(behavior, training):
    totals = []
    for padding in ({}, {"tokens": 5, "columns": 7}):
        objective = make(behavior=behavior).train(training)
        totals.append(objective(*features(MIXED, **padding)).total)
    torch.testing.assert_close(*totals, rtol=1e-12, atol=1e-12)


def test_padding_enters_the_published_statistics_alone():
    images, texts = features(MIXED)
    rows = {"published": 3 * 111, "corrected": sum(map(len, MIXED))}
    for behavior, count in rows.items():
        objective = make(behavior=behavior).train()
        norm = objective.word_head[1]
        norm.momentum = 1.0
        objective(images, texts)
        mask = texts.word_mask if behavior == "published" else texts.word_mask & ~texts.special_mask
        hidden = objective.word_head[0](texts.words[:, 1:][mask[:, 1:]])
        empty = objective.word_head[0].bias * (count - len(hidden))
        torch.testing.assert_close(norm.running_mean, (hidden.sum(dim=0) + empty) / count)


def test_negatives_are_the_words_of_the_same_text_alone():
    """Other images and texts leave a pair's token loss as it is; a padded row is a negative in published code only."""
    images, texts = features(MIXED)
    for behavior in ("published", "corrected"):
        objective = make(behavior=behavior)
        alone = []
        for n in range(3):
            image = ImageFeatures(*(getattr(images, f.name)[n : n + 1] for f in fields(images)))
            text = TextFeatures(**{f.name: getattr(texts, f.name)[n : n + 1] for f in fields(texts)})
            alone.append(objective(image, text).terms)
        together = objective(images, texts).terms
        for name in ("cta_word", "cta_patch"):
            torch.testing.assert_close(together[name], sum(terms[name] for terms in alone) / 3)
        one_word = alone[1]["cta_word"]
        assert one_word > 1 if behavior == "published" else one_word.abs() < 1e-12


@BEHAVIORS
def test_gathered_shares_are_the_whole_batch(behavior):
    """Two processes whose longest texts differ: padded and put together they are the batch of one process."""
    words = [*MIXED, [1, 1]]
    images, texts = features(words)
    left = {f.name: getattr(texts, f.name)[:2] for f in fields(texts)}
    right = {f.name: getattr(texts, f.name)[2:] for f in fields(texts)}
    longest = int(texts.token_mask[:2].sum(dim=1).max()), int(texts.word_mask[:2].sum(dim=1).max())
    shares = {}
    for name, value in left.items():
        if name != "sentence":
            per_token = name.startswith("token") or name == "cls_attention"
            value = value[:, : longest[0 if per_token else 1]]
            missing = right[name].shape[1] - value.shape[1]
            after = [0, 0] * (value.ndim - 2) + [0, missing]
            value = torch.nn.functional.pad(value, after, value=TextFeatures.PADDING.get(name, 0))
        shares[name] = torch.cat([value, right[name]])
    objective = make(behavior=behavior).train()
    torch.testing.assert_close(
        objective(images, TextFeatures(**shares)).total, objective(images, texts).total, rtol=1e-12, atol=1e-12
    )


@BEHAVIORS
def test_frozen_prototypes_have_a_gradient_of_exactly_zero(behavior):
    images, texts = features(MIXED)
    objective = make(behavior=behavior, freeze_prototypes_epochs=2).train()
    totals = []
    for epoch in (0, 1, 2):
        objective.zero_grad()
        objective.on_epoch(epoch)
        output = objective(images, texts)
        output.total.backward()
        totals.append(output.total.detach())
        gradient = objective.prototypes.weight.grad
        assert gradient is not None
        assert bool(gradient.abs().sum() == 0) == (epoch < 2)
        assert all(parameter.grad is not None for parameter in objective.parameters())
    torch.testing.assert_close(totals[0], totals[2])
    torch.testing.assert_close(totals[0], make(behavior=behavior).train()(images, texts).total)


def test_prototypes_change_in_place_in_published_training_alone():
    images, texts = features(MIXED)
    for behavior, training in (("published", True), ("published", False), ("corrected", True), ("corrected", False)):
        objective = make(behavior=behavior).train(training)
        before = objective.prototypes.weight.detach().clone()
        first, second = objective(images, texts).total, objective(images, texts).total
        (first + second).backward()  # two steps in one graph, as with accumulated gradients
        assert torch.equal(before, objective.prototypes.weight) == (behavior == "corrected" or not training)
        if behavior == "published" and training:
            lengths = objective.prototypes.weight.norm(dim=1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
        # the gradient of a cosine does not change a vector's length; the published one may
        along = (objective.prototypes.weight * objective.prototypes.weight.grad).sum(dim=1).abs().max()
        assert (along < 1e-12) == (behavior == "corrected")


@BEHAVIORS
@pytest.mark.parametrize("local", [False, True], ids=["softmax", "layers"])
def test_attention_equals_loops_and_is_zero_elsewhere(behavior, local):
    images, texts = features(MIXED)
    objective = make(behavior=behavior, use_local_attention=local)
    attention = objective.attention(images, texts)
    torch.testing.assert_close(attention, objective(images, texts).attention)
    regions, words, mask = objective.local_embeddings(images, texts)
    assert attention.shape == (3, 7, 3, 3)
    for n in range(3):
        used = [column for column, _ in naive_words(texts, n, behavior)]
        assert mask[n].nonzero().flatten().tolist() == used
        for column in range(7):
            if column not in used:
                assert attention[n, column].abs().sum() == 0
                continue
            _, expected = naive_attend(words[n, column], regions[n].flatten(0, 1), objective.word_attention)
            torch.testing.assert_close(attention[n, column].flatten(), expected)


@BEHAVIORS
def test_loss_can_be_rebuilt_from_the_attention(behavior):
    """The maps handed out are the ones in the loss: contexts made from them give L_word again."""
    images, texts = features(MIXED)
    objective = make(behavior=behavior)
    regions, _, _ = objective.local_embeddings(images, texts)
    words, used = objective.word_rows(texts)
    maps, patches = objective.attention(images, texts)[:, 1:], regions.flatten(1, 2)
    total = 0.0
    for n in range(3):
        last = int(used[n].sum())
        count = words.shape[1] if behavior == "published" else last
        contexts = [w @ patches[n] for w in maps[n].flatten(1)[:last]]
        contexts += [naive_attend(words[n, i], patches[n], None)[0] for i in range(last, count)]  # padding attends too
        weights = [*objective.word_weights(texts)[n, 1:].tolist(), *[0.0] * 111][:count]
        total += naive_aligned(words[n][:count], torch.stack([c / c.norm() for c in contexts]), weights) / 3
    torch.testing.assert_close(objective(images, texts).terms["cta_word"], total)


def test_one_image_and_many_texts():
    images, texts = features(MIXED)
    single = ImageFeatures(images.pooled[:1], images.regions[:1])
    objective = make()
    attention = objective.attention(single, texts)
    assert attention.shape == (3, 7, 3, 3)
    torch.testing.assert_close(attention[0], objective.attention(images, texts)[0])
    assert objective.similarity(single, texts).shape == (1, 3)


def test_similarity_is_the_cosine_of_whole_image_and_report():
    images, texts = features(MIXED)
    objective = make()
    v = naive_head(objective.image_head, images.pooled, training=False)
    r = naive_head(objective.text_head, texts.words[:, 0], training=False)
    torch.testing.assert_close(objective.similarity(images, texts), v @ r.T)


def test_weights_and_temperatures():
    images, texts = features(MIXED)
    given = {"temperatures": {"cpa": 0.5, "cta": 0.3}, "weights": {"ita": 2.0, "cpa": 0.5}}
    objective, plain = make(**given), make()
    output, terms = objective(images, texts), plain(images, texts).terms
    assert objective.temperatures == {"ita": 0.07, "cta": 0.3, "cpa": 0.5}
    ita = output.terms["ita_image_to_text"] + output.terms["ita_text_to_image"]
    cta = output.terms["cta_word"] + output.terms["cta_patch"]
    torch.testing.assert_close(output.total, 2 * ita + cta + 0.5 * output.terms["cpa"])
    assert {name for name in terms if terms[name] != output.terms[name]} == {"cta_word", "cta_patch", "cpa"}


def test_parts_of_weight_zero_are_not_made():
    images, texts = features(MIXED)
    whole = make()(images, texts)
    objective = make(weights={"cta": 0.0, "cpa": 0.0})
    assert {name.partition(".")[0] for name, _ in objective.named_parameters()} == {"image_head", "text_head"}
    assert objective.rows is None
    output = objective(images, replace(texts, cls_attention=None))
    assert list(output.terms) == ["ita_image_to_text", "ita_text_to_image"]
    assert output.attention is None
    for ask in (objective.attention, objective.local_embeddings):
        with pytest.raises(NotImplementedError, match="MGCA"):
            ask(images, texts)
    assert list(make(weights={"cpa": 0.0})(images, texts).terms) == [name for name in whole.terms if name != "cpa"]
    made = {
        name.partition(".")[0] for name, _ in make(use_local_attention=True, bidirectional=False).named_parameters()
    }
    assert "word_attention" in made
    assert "patch_attention" not in made


def test_every_parameter_has_a_gradient():
    images, texts = features(MIXED)
    for options in ({}, {"use_local_attention": True}, {"bidirectional": False}, {"weights": {"cta": 0}}):
        objective = make(**options)
        objective(images, texts).total.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in objective.parameters())


def test_weights_carry_no_gradient():
    images, texts = features(MIXED)
    images.cls_attention.requires_grad_()
    texts.cls_attention.requires_grad_()
    total = make()(images, texts).total
    assert not make().word_weights(texts).requires_grad
    total.backward()
    assert images.cls_attention.grad is None
    assert texts.cls_attention.grad is None


def test_clipped_weights_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 100.0], [5.0, 7.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True] * 5, [True, False, False, False, False]])
    low, high = 1.4, 4 + 0.6 * 96
    expected = torch.tensor([low, 2.0, 3.0, 4.0, high])
    torch.testing.assert_close(clipped_weights(values, mask), torch.stack([expected / expected.sum(), mask[1].float()]))
    torch.testing.assert_close(clipped_weights(torch.full((1, 4), 3.0)), torch.full((1, 4), 0.25))


def test_sinkhorn_equals_loops_and_balances():
    scores = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double().tanh()
    torch.testing.assert_close(sinkhorn(scores), naive_sinkhorn(scores))
    settled = sinkhorn(scores, iterations=1000)
    torch.testing.assert_close(settled.sum(dim=0), torch.full((4,), 6 / 4).double())
    torch.testing.assert_close(settled.sum(dim=1), torch.ones(6).double())
    torch.testing.assert_close(sinkhorn(torch.full((3, 5), 0.3)), torch.full((3, 5), 0.2))
    extreme = sinkhorn(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))  # e^20 and e^-20 in float32
    torch.testing.assert_close(extreme, torch.full((2, 2), 0.5))


@BEHAVIORS
def test_bfloat16_autocast_is_near_and_ends_in_float32(behavior):
    images, texts = features(MIXED)
    half = {
        f.name: value.float() if (value := getattr(texts, f.name)).is_floating_point() else value for f in fields(texts)
    }
    images = ImageFeatures(*(getattr(images, f.name).float() for f in fields(images)))
    objective = make(behavior=behavior, dim=32, hidden=64).float()
    exact = objective(images, TextFeatures(**half))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(images, TextFeatures(**half))
    assert all(value.dtype == torch.float32 for value in (rough.total, rough.attention, *rough.terms.values()))
    assert rough.total != exact.total
    torch.testing.assert_close(rough.total, exact.total, rtol=0.03, atol=0.03)
    torch.testing.assert_close(rough.attention, exact.attention, rtol=0.2, atol=0.02)


@BEHAVIORS
def test_a_text_without_words_can_be_embedded_but_not_aligned(behavior):
    images, texts = features([[1, 1], []])
    objective = make(behavior=behavior)
    assert objective.similarity(images, texts).isfinite().all()
    with pytest.raises(ValueError, match=r"without words.*\[1\]"):
        objective(images, texts)
    images, texts = features([[], []])
    nothing = replace(texts, word_mask=texts.word_mask & False)
    assert objective.local_embeddings(images, nothing)[2].sum() == 0
    assert objective.attention(images, nothing).abs().sum() == 0


def test_clear_errors():
    images, texts = features(MIXED)
    with pytest.raises(ValueError, match="attentions=True"):
        make()(images, replace(texts, cls_attention=None))
    fewer = ImageFeatures(images.pooled[:2], images.regions[:2])
    with pytest.raises(ValueError, match="pairs image b with text b"):
        make()(fewer, texts)
    with pytest.raises(ValueError, match="2 images and 3 texts"):
        make().attention(fewer, texts)
    with pytest.raises(ValueError, match="113 tokens in a text, it takes 112"):
        make(behavior="published")(*features([[111], [1]]))
    assert make()(*features([[111], [1]])).total.isfinite()
    for options, message in (
        ({"temperatures": {"itc": 0.1}}, r"temperatures\.itc.*\n.*'ita', 'cta' or 'cpa'"),
        ({"temperatures": {"ita": 0.0}}, "temperatures.ita.*\n.*greater than 0"),
        ({"weights": {"cta": -1.0}}, "weights.cta.*\n.*greater than or equal to 0"),
        ({"weights": {"ita": 0, "cta": 0, "cpa": 0}}, "weights are all zero"),
        ({"behavior": "legacy"}, "behavior"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
