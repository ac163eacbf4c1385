"""PRIOR's batched loss against loops over reports, sentences and regions, written from the paper's equations."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from gloria_core.objectives import build
from gloria_core.types import Batch

WIDTHS = (10, 8, 6)
WORDS = [7, 2, 9, 4]  # two words a sentence: 4, 1, 5, 2 sentences
BEHAVIORS = ("published", "corrected")
EPOCH = {1: 0, 2: 2, 3: 5}  # of ten


def make(behavior="corrected", **options):
    torch.manual_seed(1)
    options = {"embed_dim": 8, "n_prototypes": 5, "n_queries": 4, "decoder_layers": 1, **options}
    pooled, region, text = WIDTHS
    objective = build("prior", pooled_dim=pooled, region_dim=region, text_dim=text, behavior=behavior, **options)
    with torch.no_grad():
        objective.logit_scale.fill_(1.5)
        objective.local_logit_scale.fill_(1.2)
    return objective.double().eval()


def at_stage(objective, stage):
    objective.plan(10)
    objective.on_epoch(EPOCH[stage])
    return objective


@pytest.fixture
def pairs(make_features):
    """Four images of 7 x 7 regions and four texts of several sentences, with pixels."""
    images, texts = make_features(len(WORDS), WORDS, side=7, widths=WIDTHS)
    sentences = torch.where(texts.token_sentences >= 0, (texts.token_words - 1) // 2, -1)
    texts = replace(texts, token_sentences=sentences, word_sentence=sentences)
    pixels = torch.randn(len(WORDS), 1, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    return images, texts, Batch(pixels, None, torch.zeros(len(WORDS), 0), torch.arange(len(WORDS)))


@pytest.mark.parametrize(("options", "scale"), [({}, 100.0), ({"temperature": 0.07}, 1 / 0.07)])
def test_both_contrasts_start_at_the_temperature(options, scale):
    pooled, region, text = WIDTHS
    objective = build("prior", pooled_dim=pooled, region_dim=region, text_dim=text, embed_dim=8, **options)
    assert objective.logit_scale.exp().item() == pytest.approx(scale)
    assert objective.local_logit_scale.exp().item() == pytest.approx(scale)
    assert objective.logit_scale is not objective.local_logit_scale


# ------------------------------------------------------------------------------------------ the naive reference


def linear(layer, x):
    return layer.weight @ x + layer.bias


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def softmax(values):
    powers = torch.stack([torch.exp(value) for value in values])
    return powers / powers.sum()


def naive_pool(pool, first, vectors, positions=None):
    tokens = [first, *vectors]
    if positions is not None:
        tokens = [token + position for token, position in zip(tokens, positions, strict=True)]
    width = len(first) // pool.heads
    query, heads = linear(pool.q_proj, tokens[0]), []
    for part in (slice(h * width, (h + 1) * width) for h in range(pool.heads)):
        weights = softmax([query[part] @ linear(pool.k_proj, token)[part] / width**0.5 for token in tokens])
        heads.append(sum(w * linear(pool.v_proj, token)[part] for w, token in zip(weights, tokens, strict=True)))
    return linear(pool.c_proj, torch.cat(heads))


def naive_nce(left, right, scale):
    total = 0.0
    for i in range(len(left)):
        rows = [scale * cosine(left[i], other) for other in right]
        columns = [scale * cosine(other, right[i]) for other in left]
        total = total - torch.log(softmax(rows)[i]) - torch.log(softmax(columns)[i])
    return total / (2 * len(left))


def naive_mixture(bank, x):
    logits = torch.stack([x @ e for e in bank.prototypes])
    weights = softmax(logits / bank.temperature)
    return sum(w * e for w, e in zip(weights, bank.prototypes, strict=True)), logits


def naive_matching(written, targets, behavior):
    """All permutations instead of the Hungarian method; row i of what is written belongs to target best[i]."""
    n = len(targets)

    def cost(order):
        return sum((written[i] - targets[order[i]]).abs().sum() for i in range(n))

    best = min(itertools.permutations(range(n)), key=cost)
    if behavior == "published":
        return torch.stack([written[best[i]] for i in range(n)])
    return torch.stack([written[best.index(i)] for i in range(n)])


def naive_text(objective, texts, n, stage):
    """Raw sentences, what stands for them, and the bank's logits, of text n."""
    raw = []
    for number in range(int(texts.token_sentences[n].max()) + 1):
        columns = (texts.token_sentences[n] == number).nonzero().flatten()
        raw.append(sum(linear(objective.text_head, texts.tokens[n, c]) for c in columns) / len(columns))
    raw = raw[: objective.n_queries] if stage == 3 else raw
    found = [naive_mixture(objective.bank, x) for x in raw]
    used = raw if stage == 1 else [mixture for mixture, _ in found]
    return raw, used, [logits for _, logits in found]


def naive_image(objective, images, b):
    heads, regions = objective.image_heads, images.regions[b].flatten(0, 1)
    whole = naive_pool(heads.pool, linear(heads.query, images.pooled[b]), regions, heads.pool.positional_embedding)
    rows = list(regions)
    if objective.behavior == "published":  # the channels-first numbers, one after the other
        flat = torch.stack([regions[r, c] for c in range(regions.shape[1]) for r in range(len(regions))])
        rows = flat.split(regions.shape[1])
    return linear(heads.whole, whole), torch.stack([linear(heads.local, row) for row in rows])


def as_map(rows, behavior):
    dim = rows.shape[1]
    if behavior == "published":
        return rows.flatten().view(1, dim, 7, 7)
    return torch.stack([torch.stack([rows[7 * y + x] for x in range(7)]) for y in range(7)]).permute(2, 0, 1)[None]


def naive_loss(objective, images, texts, batch, stage):
    behavior, cross, predict = objective.behavior, objective.cross_attention, objective.predictor
    scale, local_scale = objective.logit_scale.exp(), objective.local_logit_scale.exp()
    root, count = 8**0.5, len(images.pooled)
    terms = dict.fromkeys(("local_image", "local_text", "image", "report"), 0.0)
    wholes, reports, rewritten, gaps, divergences = [], [], [], [], []
    for b in range(count):
        whole, z = naive_image(objective, images, b)
        raw, used, logits = naive_text(objective, texts, b, stage)
        wholes.append(whole)
        reports.append(naive_pool(objective.text_pool, sum(used) / len(used), used))
        told = []
        for row in z:
            weights = [torch.sigmoid(linear(cross.query1, row) @ linear(cross.key2, s) / root) for s in used]
            told.append(sum(w * linear(cross.value2, s) for w, s in zip(weights, used, strict=True)))
        seen = []
        for s in used:
            weights = [torch.sigmoid(linear(cross.query2, s) @ linear(cross.key1, row) / root) for row in z]
            seen.append(sum(w * linear(cross.value1, row) for w, row in zip(weights, z, strict=True)))
        for row, t in zip(z, told, strict=True):
            pull = cosine(predict(row), t.detach()) + cosine(predict(t), row.detach())
            terms["local_image"] -= pull / (2 * len(z) * count)
        terms["local_text"] += naive_nce(used, seen, local_scale) / count
        gaps += [q - x for q, x in zip(used, raw, strict=True)]
        if stage < 3:
            continue
        maps = (as_map(rows, behavior) for rows in (z, torch.stack(told)))
        drawn = objective.image_decoder(*maps, size=(32, 32))[0, 0]
        terms["image"] += (drawn - batch.pixels[b, 0].mean(dim=0)).abs().mean() / count
        targets = torch.stack([*used, *[torch.zeros_like(used[0])] * (objective.n_queries - len(used))])
        written = naive_matching(objective.report_decoder(z[None])[0], targets, behavior)
        terms["report"] += (written - targets).abs().mean() / count
        mixtures = []
        for row, truth in zip(written, logits, strict=False):
            mixture, found = naive_mixture(objective.bank, row)
            mixtures.append(mixture)
            p, q = softmax(truth), softmax(found)
            divergences.append(sum(p * (torch.log(p) - torch.log(q))))
        rewritten.append(naive_pool(objective.text_pool, sum(mixtures) / len(mixtures), mixtures))
    terms["global"] = naive_nce(wholes, reports, scale)
    terms["prototype"] = torch.stack(gaps).abs().mean()
    total = terms["global"] + terms["local_image"] + terms["local_text"]
    if stage > 1:
        total = total + 10 * terms["prototype"]
    if stage == 3:
        terms["consistency"] = sum(divergences) / len(divergences)
        terms["report_global"] = naive_nce(rewritten, reports, scale)
        total = total + 9 * terms["global"] + terms["image"] + 10 * terms["report"]
        total = total + terms["consistency"] + terms["report_global"]
    return total, terms


# ------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_loss_and_gradients_equal_the_loops(pairs, behavior, stage):
    images, texts, batch = pairs
    objective = at_stage(make(behavior), stage)
    objective.bank.noise = torch.zeros_like
    output = objective(images, texts, batch)
    total, terms = naive_loss(objective, images, texts, batch, stage)
    assert len(output.terms) == {1: 3, 2: 4, 3: 8}[stage]
    for name, value in output.terms.items():
        torch.testing.assert_close(value, terms[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(output.total, total)
    names = [name for name, _ in objective.named_parameters()]
    found, wanted = (
        torch.autograd.grad(value, list(objective.parameters()), allow_unused=True) for value in (output.total, total)
    )
    for name, one, other in zip(names, found, wanted, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_order_of_the_batch_does_not_matter(pairs, make_features, behavior, stage):
    images, texts, batch = pairs
    objective, order = at_stage(make(behavior), stage), [2, 0, 3, 1]
    objective.bank.noise = torch.zeros_like
    other = objective(
        replace(images, pooled=images.pooled[order], regions=images.regions[order]),
        replace(texts, **{name: value[order] for name, value in vars(texts).items() if value is not None}),
        replace(batch, pixels=batch.pixels[order]),
    )
    torch.testing.assert_close(objective(images, texts, batch).total, other.total)


@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_in_stage_three_every_parameter_learns_with_noise_and_dropout(pairs, behavior):
    images, texts, batch = pairs
    objective = make(behavior).train()
    objective(images, texts, batch).total.backward()
    lacking = [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert lacking == []


def test_stage_one_leaves_bank_and_decoders_alone(pairs):
    images, texts, _ = pairs
    objective = at_stage(make(), 1)
    objective(images, texts).total.backward()
    learning = {name.partition(".")[0] for name, p in objective.named_parameters() if p.grad is not None}
    assert not learning & {"bank", "image_decoder", "report_decoder"}
    assert {"image_heads", "text_head", "cross_attention", "predictor", "logit_scale"} <= learning


def test_a_text_of_one_sentence_has_no_local_text_loss(pairs):
    images, texts, batch = pairs
    whole = replace(texts, token_sentences=texts.token_sentences.clamp(max=0))
    assert make()(images, whole, batch).terms["local_text"] == 0


def test_regions_of_another_grid_and_width_are_taken(make_features):
    images, texts = make_features(3, [2, 3, 4], side=4, widths=WIDTHS)
    batch = Batch(torch.randn(3, 1, 1, 40, 40).double(), None, torch.zeros(3, 0), torch.arange(3))
    assert make()(images, texts, batch).total.isfinite()


def test_wrong_input_is_named(pairs):
    images, texts, batch = pairs
    objective = make()
    with pytest.raises(ValueError, match="needs the batch with their pixels"):
        objective(images, texts)
    with pytest.raises(ValueError, match="got 3 and 4"):
        objective(replace(images, pooled=images.pooled[:3], regions=images.regions[:3]), texts, batch)
    silent = torch.where(torch.arange(4)[:, None] == 2, -1, texts.token_sentences)
    with pytest.raises(ValueError, match=r"texts \[2\] have no token in any sentence"):
        objective(images, replace(texts, token_sentences=silent), batch)


@pytest.mark.parametrize(
    "options",
    [
        {"behavior": "original"},
        {"n_queries": 0},
        {"bank_temperature": 0.0},
        {"temperature": 0.0},
        {"temp_decay": "cosine"},
        {"stage_rates": (1.0, 0.5)},
        {"stage_rates": (1.0, 0.0, 1.0)},
        {"stage_epochs": (1, 2)},
        {"stage_epochs": (1, 2, 0)},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


def test_scale_is_held_to_one_hundred_when_corrected(pairs):
    images, texts, batch = pairs
    for behavior, wanted in (("published", math.exp(6)), ("corrected", 100.0)):
        objective = at_stage(make(behavior), 1)
        with torch.no_grad():
            objective.logit_scale.fill_(6.0)
        left, right = objective.global_embeddings(images, texts)
        cosines = torch.nn.functional.cosine_similarity(left[:, None], right[None], dim=2)
        loss = torch.nn.functional.cross_entropy
        logits, target = wanted * cosines, torch.arange(4)
        output = objective(images, texts, batch)
        torch.testing.assert_close(output.terms["global"], (loss(logits, target) + loss(logits.T, target)) / 2)
        output.total.backward()
        assert objective.logit_scale.grad.abs() > 0


# ------------------------------------------------------------------------------------------ noise


def test_bank_is_asked_for_noise_in_the_published_order(pairs):
    images, texts, batch = pairs
    objective, asked = make("published"), []
    objective.bank.noise = lambda logits: asked.append(tuple(logits.shape)) or torch.zeros_like(logits)
    objective(images, texts, batch)
    assert asked == [(11, 5), (11, 5)]  # true sentences, then written ones: 4 + 1 + 4 (of 5) + 2
    asked.clear()
    at_stage(objective, 2)(images, texts, batch)
    assert asked == [(12, 5)]
    at_stage(objective, 1)(images, texts, batch)
    assert asked == [(12, 5)]


def test_evaluation_is_random_only_when_published(pairs):
    images, texts, _ = pairs
    published, corrected = make("published"), make()
    assert not torch.equal(published.similarity(images, texts), published.similarity(images, texts))
    assert torch.equal(corrected.similarity(images, texts), corrected.similarity(images, texts))


# ------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    ("epochs", "starts", "stages"),
    [
        (1, (0,), [3]),
        (2, (0, 1), [2, 3]),
        (3, (0, 1, 2), [1, 2, 3]),
        (5, (0, 1, 3), [1, 2, 2, 3, 3]),
        (10, (0, 2, 5), [1, 1, 2, 2, 2, 3, 3, 3, 3, 3]),
        (100, (0, 20, 50), [1] * 20 + [2] * 30 + [3] * 50),
    ],
)
def test_plan_shares_out_the_epochs(epochs, starts, stages):
    objective = make()
    assert objective.plan(epochs) == starts
    seen = []
    for epoch in range(epochs):
        objective.on_epoch(epoch)
        seen.append(objective.stage)
    assert seen == stages


def test_every_number_of_epochs_gives_a_valid_plan():
    objective = make()
    for epochs in range(1, 200):
        starts = objective.plan(epochs)
        assert starts[0] == 0
        assert list(starts) == sorted(set(starts))
        assert starts[-1] < epochs
        objective.on_epoch(epochs - 1)
        assert objective.stage == 3


def test_given_stage_epochs():
    objective = make(stage_epochs=[1, 0, 4])
    assert objective.plan(5) == (0, 1)
    objective.on_epoch(1)
    assert objective.stage == 3
    alone = make(stage_epochs=(0, 0, 3), stage_rates=(1.0, 0.4, 0.2))
    assert alone.plan(3) == (0,) and alone.stage_rates() == (0.2,)
    with pytest.raises(ValueError, match=r"\(1, 0, 4\) are 5 epochs, not 6"):
        objective.plan(6)


def test_rates_are_those_of_the_stages_that_come():
    objective = make()  # the paper's: the last stage at half
    for epochs, rates in ((1, (0.5,)), (2, (1.0, 0.5)), (10, (1.0, 1.0, 0.5))):
        objective.plan(epochs)
        assert objective.stage_rates() == rates
    skips = make(stage_epochs=(2, 0, 1), stage_rates=(1.0, 0.4, 0.2))
    skips.plan(3)
    assert skips.stage_rates() == (1.0, 0.2)


def test_an_objective_without_a_plan_is_at_the_end():
    assert make().stage == 3
    assert make(temp_decay="exp").bank.temperature == pytest.approx(0.09)
    assert make(temp_decay="fixed").bank.temperature == 0.9
    with pytest.raises(RuntimeError, match=r"call plan\(epochs\)"):
        make().on_epoch(0)


@pytest.mark.parametrize("decay", ["fixed", "linear", "exp"])
def test_temperature_falls_from_the_start_of_stage_two(decay):
    objective = make(temp_decay=decay)
    objective.plan(10)
    share = [0, 0, 0, *(step / 8 for step in range(1, 8))]
    wanted = {"fixed": lambda t: 0.9, "linear": lambda t: 0.9 - 0.81 * t, "exp": lambda t: 0.9 * 0.1**t}[decay]
    for epoch in (9, *range(10)):  # of the epoch alone, not of what came before
        objective.on_epoch(epoch)
        assert objective.bank.temperature == pytest.approx(wanted(share[epoch]))


# ------------------------------------------------------------------------------------------ scores and maps


def test_similarity_and_zero_shot_by_hand(pairs):
    images, texts, _ = pairs
    for behavior in BEHAVIORS:
        objective = make(behavior)
        objective.bank.noise = torch.zeros_like
        some = replace(images, pooled=images.pooled[:3], regions=images.regions[:3])
        scale = objective.logit_scale if behavior == "published" else objective.logit_scale.exp()
        cosines, local = torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
        prompts = texts
        if behavior == "published":  # a prompt is one sentence, all of it but [CLS]
            numbers = torch.where(texts.token_mask & (torch.arange(texts.tokens.shape[1]) > 0), 0, -1)
            prompts = replace(texts, token_sentences=numbers)
        for b in range(3):
            whole, z = naive_image(objective, images, b)
            for n in range(4):
                used = naive_text(objective, prompts, n, 3)[1]
                cosines[b, n] = cosine(whole, naive_pool(objective.text_pool, sum(used) / len(used), used))
                cross = objective.cross_attention(z[None], torch.stack(used)[None], torch.ones(1, len(used)).bool())
                local[b, n] = (cross.of_region.mean() + cross.of_sentence.mean()) / 2
        found = objective.zero_shot_logits(some, texts)
        torch.testing.assert_close(found, (scale * cosines, local))
        wanted = (scale * cosines).softmax(dim=1) + 0.5 * local.softmax(dim=1)
        torch.testing.assert_close(objective.zero_shot_scores(some, texts), wanted)
        torch.testing.assert_close(objective.similarity(some, prompts), (scale * cosines + local / 2) / (scale + 0.5))


def test_every_word_has_the_map_of_its_sentence(pairs):
    images, texts, batch = pairs
    objective = make()
    maps = objective.attention(images, texts)
    assert maps.shape == (4, 11, 7, 7)
    torch.testing.assert_close(maps, objective(images, texts, batch).attention)
    used = naive_text(objective, texts, 2, 3)[1]
    z, cross = naive_image(objective, images, 2)[1], objective.cross_attention
    for word in range(11):
        number = int(texts.word_sentence[2, word])
        if not 0 <= number < 4:  # [CLS], [SEP], and the fifth sentence, which stage 3 leaves out
            assert (maps[2, word] == 0).all()
            continue
        query = linear(cross.query2, used[number])
        wanted = torch.stack([torch.sigmoid(query @ linear(cross.key1, row) / 8**0.5) for row in z])
        torch.testing.assert_close(maps[2, word], wanted.view(7, 7))
    regions, words, mask = objective.local_embeddings(images, texts)
    assert regions.shape == (4, 7, 7, 8)
    torch.testing.assert_close(words[2, 3], used[1])
    assert torch.equal(mask, maps.flatten(2).sum(dim=2) > 0)


def test_one_image_with_several_texts(pairs):
    images, texts, _ = pairs
    objective = make()
    one = replace(images, pooled=images.pooled[1:2], regions=images.regions[1:2])
    torch.testing.assert_close(objective.attention(one, texts)[1], objective.attention(images, texts)[1])
    with pytest.raises(ValueError, match="got 2 images and 4"):
        objective.attention(replace(images, regions=images.regions[:2], pooled=images.pooled[:2]), texts)


def test_under_autocast_the_terms_stay_in_float32(pairs):
    images, texts, batch = pairs
    objective = make().float()
    single = [
        replace(value, **{k: v.float() for k, v in vars(value).items() if v is not None and v.is_floating_point()})
        for value in (images, texts)
    ]
    batch = replace(batch, pixels=batch.pixels.float())
    exact = objective(*single, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(*single, batch)
    assert {value.dtype for value in output.terms.values()} == {torch.float32}
    torch.testing.assert_close(output.total, exact.total, rtol=0.02, atol=0)
