import numpy as np
import pandas as pd
import pytest
import torch

from gloria_core.tasks.embedding import image_features, text_features
from gloria_core.tasks.zero_shot import combine, evaluate, exclusive_accuracy, prompt_list, scores, similarities

PROMPTS = {
    "Pleural Effusion": {"pos": ["left effusion", "small effusion"], "neg": ["no effusion"], "unc": ["maybe"]},
    "Lung Opacity": {"pos": ["opacity", "right opacity"], "neg": ["no opacity"]},
}
LISTS = {label: sides["pos"] for label, sides in PROMPTS.items()}
# columns: a1, a2, no a, b1
TEXTS = ["a1", "a2", "no a", "b1"]
SIMILARITY = np.array([[1.0, 3.0, 2.0, 5.0], [4.0, 0.0, 4.0, 5.0], [2.0, 2.0, 0.0, 5.0]])
BOTH = {"A": {"pos": ["a1", "a2"], "neg": ["no a"]}, "B": {"pos": ["b1"], "neg": ["no a"]}}


@pytest.mark.parametrize(
    ("scoring", "expected"),
    [
        ("max", [[3, 5], [4, 5], [2, 5]]),
        ("mean", [[2, 5], [2, 5], [2, 5]]),
        ("contrast", [[1, 3], [0, 1], [2, 5]]),
    ],
)
def test_combine_by_hand(scoring, expected):
    np.testing.assert_allclose(combine(SIMILARITY, TEXTS, BOTH, scoring=scoring), expected)


def test_contrast_takes_the_best_of_each_side():
    prompts = {"A": {"pos": ["a1", "a2"], "neg": ["no a", "b1"]}}
    np.testing.assert_allclose(combine(SIMILARITY, TEXTS, prompts, scoring="contrast")[:, 0], [-2, -1, -3])


def test_cohort_is_the_population_z_score_and_constant_columns_are_zero():
    found = combine(SIMILARITY, TEXTS, BOTH, normalise="cohort")
    a = np.array([3.0, 4.0, 2.0])
    np.testing.assert_allclose(found[:, 0], (a - 3) / np.sqrt(2 / 3))
    np.testing.assert_array_equal(found[:, 1], 0.0)
    with pytest.raises(ValueError, match="two studies"):
        combine(SIMILARITY[:1], TEXTS, BOTH, normalise="cohort")


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        ({"scoring": "best"}, BOTH, "scoring"),
        ({"normalise": "batch"}, BOTH, "normalise"),
        ({"scoring": "contrast"}, {"A": ["a1"]}, "no negative prompts"),
        ({}, {"A": []}, "no prompts"),
        ({}, {"A": "a1"}, "list of texts"),
    ],
)
def test_bad_options_are_refused(options, prompts, message):
    with pytest.raises(ValueError, match=message):
        combine(SIMILARITY, TEXTS, prompts, **options)


def test_prompt_list_has_each_text_once():
    assert prompt_list(BOTH) == ["a1", "a2", "no a", "b1"]
    assert "maybe" not in prompt_list(PROMPTS)


@pytest.mark.parametrize("objective", ["gloria", "convirt"])
def test_similarities_are_the_objectives_own(make_model, frame, cache, objective):
    model = make_model(objective)
    texts = prompt_list(PROMPTS)
    found = similarities(model, frame, cache, texts, batch_size=3, text_chunk=2, precision="float32")
    images = image_features(model, frame, cache, precision="float32", regions=True)
    with torch.no_grad():
        expected = model.eval().objective.similarity(
            images.images(slice(None)), text_features(model, texts, precision="float32").features
        )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_scores_encode_every_image_and_prompt_once(model, frame, cache, monkeypatch):
    seen = {"images": 0, "texts": 0}
    encode_images, encode_texts = model.encode_images, model.encode_texts

    def count_images(pixels):
        seen["images"] += len(pixels)
        return encode_images(pixels)

    def count_texts(texts):
        seen["texts"] += len(texts)
        return encode_texts(texts)

    monkeypatch.setattr(model, "encode_images", count_images)
    monkeypatch.setattr(model, "encode_texts", count_texts)
    found = scores(model, frame, cache, PROMPTS, scoring="contrast", normalise="cohort", batch_size=3)
    assert seen == {"images": 8, "texts": 6}
    assert list(found.columns) == list(PROMPTS) and list(found.index) == list(frame["study_id"])
    np.testing.assert_allclose(found.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(found.std(ddof=0), 1, atol=1e-6)


def test_cohort_scores_do_not_depend_on_the_batch(model, frame, cache):
    one, other = (
        scores(model, frame, cache, LISTS, normalise="cohort", batch_size=size, precision="float32") for size in (2, 8)
    )
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_evaluate_perfect_scores_and_refuses_another_order(frame):
    labels = ["Pleural Effusion", "Lung Opacity"]
    perfect = frame.set_index("study_id")[labels]
    rows = evaluate(perfect, frame, macro=labels, n_bootstrap=50).set_index("target")
    assert (rows["value"] == 1.0).all() and (rows["ci_low"] == 1.0).all()
    assert rows.loc["Pleural Effusion", "prevalence"] == 0.25
    inverse = evaluate(-perfect, frame, macro=labels, n_bootstrap=50).set_index("target")
    assert inverse.loc["macro", "value"] == 0.0
    with pytest.raises(ValueError, match="same studies"):
        evaluate(perfect.iloc[::-1], frame)


def test_exclusive_accuracy():
    frame = pd.DataFrame(
        {"study_id": list("wxyz"), "patient_id": list("wxyz"), "A": [1, 1, 0, np.nan], "B": [0, 0, 1, 1]}
    )
    scores = pd.DataFrame({"A": [2.0, 0.0, 0.0, 1.0], "B": [1.0, 1.0, 3.0, 1.0]}, index=list("wxyz"))
    rows = exclusive_accuracy(scores, frame, n_bootstrap=100).set_index("target")
    assert rows["value"].tolist() == [0.5, 0.5, 0.5]  # the tie of z goes to A and is wrong
    assert rows["n"].tolist() == [2, 2, 4]
    assert rows.loc["macro", "ci_low"] < 0.5 < rows.loc["macro", "ci_high"]
    with pytest.raises(ValueError, match=r"study w has 2"):
        exclusive_accuracy(scores, frame.assign(B=1))


def test_against_normal_subtracts_the_mean_normal_prompt():
    texts = ["effusion", "large effusion", "clear", "normal"]
    prompts = {"Pleural Effusion": {"pos": texts[:2], "neg": []}, "No Finding": {"pos": texts[2:], "neg": []}}
    similarity = np.array([[0.2, 0.5, 0.1, 0.3], [0.9, 0.4, 0.8, 1.0]])
    found = combine(similarity, texts, prompts, scoring="against_normal")
    np.testing.assert_allclose(found, [[0.5 - 0.2, 0.3], [0.9 - 0.9, 1.0]])
    with pytest.raises(ValueError, match="No Finding"):
        combine(similarity[:, :2], texts[:2], {"Pleural Effusion": texts[:2]}, scoring="against_normal")
