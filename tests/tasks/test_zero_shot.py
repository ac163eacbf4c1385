import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from gloria_core.tasks.classification.label_policy import binary_targets
from gloria_core.tasks.features import image_batches, image_features, text_features
from gloria_core.tasks.zero_shot import (
    biovil_prompts,
    choose_scoring,
    combine,
    compare_scorings,
    evaluate,
    multiclass,
    multiclass_rows,
    no_x_prompts,
    prompt_list,
    scores,
    scorings_of,
    similarities,
    wording,
)

PROMPTS = {
    "Pleural Effusion": {"pos": ["left effusion", "small effusion"], "neg": ["no effusion"], "unc": ["maybe"]},
    "Lung Opacity": {"pos": ["opacity", "right opacity"], "neg": ["no opacity"]},
}
LISTS = {label: sides["pos"] for label, sides in PROMPTS.items()}
# columns: a1, a2, no a, b1
TEXTS = ["a1", "a2", "no a", "b1"]
SIMILARITY = pd.DataFrame([[1.0, 3.0, 2.0, 5.0], [4.0, 0.0, 4.0, 5.0], [2.0, 2.0, 0.0, 5.0]], columns=TEXTS)
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
    np.testing.assert_allclose(combine(SIMILARITY, BOTH, scoring=scoring), expected)


def test_contrast_takes_the_best_of_each_side():
    prompts = {"A": {"pos": ["a1", "a2"], "neg": ["no a", "b1"]}}
    np.testing.assert_allclose(combine(SIMILARITY, prompts, scoring="contrast")["A"], [-2, -1, -3])


def test_cohort_is_the_population_z_score_and_constant_columns_are_zero():
    found = combine(SIMILARITY, BOTH, normalise="cohort")
    a = np.array([3.0, 4.0, 2.0])
    np.testing.assert_allclose(found["A"], (a - 3) / np.sqrt(2 / 3))
    np.testing.assert_array_equal(found["B"], 0.0)
    with pytest.raises(ValueError, match="two studies"):
        combine(SIMILARITY[:1], BOTH, normalise="cohort")


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
        combine(SIMILARITY, prompts, **options)


def test_prompt_list_has_each_text_once():
    assert prompt_list(BOTH) == ["a1", "a2", "no a", "b1"]
    assert "maybe" not in prompt_list(PROMPTS)


@pytest.mark.parametrize("objective", ["gloria", "convirt"])
def test_similarities_are_the_objectives_own(make_model, frame, cache, objective, monkeypatch):
    model = make_model(objective)
    texts = prompt_list(PROMPTS)
    monkeypatch.setattr("gloria_core.tasks.zero_shot.TEXTS_AT_A_TIME", 2)
    found = similarities(model, frame, cache, texts, batch_size=3)
    _, images = next(image_batches(model, frame, cache, precision="float32"))
    with torch.no_grad():
        expected = model.eval().objective.similarity(images, text_features(model, texts, precision="float32").features)
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
    one, other = (scores(model, frame, cache, LISTS, normalise="cohort", batch_size=size) for size in (2, 8))
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_evaluate_perfect_scores_of_all_or_some_studies(frame):
    labels = ["Pleural Effusion", "Lung Opacity"]
    perfect = frame.set_index("study_id")[labels]
    rows = evaluate(perfect, frame, macro=labels, n_bootstrap=50).set_index("target")
    assert (rows["value"] == 1.0).all() and rows["ci_low"].isna().all()  # two positives
    assert rows.loc["Pleural Effusion", "prevalence"] == 0.25
    inverse = evaluate(-perfect, frame, macro=labels, n_bootstrap=50).set_index("target")
    assert inverse.loc["macro", "value"] == 0.0
    reversed_ = evaluate(perfect.iloc[::-1], frame, macro=labels, n_bootstrap=50).set_index("target")
    pd.testing.assert_frame_equal(reversed_, rows)  # studies are found by their name, not by their place
    several = evaluate(perfect, {"all": frame, "first": frame.iloc[:5]}, macro=labels, n_bootstrap=50)
    assert several.groupby("dataset", sort=False)["n"].first().to_dict() == {"all": 8, "first": 5}
    pd.testing.assert_frame_equal(
        several[several["dataset"] == "all"].drop(columns="dataset").set_index("target"), rows
    )
    with pytest.raises(ValueError, match=r"1 studies have no scores \(study_id s0\)"):
        evaluate(perfect.iloc[1:], frame)


def test_against_normal_subtracts_the_mean_normal_prompt():
    texts = ["effusion", "large effusion", "clear", "normal"]
    prompts = {"Pleural Effusion": {"pos": texts[:2], "neg": []}, "No Finding": {"pos": texts[2:], "neg": []}}
    similarity = pd.DataFrame([[0.2, 0.5, 0.1, 0.3], [0.9, 0.4, 0.8, 1.0]], columns=texts)
    found = combine(similarity, prompts, scoring="against_normal")
    np.testing.assert_allclose(found, [[0.5 - 0.2, 0.3], [0.9 - 0.9, 1.0]])
    with pytest.raises(ValueError, match="No Finding"):
        combine(similarity, {"Pleural Effusion": texts[:2]}, scoring="against_normal")


def test_pair_is_the_softmax_of_two_cosines():
    prompts = {"A": {"pos": ["a1"], "neg": ["no a"]}}
    found = combine(SIMILARITY, prompts, scoring="pair")["A"]
    expected = torch.tensor(SIMILARITY[["no a", "a1"]].to_numpy().tolist()).softmax(dim=1)[:, 1]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(found > 0.5, SIMILARITY["a1"] > SIMILARITY["no a"])
    # several prompts a side: of their means
    both = {"A": {"pos": ["a1", "a2"], "neg": ["no a"]}}
    np.testing.assert_allclose(combine(SIMILARITY, both, scoring="pair").loc[0, "A"], 0.5)
    with pytest.raises(ValueError, match="no negative prompts"):
        combine(SIMILARITY, {"A": ["a1"]}, scoring="pair")


def test_the_papers_sentences():
    assert no_x_prompts(["Pneumothorax", "No Finding"]) == {
        "Pneumothorax": {"pos": ["Pneumothorax"], "neg": ["No Pneumothorax"]}
    }
    pair = biovil_prompts(["Pneumonia"])["Pneumonia"]
    assert pair == {"pos": ["Findings suggesting pneumonia."], "neg": ["No evidence of pneumonia"]}


def test_global_similarity_is_the_cosine_of_the_embeddings(model, frame, cache):
    texts = ["left effusion", "no opacity"]
    found = similarities(model, frame, cache, texts, kind="global", batch_size=3)
    images = image_features(model, frame, cache, precision="float32").embedding
    words = text_features(model, texts, precision="float32").embedding
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (images, words)]
    np.testing.assert_allclose(found, unit[0] @ unit[1].T, atol=1e-5)
    with pytest.raises(ValueError, match="no similarity 'local'; available: objective, global"):
        similarities(model, frame, cache, texts, kind="local")


def test_prior_scoring_needs_its_objective(model, frame, cache):
    with pytest.raises(ValueError, match="no similarity 'prior'"):
        scores(model, frame, cache, {"A": ["left effusion"], "B": ["opacity"]}, scoring="prior")
    with pytest.raises(ValueError, match="one prompt a label"):
        scores(model, frame, cache, PROMPTS, scoring="prior")


def test_prior_scores_see_all_labels_at_once(model, frame, cache, monkeypatch):
    """Labels compete in PRIOR's softmax: they may not be split into chunks."""

    def competing(images, texts):
        return model.objective.similarity(images, texts).softmax(dim=1)

    monkeypatch.setattr(model.objective, "zero_shot_scores", competing, raising=False)
    prompts = {f"Finding{i}": [f"Finding{i} is observed"] for i in range(70)}
    found = scores(model, frame, cache, prompts, scoring="prior", batch_size=3)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    assert list(found.columns) == list(prompts)


def one_of(truth, answers, patients=None):
    names = [f"s{i}" for i in range(len(truth))]
    frame = pd.DataFrame({c: [float(t == c) for t in truth] for c in "ABC"})
    frame = frame.assign(study_id=names, patient_id=patients or names)
    values = pd.DataFrame({c: [float(a == c) for a in answers] for c in "ABC"}, index=names)
    return multiclass_rows(values, frame, n_bootstrap=200).set_index(["metric", "target"])


def test_multiclass_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.choice(list("ABC"), 60, p=[0.5, 0.3, 0.2])
    answers = np.where(rng.random(60) < 0.6, truth, rng.choice(list("ABC"), 60))
    rows = one_of(truth, answers)
    precision, recall, f1, count = precision_recall_fscore_support(truth, answers, labels=list("ABC"))
    for name, values in (("precision", precision), ("sensitivity", recall), ("f1", f1)):
        np.testing.assert_allclose([rows.loc[(name, c), "value"] for c in "ABC"], values)
        assert rows.loc[(name, "macro"), "value"] == pytest.approx(values.mean())
    assert [rows.loc[("f1", c), "n"] for c in "ABC"] == count.tolist()
    assert rows.loc[("accuracy", "macro"), "value"] == pytest.approx((truth == answers).mean())
    assert rows.loc[("kappa", "macro"), "value"] == pytest.approx(cohen_kappa_score(truth, answers))
    row = rows.loc[("accuracy", "macro")]
    assert row["ci_low"] < row["value"] < row["ci_high"] and row["n"] == 60


def test_multiclass_limits():
    perfect = one_of("AABBCC", "AABBCC")
    assert (perfect["value"] == 1).all() and (perfect["ci_low"].dropna() == 1).all()
    constant = one_of("AABBCC", "AAAAAA")
    assert constant.loc[("accuracy", "macro"), "value"] == constant.loc[("accuracy", "macro"), "chance"]
    assert constant.loc[("kappa", "macro"), "value"] == 0
    assert constant.loc[("precision", "B"), "value"] == 0 and constant.loc[("f1", "A"), "value"] == pytest.approx(0.5)
    # a class without studies has no recall, even where it is answered, and the macro is over the others
    absent = one_of("AABB", "AABC")
    assert (
        np.isnan(absent.loc[("sensitivity", "C"), "value"])
        and absent.loc[("f1", "C"), "note"] == "no study of this class"
    )
    assert absent.loc[("sensitivity", "macro"), "value"] == pytest.approx(0.75)
    # accuracy counts all studies: an empty class takes no interval from it
    assert np.isfinite(absent.loc[("accuracy", "macro"), "ci_low"]) and absent.loc[("accuracy", "macro"), "n"] == 4


def test_multiclass_refuses_studies_without_scores_or_without_one_label():
    frame = pd.DataFrame({"study_id": ["x", "y"], "patient_id": ["p", "q"], "A": [1, 0], "B": [0, 1]})
    values = pd.DataFrame({"A": [1.0, 0], "B": [0.0, 1]}, index=["x", "y"])
    with pytest.raises(ValueError, match="study_id y"):
        multiclass_rows(values.iloc[:1], frame)
    with pytest.raises(ValueError, match="no studies"):
        multiclass_rows(values, frame.iloc[:0])
    with pytest.raises(ValueError, match="study y has 2"):
        multiclass_rows(values, frame.assign(A=1))


def test_multiclass_is_each_protocol_on_the_studies_with_one_label(make_model, frame, cache):
    labels, options = ["Pleural Effusion", "Lung Opacity"], {"n_bootstrap": 20}
    gloria, prior = (
        multiclass(make_model(name), frame, cache, PROMPTS, labels, **options) for name in ("gloria", "prior")
    )
    assert set(gloria["protocol"]) == {"gloria", "cxr_clip"} and set(prior["protocol"]) == {
        *gloria["protocol"],
        "prior",
    }
    alone = frame[frame[labels].sum(axis=1) == 1]
    assert set(gloria.loc[gloria["metric"] == "accuracy_cxr_clip", "n"]) == {len(alone)}
    answers = scores(make_model(), alone, cache, LISTS, normalise="cohort")
    expected = multiclass_rows(answers, alone, n_bootstrap=20)
    pd.testing.assert_frame_equal(gloria[gloria["protocol"] == "gloria"].drop(columns="protocol"), expected)
    one_class = frame[frame["Lung Opacity"] == 1]
    for few in (frame.iloc[:0], one_class):  # no choice without studies of two classes
        assert multiclass(make_model(), few, cache, PROMPTS, labels).empty


def test_wording_and_scorings_are_those_of_single_calls(model, frame, cache):
    labels, targets = list(PROMPTS), binary_targets(frame.set_index("study_id"), list(PROMPTS))
    alone = wording(similarities(model, frame, cache, prompt_list(PROMPTS)), PROMPTS, targets)
    assert alone["prompt"].tolist() == [text for side in PROMPTS.values() for text in side["pos"]]
    one = scores(model, frame, cache, {labels[0]: [alone["prompt"][1]]})
    assert alone["auroc"][1] == evaluate(one, frame, n_bootstrap=0)["value"][0]
    table = compare_scorings(model, frame, cache, PROMPTS, targets, macro=labels)
    rules = ["max", "mean", "pair", "contrast", "pair, no X", "pair, BioViL"]
    assert list(table.columns) == [*rules, "n", "positives", "note"]
    assert table.loc["macro", ["n", "positives"]].tolist() == [8, 6]
    contrast = scores(model, frame, cache, PROMPTS, scoring="contrast")
    expected = evaluate(contrast, frame, macro=labels, n_bootstrap=0).set_index("target")["value"]
    pd.testing.assert_series_equal(table["contrast"], expected, check_names=False)
    assert list(compare_scorings(model, frame, cache, LISTS, targets).columns)[:2] == ["max", "mean"]


def test_targets_of_another_policy_are_those_that_are_judged(frame):
    labels = ["Pleural Effusion", "Lung Opacity"]
    perfect, blank = frame.set_index("study_id")[labels], frame.copy()
    blank.loc[blank.index[:2], labels] = np.nan
    known = binary_targets(blank.set_index("study_id"), labels, unmentioned="ignore")
    assert evaluate(perfect, blank, n_bootstrap=0)["n"].tolist() == [8, 8]
    assert evaluate(perfect, blank, known, n_bootstrap=0)["n"].tolist() == [6, 6]


def test_the_scoring_is_chosen_by_the_prompts_that_are_there():
    assert choose_scoring(PROMPTS)[0] == "contrast"
    assert choose_scoring(PROMPTS | {"No Finding": ["normal"]})[0] == "against_normal"
    assert choose_scoring(LISTS)[0] == "max"
    assert choose_scoring(LISTS, "mean") == ("mean", "scoring is mean: as given")
    assert scorings_of(PROMPTS | {"A": ["a"]}) == ["max", "mean"]
