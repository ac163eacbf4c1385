import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core.data.geometry import Geometry
from gloria_core.tasks.features import image_features, text_features
from gloria_core.tasks.grounding import score_map, score_phrases, summarise, upsample
from gloria_core.tasks.maps import maps, original_maps, phrase_map, words_of_span
from gloria_core.tasks.phrases import (
    Phrase,
    original_region,
    phrases_from_boxes,
    phrases_from_masks,
    region,
    whole_sentences,
)
from gloria_core.types import ImageFeatures

TEXTS = ["Small left effusion.", "Large right opacity, no effusion.", "opacity"]


@pytest.fixture
def pair(model, frame, cache):
    images = image_features(model, frame, cache, precision="float32", regions=True).images([0, 1, 2])
    return model.objective.eval(), images, text_features(model, TEXTS, precision="float32")


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
    with pytest.raises(ValueError, match="at least one word"):
        phrase_map(torch.zeros(3, 2, 2), [])


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


def test_phrase_map_is_the_mean_of_its_words():
    rows = torch.arange(12.0).view(3, 2, 2)
    torch.testing.assert_close(phrase_map(rows, [0, 2]), (rows[0] + rows[2]) / 2)


def test_upsampled_cells_lie_where_the_geometry_puts_them():
    values = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = upsample(values, 32, 32)
    assert found.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(found[1, 2], Geometry.fit(32, 32, 32).map_to_original(values[1, 2]), atol=1e-6)
    one = torch.zeros(1, 4, 4)
    one[0, 1, 2] = 1.0
    rows, columns = np.nonzero(upsample(one, 32, 32)[0].numpy() == upsample(one, 32, 32).max().item())
    assert rows.mean() == 1 * 8 + 3.5 and columns.mean() == 2 * 8 + 3.5


class _Square(torch.nn.Module):
    """An objective whose words all point at bright regions: what a perfect model would do on the made studies."""

    rows = type("Rows", (), {"unit": "word"})

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def global_embeddings(self, images, texts):
        return self.objective.global_embeddings(images, texts)

    def local_embeddings(self, images, texts):
        one = images.regions[..., :1]
        regions = torch.cat([one, torch.ones_like(one)], dim=-1)
        words = torch.tensor([1.0, 0.0]).expand(*texts.words.shape[:2], 2)
        return regions, words, texts.word_mask & ~texts.special_mask


@pytest.fixture
def bright(model):
    """The model with pixels as regions: 56 x 56 cells, first channel = brightness above middle gray."""

    def encode(pixels):
        return ImageFeatures(
            torch.zeros(len(pixels), model.image_encoder.pooled_dim), pixels[:, :1].permute(0, 2, 3, 1)
        )

    model.encode_images = encode
    model.objective = _Square(model.objective)
    return model


def test_scores_of_a_model_that_points_at_the_square(bright, frame, cache, root):
    phrases = phrases_from_masks(frame)
    assert [p.words for p in phrases] == ["left effusion", "right opacity"] * 2
    table = score_phrases(bright, frame, cache, root, phrases, kinds=("cosine",))
    means = table.groupby(["kind", "control"])[["cnr", "pointing_game", "mass_inside", "miou"]].mean()
    assert means.loc[("cosine", ""), "pointing_game"] == 1.0 and means.loc[("cosine", ""), "cnr"] > 2
    assert means.loc[("cosine", "inverted"), "cnr"] == pytest.approx(-means.loc[("cosine", ""), "cnr"], rel=1e-5)
    assert means.loc[("cosine", "inverted"), "pointing_game"] == 0.0
    uniform = table[table["control"] == "uniform"]
    assert (uniform["cnr"] == 0).all()
    np.testing.assert_allclose(
        uniform[["pointing_game", "mass_inside", "miou"]], uniform[["area"]].to_numpy() * [1, 1, 1]
    )
    # its words do not matter to this model, so other words point just as well
    for control in ("shuffled_text", "swapped_side"):
        assert means.loc[("cosine", control), "cnr"] == pytest.approx(means.loc[("cosine", ""), "cnr"])
    assert len(table) == 4 * (1 + 1 + 1 + 1 + 2)
    # s1 is 80 x 60 pixels: 4 columns of padding on either side of the crop are no part of the map
    mask = region(phrases[1], cache.geometry(phrases[1].image), root, 56)
    assert table[table["study_id"] == "s1"]["area"].iloc[0] == pytest.approx(mask.sum() / (56 * 48))
    assert set(table["area"]) == set(uniform["area"]) and uniform["area"].between(0.05, 0.2).all()


def test_original_maps_lie_on_the_file_and_know_what_was_not_seen(bright, frame, cache, root):
    phrases = phrases_from_masks(frame)[::-1]
    found = original_maps(bright, frame, cache, phrases, kinds=("cosine",))
    for phrase, by_kind in zip(phrases, found, strict=True):
        geometry = cache.geometry(phrase.image)
        truth = original_region(phrase, geometry, root)
        assert by_kind["cosine"].shape == truth.shape == (geometry.height, geometry.width)
        assert np.isnan(by_kind["cosine"][0]).all()  # the crop of 56 of 64 rows cuts the first four
        assert score_map(by_kind["cosine"], truth)["cnr"] > 2


def test_scores_do_not_depend_on_the_batch_and_cover_every_kind(model, frame, cache, root):
    phrases = phrases_from_masks(frame)
    one, other = (
        score_phrases(model, frame, cache, root, phrases, batch_size=size, precision="float32") for size in (1, 8)
    )
    key = ["study_id", "label", "kind", "control"]
    pd.testing.assert_frame_equal(
        one.sort_values(key, ignore_index=True), other.sort_values(key, ignore_index=True), atol=1e-3
    )
    assert set(one["kind"]) == {"attention", "word_softmax", "cosine", "prior"}
    assert set(one["control"]) == {"", "inverted", "shuffled_text", "swapped_side", "centre", "uniform"}
    assert not one.duplicated(key).any()


def test_boxes_and_undefined_phrases(make_model, frame, cache, root):
    model = make_model(max_tokens=3)
    phrases = phrases_from_boxes(frame.iloc[:2], {"Lung Opacity": "opacity"})
    table = score_phrases(model, frame, cache, root, phrases, kinds=("cosine",), precision="float32")
    assert table["note"].eq("").all() and table["area"].between(0.05, 0.2).all()
    table = score_phrases(model, frame, cache, root, phrases_from_masks(frame), kinds=("cosine",), precision="float32")
    upright = table[table["control"] == ""]
    assert upright["note"].eq("words beyond the token limit").all() and upright["cnr"].isna().all()
    assert summarise(table, n_bootstrap=5).query("kind == 'cosine' and control == ''").empty


def _scores(values, labels, patients, area=0.25):
    rows = {"cnr": values, "label": labels, "patient_id": patients, "kind": "cosine", "control": "", "area": area}
    return pd.DataFrame(rows)


def test_summary_is_the_mean_over_labels_of_means_over_phrases():
    scores = _scores([1.0, 2.0, 3.0, 10.0, np.nan], list("AAABB"), list("vwxyz"))
    rows = summarise(scores, metrics=("cnr",), n_bootstrap=200).set_index("target")
    assert rows["value"].to_dict() == {"A": 2.0, "B": 10.0, "macro": 6.0}
    assert rows["n"].to_dict() == {"A": 3, "B": 1, "macro": 4}
    assert rows.loc["A", "metric"] == "cnr_cosine" and rows.loc["macro", "chance"] == 0.25
    assert 1 <= rows.loc["A", "ci_low"] < 2 < rows.loc["A", "ci_high"] <= 3
    chosen = summarise(scores, metrics=("cnr",), macro=["B"], n_bootstrap=20).set_index("target")
    assert chosen.loc["macro", "value"] == 10.0


def test_summary_resamples_patients():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=20), 10)
    by_study = summarise(_scores(values, "A", np.arange(200).astype(str)), metrics=("cnr",)).iloc[0]
    by_patient = summarise(_scores(values, "A", np.repeat(np.arange(20), 10).astype(str)), metrics=("cnr",)).iloc[0]
    assert by_patient["ci_high"] - by_patient["ci_low"] > 2 * (by_study["ci_high"] - by_study["ci_low"])


def test_mean_dice_follows_from_the_overlaps():
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2] = True
    assert score_map(mask.astype(float), mask)["mdice"] == 1.0
    half = mask.astype(float)
    half[2] = 1.0  # three rows called, two right: IoU 2/3 at every threshold, Dice 4/5
    assert score_map(half, mask)["mdice"] == pytest.approx(0.8)
    assert np.isnan(score_map(half, np.zeros_like(mask))["mdice"])


def test_whole_sentences_grow_to_their_ends_and_keep_the_region():
    text = "Heart is large. Small left effusion, no edema. Stable."
    phrase = Phrase(0, "Pleural Effusion", "impression", text, ((22, 35),), "a.png", masks=("m.png",))
    (grown,) = whole_sentences([phrase])
    assert grown.words == "Small left effusion, no edema."
    assert (grown.masks, grown.label, grown.row) == (phrase.masks, phrase.label, phrase.row)
    across = Phrase(0, "Edema", "impression", text, ((9, 14), (47, 53)), "a.png")
    assert whole_sentences([across])[0].words == "Heart is large. … Stable."
