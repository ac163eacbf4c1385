"""Scores of maps with their limits, phrases scored beside controls, and their summary."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core.tasks.grounding import (
    SCORES,
    centre_prior,
    examples,
    inverted,
    score_map,
    score_phrases,
    summarise,
)
from gloria_core.tasks.maps import original_maps
from gloria_core.tasks.phrases import phrases_from_masks, phrases_from_prompts, region
from gloria_core.types import ImageFeatures


def score(name, values, mask):
    return score_map(values, mask)[name]


cnr, pointing, mass_inside, miou, area = (
    partial(score, name) for name in ("cnr", "pointing_game", "mass_inside", "miou", "area")
)


def iou(values, mask, threshold):
    return score_map(values, mask, thresholds=(threshold,))["miou"]


MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:3] = True  # 4 of 20 pixels


def test_cnr_by_hand_and_its_sign():
    values = np.zeros((2, 2))
    values[0] = [3.0, 5.0]  # inside: mean 4, variance 1
    values[1] = [0.0, 2.0]  # outside: mean 1, variance 1
    mask = np.array([[True, True], [False, False]])
    assert cnr(values, mask) == pytest.approx(3 / np.sqrt(2))
    assert cnr(-values, mask) == pytest.approx(-3 / np.sqrt(2))
    assert cnr(inverted(values), mask) == pytest.approx(-3 / np.sqrt(2))
    assert cnr(7 * values + 11, mask) == pytest.approx(3 / np.sqrt(2))  # neither scale nor offset matter


def test_cnr_of_constants():
    assert cnr(np.full((4, 5), 0.1), MASK) == 0.0
    assert cnr(MASK.astype(float), MASK) == np.inf
    assert cnr(-MASK.astype(float), MASK) == -np.inf


def test_rounding_noise_is_no_signal():
    noisy = np.float32(0.7) + np.where(MASK, np.float32(6e-8), 0).astype(np.float32)
    assert np.ptp(noisy) > 0
    assert cnr(noisy, MASK) == 0.0
    assert pointing(noisy, MASK) == mass_inside(noisy, MASK) == pytest.approx(0.2)
    assert miou(noisy, MASK) == pytest.approx(0.2)
    assert cnr(np.where(MASK, 0.7001, 0.7) + np.arange(20).reshape(4, 5) * 1e-6, MASK) > 5


def test_pointing_and_its_ties():
    values = np.zeros((4, 5))
    assert pointing(values, MASK) == pytest.approx(4 / 20) == area(values, MASK)
    values[1, 1] = 1
    assert pointing(values, MASK) == 1.0
    values[0, 0] = 1
    assert pointing(values, MASK) == 0.5
    values[0, 0] = 2
    assert pointing(values, MASK) == 0.0


def test_mass():
    assert mass_inside(np.ones((4, 5)), MASK) == pytest.approx(0.2)
    values = np.where(MASK, 3.0, -100.0)
    assert mass_inside(values, MASK) == 1.0
    assert np.isnan(mass_inside(-np.ones((4, 5)), MASK))


def test_iou_by_hand():
    values = np.where(MASK, 1.0, 0.0)
    values[0, 0] = 0.25
    assert [iou(values, MASK, threshold) for threshold in (0.2, 0.3, 1.0)] == [4 / 5, 1.0, 1.0]
    assert [iou(5 * values - 2, MASK, threshold) for threshold in (0.2, 0.3)] == [4 / 5, 1.0]
    assert score_map(values, MASK, thresholds=(0.2, 0.3))["miou"] == pytest.approx(0.9)
    assert miou(np.full((4, 5), 3.0), MASK) == pytest.approx(0.2)
    assert iou(inverted(values), MASK, 0.8) == 0.0


@pytest.mark.parametrize("mask", [np.zeros((4, 5), dtype=bool), np.ones((4, 5), dtype=bool)])
def test_empty_and_full_masks_are_nan(mask):
    values = np.arange(20.0).reshape(4, 5)
    scores = score_map(values, mask)
    assert np.isnan([scores[name] for name in SCORES]).all() and scores["area"] == mask.mean()


def test_pixels_that_were_not_seen_do_not_count():
    values = np.arange(20.0).reshape(4, 5)
    cut = np.where(np.arange(5) < 4, values, np.nan)
    assert score_map(cut, MASK) == score_map(values[:, :4], MASK[:, :4])
    assert np.isnan(area(np.full((4, 5), np.nan), MASK))
    assert np.isnan(inverted(cut)[:, 4]).all() and np.nanmax(inverted(cut)) == np.nanmax(cut)


def test_centre_prior_peaks_at_the_centre_of_any_shape():
    prior = centre_prior(4, 6)
    np.testing.assert_array_equal(prior, prior[::-1, ::-1])
    assert prior.max() == prior[1, 2] == prior[2, 3]
    assert centre_prior(5, 5)[2, 2] == 1.0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="same pixels"):
        cnr(np.zeros((4, 4)), MASK)
    with pytest.raises(ValueError, match="boolean"):
        cnr(np.zeros((4, 5)), MASK.astype(int))


class _Square(torch.nn.Module):
    """An objective whose words all point at bright regions: what a perfect model would do on the made studies."""

    rows = type("Rows", (), {"unit": "word"})
    has_local_embeddings = True

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def embed_texts(self, texts):
        return self.objective.embed_texts(texts)

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
        truth = region(phrase, geometry, root)
        assert by_kind["cosine"].shape == truth.shape == (geometry.height, geometry.width)
        assert np.isnan(by_kind["cosine"][0]).all()  # the crop of 56 of 64 rows cuts the first four
        assert score_map(by_kind["cosine"], truth)["cnr"] > 2


def test_scores_do_not_depend_on_the_batch_and_cover_every_kind(model, frame, cache, root):
    phrases = phrases_from_masks(frame)
    one, other = (score_phrases(model, frame, cache, root, phrases, batch_size=size) for size in (1, 8))
    key = ["study_id", "label", "kind", "control"]
    pd.testing.assert_frame_equal(
        one.sort_values(key, ignore_index=True), other.sort_values(key, ignore_index=True), atol=1e-3
    )
    assert set(one["kind"]) == {"attention", "word_softmax", "cosine", "prior"}
    assert set(one["control"]) == {"", "inverted", "shuffled_text", "swapped_side", "centre", "uniform"}
    assert not one.duplicated(key).any()


def test_boxes_and_undefined_phrases(make_model, frame, cache, root):
    model = make_model(max_tokens=3)
    phrases = phrases_from_prompts(frame.iloc[:2], {"Lung Opacity": "opacity"})
    table = score_phrases(model, frame, cache, root, phrases, kinds=("cosine",))
    assert table["note"].eq("").all() and table["area"].between(0.05, 0.2).all()
    table = score_phrases(model, frame, cache, root, phrases_from_masks(frame), kinds=("cosine",))
    upright = table[table["control"] == ""]
    assert upright["note"].eq("words beyond the token limit").all() and upright["cnr"].isna().all()
    assert summarise(table, n_bootstrap=5).query("kind == 'cosine' and control == ''").empty


def _scores(values, labels, patients, area=0.25):
    rows = dict.fromkeys(SCORES, np.nan) | {"cnr": values, "label": labels, "patient_id": patients}
    rows |= {"kind": "cosine", "control": "", "area": area}
    return pd.DataFrame(rows)


def test_summary_is_the_mean_over_labels_of_means_over_phrases():
    scores = _scores([1.0, 2.0, 3.0, 10.0, np.nan], list("AAABB"), list("vwxyz"))
    rows = summarise(scores, n_bootstrap=200).set_index("target")
    assert rows["value"].to_dict() == {"A": 2.0, "B": 10.0, "macro": 6.0}
    assert rows["n"].to_dict() == {"A": 3, "B": 1, "macro": 4}
    assert summarise(scores, suffix="x", n_bootstrap=2)["metric"].unique().tolist() == ["cnr_cosine_x"]
    assert rows.loc["A", "metric"] == "cnr_cosine" and rows.loc["macro", "chance"] == 0.25
    assert 1 <= rows.loc["A", "ci_low"] < 2 < rows.loc["A", "ci_high"] <= 3
    assert rows.loc["B", "note"].startswith(
        "1 of its phrases have no finite score; no interval: 1 of 3 needed patients"
    )
    unscored = pd.concat([scores, _scores([np.nan, np.inf], list("CC"), list("rs"))])  # a label that no map could score
    more = summarise(unscored, n_bootstrap=200).set_index("target")
    assert np.isnan(more.loc["C", "value"]) and more.loc["C", ["n", "patients"]].tolist() == [0, 0]
    assert more.loc["C", "note"] == "2 of its phrases have no finite score"
    assert more.loc["macro", "value"] == 6.0 and more.loc["macro", "note"].startswith("mean over 2 of 3 labels")
    chosen = summarise(scores, macro=["B"], n_bootstrap=20).set_index("target")
    assert chosen.loc["macro", "value"] == 10.0


def test_summary_resamples_patients():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=20), 10)
    by_study = summarise(_scores(values, "A", np.arange(200).astype(str))).iloc[0]
    by_patient = summarise(_scores(values, "A", np.repeat(np.arange(20), 10).astype(str))).iloc[0]
    assert by_patient["ci_high"] - by_patient["ci_low"] > 2 * (by_study["ci_high"] - by_study["ci_low"])


def test_examples_are_the_worst_the_median_and_the_best():
    scores = _scores([3.0, 1.0, np.nan, 2.0], "A", "p")
    assert examples(scores)["cnr"].to_dict() == {"worst": 1.0, "median": 2.0, "best": 3.0}
    assert examples(scores.iloc[:0]).empty


def test_nothing_to_score_is_empty(model, frame, cache, root):
    rows = score_phrases(model, frame, cache, root, [])
    assert rows.empty and summarise(rows).empty


def test_mean_dice_follows_from_the_overlaps():
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2] = True
    assert score_map(mask.astype(float), mask)["mdice"] == 1.0
    half = mask.astype(float)
    half[2] = 1.0  # three rows called, two right: IoU 2/3 at every threshold, Dice 4/5
    assert score_map(half, mask)["mdice"] == pytest.approx(0.8)
    assert np.isnan(score_map(half, np.zeros_like(mask))["mdice"])
