"""Attention pool, sentences, prototype bank and decoders of PRIOR, each against a loop or a limit."""

import math

import pytest
import torch
from torch import nn

from gloria_core.models.decoders import ImageDecoder, SentenceDecoder, match
from gloria_core.models.heads import AttentionPool, ImageHeads
from gloria_core.objectives.prior import PrototypeBank, SentenceRegionAttention, decayed, gather_sentences, local_nce
from gloria_core.types import ImageFeatures


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------ attention pool


def test_pool_is_torch_multi_head_attention_of_the_first_vector():
    pool, first, vectors = AttentionPool(16, heads=4, side=3), torch.randn(2, 16), torch.randn(2, 9, 16)
    x = torch.cat([first[:, None], vectors], dim=1) + pool.positional_embedding
    layers = (pool.q_proj, pool.k_proj, pool.v_proj)
    wanted = nn.functional.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3,
        embed_dim_to_check=16,
        num_heads=4,
        in_proj_weight=None,
        in_proj_bias=torch.cat([layer.bias for layer in layers]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
    )[0][0]
    torch.testing.assert_close(pool(first, vectors, grid=(3, 3)), wanted)


def test_pool_of_a_set_ignores_what_is_masked():
    pool, vectors = AttentionPool(6), torch.randn(1, 4, 6)
    assert pool.heads == 2  # 8 does not divide 6
    padded = torch.cat([vectors, torch.zeros(1, 3, 6)], dim=1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    torch.testing.assert_close(pool.of_set(padded, mask), pool(vectors.mean(dim=1), vectors))


def test_positions_follow_the_grid():
    pool, plain = AttentionPool(4, side=2), AttentionPool(4)
    pool.positional_embedding.data = torch.tensor([9.0, 1.0, 1.0, 2.0, 2.0])[:, None].expand(5, 4).clone()
    plain.load_state_dict(pool.state_dict(), strict=False)
    first, vectors = torch.randn(1, 4), torch.randn(1, 6, 4)
    wider = torch.tensor([1.0, 1, 1, 2, 2, 2])[:, None]  # the first row of the grid, the second row
    torch.testing.assert_close(pool(first, vectors, grid=(2, 3)), plain(first + 9, vectors + wider))
    with pytest.raises(ValueError, match="9 regions do not fill the grid"):
        pool(torch.zeros(1, 4), torch.zeros(1, 9, 4), grid=(2, 4))


@pytest.mark.parametrize("mixed", [False, True])
def test_regions_as_rows_and_back(mixed):
    heads = ImageHeads(4, 4, 4, mixed=mixed)
    heads.local = nn.Identity()
    maps = torch.randn(2, 4, 7, 7)  # channels first
    rows = heads(ImageFeatures(pooled=torch.zeros(2, 4), regions=maps.permute(0, 2, 3, 1)))[1]
    torch.testing.assert_close(heads.as_map(rows, (7, 7)), maps)
    third = maps[1].flatten()[12:16] if mixed else maps[1, :, 0, 3]
    torch.testing.assert_close(rows[1, 3], third)


# ------------------------------------------------------------------------------------------ sentences


def test_sentences_are_means_of_their_tokens():
    tokens = torch.randn(3, 6, 2, dtype=torch.float64)
    numbers = torch.tensor([[-1, 0, 0, 2, 2, -1], [-1, 5, -1, -1, -1, -1], [1, 0, 1, 0, 3, 4]])
    found = gather_sentences(tokens, numbers)
    wanted = [[[1, 2], [3, 4]], [[1]], [[1, 3], [0, 2], [4], [5]]]  # in the order of their numbers
    assert found.mask.sum(dim=1).tolist() == [2, 1, 4]
    rows = [tokens[n, part].mean(dim=0) for n, text in enumerate(wanted) for part in text]
    torch.testing.assert_close(found.packed, torch.stack(rows))
    padded = found.padded(found.packed)
    assert padded.shape == (3, 4, 2)
    assert (padded[~found.mask] == 0).all()
    torch.testing.assert_close(padded[found.mask], found.packed)
    values, there = found.at(padded, torch.tensor([[2, 1], [5, -1], [4, 9]]))
    assert there.tolist() == [[True, False], [True, False], [True, False]]
    torch.testing.assert_close(values[:, 0], torch.stack([padded[0, 1], padded[1, 0], padded[2, 3]]))
    assert (values[:, 1] == 0).all()


def test_sentences_beyond_the_most_are_dropped():
    tokens, numbers = torch.randn(2, 5, 3), torch.tensor([[0, 1, 1, 4, 7], [3, 3, -1, -1, -1]])
    all_of_them, some = gather_sentences(tokens, numbers), gather_sentences(tokens, numbers, most=2)
    assert some.mask.tolist() == [[True, True], [True, False]]
    torch.testing.assert_close(some.packed, all_of_them.packed[[0, 1, 4]])
    assert some.at(some.padded(some.packed), numbers)[1].tolist() == [
        [True] * 3 + [False] * 2,
        [True] * 2 + [False] * 3,
    ]


def test_a_text_without_sentences_is_refused():
    with pytest.raises(ValueError, match=r"texts \[1\] have no token in any sentence"):
        gather_sentences(torch.zeros(3, 2, 4), torch.tensor([[0, 0], [-1, -1], [-1, 0]]))


def test_sigmoid_attention_by_loops_and_its_pair_scores():
    attention = SentenceRegionAttention(4).double()
    regions, sentences = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found, scores = attention(regions, sentences, mask), attention.pair_scores(regions, sentences, mask)
    for b in range(2):
        z, s = regions[b], sentences[b][mask[b]]
        of_region = torch.sigmoid(attention.query1(z) @ attention.key2(s).T / 2)
        of_sentence = torch.sigmoid(attention.query2(s) @ attention.key1(z).T / 2)
        torch.testing.assert_close(found.of_region[b][:, mask[b]], of_region)
        torch.testing.assert_close(found.of_sentence[b][mask[b]], of_sentence)
        torch.testing.assert_close(found.told[b], of_region @ attention.value2(s))
        torch.testing.assert_close(found.seen[b][mask[b]], of_sentence @ attention.value1(z))
        torch.testing.assert_close(scores[b, b], (of_region.mean() + of_sentence.mean()) / 2)


def test_pair_scores_in_chunks(monkeypatch):
    attention, mask = SentenceRegionAttention(4), torch.ones(5, 2, dtype=torch.bool)
    regions, sentences = torch.randn(3, 6, 4), torch.randn(5, 2, 4)
    whole = attention.pair_scores(regions, sentences, mask)
    monkeypatch.setattr("gloria_core.objectives.prior.PAIRS_AT_ONCE", 3 * 6 * 2 * 2)
    torch.testing.assert_close(attention.pair_scores(regions, sentences, mask), whole)


def test_local_nce_of_texts_with_few_sentences():
    scale = torch.tensor(5.0)
    same = torch.eye(3)[None]
    alone = torch.tensor([[True, False, False]])
    assert local_nce(same, same, alone, scale) == 0
    wanted = -math.log(math.exp(5) / (math.exp(5) + 2))
    everyone = torch.ones(1, 3, dtype=torch.bool)
    assert local_nce(same, same, everyone, scale).item() == pytest.approx(wanted, rel=1e-5)
    both = local_nce(same.repeat(2, 1, 1), same.repeat(2, 1, 1), torch.cat([alone, everyone]), scale)
    assert both.item() == pytest.approx(wanted / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------ bank


def test_mixture_of_prototypes():
    bank, x = PrototypeBank(5, 3, temperature=0.5).eval().requires_grad_(False), torch.randn(4, 3)
    mixture, logits = bank(x)
    for row, wanted in zip(mixture, x, strict=True):
        weights = [math.exp(float(wanted @ e) / 0.5) for e in bank.prototypes]
        torch.testing.assert_close(
            row, sum(w * e for w, e in zip(weights, bank.prototypes, strict=True)) / sum(weights)
        )
    torch.testing.assert_close(logits, x @ bank.prototypes.T)


def test_noise_is_drawn_where_it_belongs_and_can_be_replaced():
    x = torch.randn(4, 3)
    quiet, loud = PrototypeBank(5, 3), PrototypeBank(5, 3, noisy_in_eval=True)
    assert torch.equal(quiet.eval()(x)[0], quiet(x)[0])
    assert not torch.equal(quiet.train()(x)[0], quiet(x)[0])
    assert not torch.equal(loud.eval()(x)[0], loud(x)[0])
    loud.noise = torch.zeros_like
    loud.load_state_dict(quiet.state_dict())
    assert torch.equal(loud(x)[0], quiet.eval()(x)[0])
    winner = torch.nn.functional.one_hot(torch.tensor([2, 0, 4, 4]), 5) * 1e4
    loud.noise = lambda logits: winner
    torch.testing.assert_close(loud(x)[0], loud.prototypes[[2, 0, 4, 4]])


def test_gumbel_noise_is_that_of_torch():
    bank, x = PrototypeBank(300, 3, temperature=0.7), torch.randn(200, 3)
    torch.manual_seed(3)
    wanted = torch.nn.functional.gumbel_softmax(bank.logits(x), tau=0.7) @ bank.prototypes
    torch.manual_seed(3)
    torch.testing.assert_close(bank.train()(x)[0], wanted)


def test_bank_stays_in_float32_under_autocast():
    bank = PrototypeBank(5, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixture, logits = bank(torch.randn(4, 3).bfloat16())
    assert mixture.dtype == logits.dtype == torch.float32


def test_temperature_falls_to_a_tenth():
    assert [decayed(0.9, share, "fixed") for share in (0.0, 1.0)] == [0.9, 0.9]
    assert [decayed(0.9, share, "linear") for share in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.495, 0.09])
    assert [decayed(0.9, share, "exp") for share in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.9 * 0.1**0.5, 0.09])


# ------------------------------------------------------------------------------------------ decoders


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (50, 70), (9, 9)])
def test_image_decoder_gives_the_size_asked_for(size):
    decoder = ImageDecoder(16).eval()
    grid = (max(1, size[0] // 32), max(1, size[1] // 32))
    with torch.no_grad():
        assert decoder(torch.randn(2, 16, *grid), torch.randn(2, 16, *grid), size=size).shape == (2, 1, *size)


def test_image_decoder_halves_its_channels_and_drops_only_the_image():
    decoder = ImageDecoder(768)
    assert [block[0].in_channels for block in decoder.blocks] == [1536, 768, 384, 192, 96]
    assert decoder.head.in_channels == 48
    decoder, seen = ImageDecoder(400), []
    decoder.blocks[0].register_forward_hook(lambda module, given, out: seen.append(given[0]))
    decoder(torch.ones(1, 400, 1, 1), torch.ones(1, 400, 1, 1), size=(32, 32))
    dropped = (seen[0].flatten(2) == 0).all(dim=2)[0]
    assert 140 < dropped[:400].sum() < 260
    assert not dropped[400:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_queries_see_later_queries_only_when_not_causal(causal):
    decoder = SentenceDecoder(16, n_queries=4, layers=2, causal=causal).eval()
    regions = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = decoder(regions)
        decoder.queries[:, 3] = torch.randn(16)  # a constant would vanish in the layer norm
        after = decoder(regions)
        elsewhere = decoder(regions * torch.tensor([1.0, -3.0])[:, None, None])
    assert torch.equal(before[:, :3], after[:, :3]) == causal
    assert not torch.allclose(before[:, 3], after[:, 3])
    assert torch.allclose(after[0], elsewhere[0], atol=1e-6)
    assert not torch.allclose(after[1], elsewhere[1], atol=1e-4)


def test_match_finds_the_permutation():
    targets = torch.randn(3, 6, 8)
    order = torch.stack([torch.randperm(6) for _ in range(3)])
    shuffled = targets.gather(1, order[..., None].expand(-1, -1, 8))
    assert torch.equal(match(shuffled + 0.01 * torch.randn_like(shuffled), targets), order)
    assert match(torch.full_like(targets, float("nan")), targets).shape == (3, 6)


def test_perfect_predictions_cost_nothing_unless_indexed_the_wrong_way(monkeypatch):
    decoder, targets = SentenceDecoder(8, n_queries=3, layers=1), torch.randn(1, 3, 8)
    written = targets[:, [1, 2, 0]]
    monkeypatch.setattr(decoder, "forward", lambda regions: written)
    right, aim = decoder.in_order_of(targets, torch.zeros(1, 2, 8))
    wrong, _ = decoder.in_order_of(targets, torch.zeros(1, 2, 8), inverse=False)
    assert torch.equal(right, aim)
    assert (wrong - aim).abs().mean() > 0.5


def test_missing_sentences_are_zero_targets(monkeypatch):
    decoder, targets = SentenceDecoder(8, n_queries=4, layers=1), torch.randn(1, 2, 8)
    written = torch.cat([torch.zeros(1, 2, 8), targets], dim=1)
    monkeypatch.setattr(decoder, "forward", lambda regions: written)
    found, aim = decoder.in_order_of(targets, torch.zeros(1, 2, 8))
    assert torch.equal(found, aim)
    assert torch.equal(aim[:, :2], targets)
