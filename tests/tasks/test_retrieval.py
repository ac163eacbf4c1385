"""Retrieval against naive loops over the full matrix, ties against chance, identical reports, index and re-ranking."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_precision

from gloria_core.tasks import retrieval
from gloria_core.tasks.features import image_features, text_features
from gloria_core.tasks.retrieval import (
    Scores,
    SearchIndex,
    SearchIndexError,
    cosine,
    fingerprint,
    label_shares,
    left_out,
    load_index,
    precision_table,
    probability_of_none,
    rank_partners,
    recall_rows,
    recall_table,
    reordered,
    report_texts,
    rerank,
    text_groups,
    with_chance,
)
from gloria_core.tasks.zero_shot import similarities

TEXTS = ["No effusion.", "Small effusion.", "no  effusion", "Edema."]
# images by texts; the image of row 0 prefers the copy of its text, which stands in row 2
SCORES = np.array([[0.7, 0.1, 0.8, 0.2], [0.5, 0.6, 0.5, 0.9], [0.6, 0.9, 0.6, 0.7], [0.1, 0.2, 0.3, 0.9]])


def given(matrix):
    """Scores that are these numbers: products with unit vectors."""
    matrix = torch.tensor(np.asarray(matrix, dtype=np.float32))
    return Scores(matrix, torch.eye(matrix.shape[1]))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=(n, 8)).astype(np.float32) for n in (23, 31))
    return queries, candidates, rng.integers(0, 4, 23), rng.integers(0, 4, 31), unit(queries) @ unit(candidates).T


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_ranks_are_those_of_the_full_matrix(data, batch_size):
    queries, candidates, ask, _, full = data
    candidates, full, answer = candidates[:23], full[:, :23], ask
    options = {"duplicates": "right", "k": 6, "batch_size": batch_size}
    found = rank_partners(cosine(queries, candidates), [f"text {number}" for number in ask], **options)
    order = np.argsort(-full, axis=1)
    np.testing.assert_array_equal(found.nearest, order[:, :6])
    np.testing.assert_allclose(found.scores, np.take_along_axis(full, order[:, :6], 1), atol=1e-6)
    for i in range(len(queries)):
        ranked = answer[order[i]] == ask[i]
        assert (found.rank[i], found.relevant[i]) == (ranked.argmax() + 1, ranked.sum())
        for k in (1, 3, 5):
            expected = retrieval_hit_rate(torch.tensor(full[i]), torch.tensor(answer == ask[i]), top_k=k)
            assert found.recall(k)[i] == pytest.approx(float(expected))


@pytest.mark.parametrize("batch_size", [5, 64])
def test_precision_is_that_of_torchmetrics(data, batch_size, monkeypatch):
    queries, candidates, _, answer, full = data
    labels = (answer[:, None] == np.arange(4)).astype(float)
    monkeypatch.setattr(retrieval, "BATCH", batch_size)
    shares, overall = label_shares(cosine(queries, candidates), labels, [1, 5, 10])
    np.testing.assert_allclose(overall, np.tile(labels.mean(axis=0), (23, 1)))
    for i, (place, k), label in itertools.product(range(len(queries)), enumerate([1, 5, 10]), range(4)):
        expected = retrieval_precision(torch.tensor(full[i]), torch.tensor(answer == label), top_k=k)
        assert shares[i, label, place] == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_constant_embeddings_are_at_chance(value):
    same, rows = np.full((40, 512), value, dtype=np.float32), np.arange(40)
    found = rank_partners(cosine(same, same), distinct(40), k=3, batch_size=7)
    np.testing.assert_allclose(found.rank, 20.5)
    for k in (1, 5, 10, 39):
        np.testing.assert_allclose(found.recall(k), k / 40)
        np.testing.assert_allclose(found.recall(k), found.chance_recall(k))
    np.testing.assert_allclose(found.chance_rank, 20.5)
    # candidates sorted by class: an arbitrary order would give the first class everything
    labels = (rows[:, None] // 10 == np.arange(4)).astype(float)
    np.testing.assert_allclose(label_shares(cosine(same, same), labels, [5])[0], 0.25)


def test_ties_are_the_mean_over_all_orders():
    scores = given([[0.5, 0.9, 0.5, 0.5, 0.5, 0.1]] * 6)
    answer = np.array([0, 1, 1, 0, 1, 0])
    found = rank_partners(scores, list("abbaba"), duplicates="right", k=2)
    orders = [[1, *middle, 5] for middle in itertools.permutations([0, 2, 3, 4])]
    ranks = np.array([1 + next(i for i, c in enumerate(order) if answer[c] == 0) for order in orders])
    assert found.rank[0] == pytest.approx(ranks.mean())
    for k in range(1, 7):
        assert found.recall(k)[0] == pytest.approx((ranks <= k).mean())
        share = np.mean([[answer[c] == 0 for c in order[:k]] for order in orders])
        assert label_shares(scores, (answer == 0)[:, None], [k])[0][0, 0, 0] == pytest.approx(share)


def test_rounding_within_the_margin_is_a_tie():
    found = rank_partners(given([[0.5, 0.5 + 3e-8, 0.5 + 1e-3]] * 3), distinct(3), k=1)
    assert (found.above[0], found.tied_irrelevant[0], found.tied_relevant[0]) == (1, 1, 1)


def test_probability_of_none_is_hypergeometric():
    items = [True, True, False, False, False]
    for drawn in range(6):
        draws = [not any(draw) for draw in itertools.combinations(items, drawn)]
        assert probability_of_none(np.array([2]), np.array([5]), np.array([drawn]))[0] == pytest.approx(np.mean(draws))


@pytest.mark.parametrize("batch_size", [4, 64])
def test_images_of_the_same_patient_are_no_candidates(data, batch_size, monkeypatch):
    queries, _, ask, _, _ = data
    patients = np.arange(len(queries)) // 2
    full = unit(queries) @ unit(queries).T
    full[patients[:, None] == patients] = -np.inf
    labels = (ask[:, None] == np.arange(4)).astype(float)
    monkeypatch.setattr(retrieval, "BATCH", batch_size)
    shares, overall = label_shares(cosine(queries, queries), labels, [3], patients=patients)
    nearest = np.argsort(-full, axis=1)[:, :3]
    np.testing.assert_allclose(shares[:, :, 0], labels[nearest].mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(overall, [labels[patients != patient].mean(axis=0) for patient in patients])


def test_reordering_moves_within_the_shortlist_only():
    scores = given([[0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5], [0.9, 0.8, 0.7, 0.6]])
    found = rank_partners(scores, distinct(4), k=2)
    assert found.rank.tolist() == [4, 2, 2.5, 4]
    fine = np.array([[0.2, 0.1], [0.1, 0.2], [0.3, 0.3], [0.1, 0.2]], dtype=np.float32)
    again = reordered(found, fine, found.nearest == np.arange(4)[:, None])
    assert again.nearest[[1, 3]].tolist() == [[1, 0], [1, 0]]
    assert again.rank[[0, 1, 3]].tolist() == [4, 1, 4]
    inside = 2 in found.nearest[2]
    assert again.rank[2] == (1.5 if inside else 3.5)  # the tied that were left out share the last two places
    assert again.recall(2)[2] == float(inside)


def test_bad_embeddings_are_refused():
    good = np.ones((2, 3))
    with pytest.raises(ValueError, match="candidate 1"):
        cosine(good, np.array([[1.0, 1, 1], [1, np.nan, 1]]))
    with pytest.raises(ValueError, match="must be"):
        cosine(good, np.ones((2, 4)))
    with pytest.raises(ValueError, match="nothing to search"):
        cosine(good, np.ones((0, 3)))
    with pytest.raises(ValueError, match="fewer candidates of other patients"):
        label_shares(cosine(good, good), np.ones((2, 1)), [2], patients=["p", "q"])


def ranks(direction, duplicates):
    found = rank_partners(given(SCORES), TEXTS, direction=direction, duplicates=duplicates, k=2)
    return found.rank.tolist(), found.queries.tolist()


def test_texts_are_the_same_whatever_case_punctuation_and_blanks():
    assert text_groups([*TEXTS, " No  EFFUSION;\n"]).tolist() == [0, 1, 0, 2, 0]


def test_image_to_text_by_hand():
    # merged: candidates are rows 0, 1, 3; image 2 searches the text of row 0
    assert ranks("image_to_text", "merged") == ([1, 2, 3, 1], [0, 1, 2, 3])
    assert ranks("image_to_text", "right") == ([1, 2, 3, 1], [0, 1, 2, 3])
    # wrong: for image 0 its own text is second; for image 2 its text ties with its copy
    assert ranks("image_to_text", "wrong") == ([2, 2, 3.5, 1], [0, 1, 2, 3])


def test_text_to_image_by_hand():
    # text 0: images 0 (0.7), 2 (0.6), 1 (0.5); both 0 and 2 are relevant when merged
    assert ranks("text_to_image", "merged") == ([1, 2, 1.5], [0, 1, 3])
    assert ranks("text_to_image", "right") == ([1, 2, 1, 1.5], [0, 1, 2, 3])
    assert ranks("text_to_image", "wrong") == ([1, 2, 2, 1.5], [0, 1, 2, 3])


def test_nearest_are_rows_of_the_studies():
    merged, right = (rank_partners(given(SCORES), TEXTS, duplicates=rule, k=2) for rule in ("merged", "right"))
    assert merged.nearest.tolist() == [[0, 3], [3, 1], [1, 3], [3, 1]]
    assert merged.chance_recall(1).tolist() == pytest.approx([1 / 3] * 4)
    assert right.chance_recall(1).tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 2, 1 / 4])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="direction"):
        rank_partners(given(SCORES), TEXTS, direction="image_to_image")
    with pytest.raises(ValueError, match="duplicates"):
        rank_partners(given(SCORES), TEXTS, duplicates="dropped")
    with pytest.raises(ValueError, match="one image and one text"):
        rank_partners(given(SCORES[:, :3]), TEXTS)


def distinct(n):
    return [f"word{i}" for i in range(n)]


def test_recall_of_perfect_reversed_and_constant_scores():
    def rows(scores):
        found = rank_partners(given(scores), distinct(30), k=1)
        return recall_rows(found, target="x", ks=(1, 5, 30), n_bootstrap=50).set_index("metric")

    perfect, reversed_, constant = rows(np.eye(30)), rows(-np.eye(30)), rows(np.ones((30, 30)))
    assert "recall_at_30" not in perfect.index  # of 30 candidates, the first 30 contain everything
    assert perfect["value"].tolist() == [1, 1, 1, 1] and perfect.loc["recall_at_1", "ci_low"] == 1
    assert reversed_["value"].tolist() == [0, 0, 30, 30]
    for name in constant.index:
        assert constant.loc[name, "value"] == pytest.approx(constant.loc[name, "chance"])
    assert constant.loc["recall_at_5", "chance"] == pytest.approx(5 / 30)
    assert (perfect["n"] == 30).all()


def test_random_embeddings_are_within_reach_of_chance():
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(400, 16)).astype(np.float32) for _ in range(2))
    found = rank_partners(cosine(images, texts), distinct(400), k=1)
    row = recall_rows(found, target="x", ks=(40,)).set_index("metric").loc["recall_at_40"]
    assert row["chance"] == pytest.approx(0.1)
    assert row["ci_low"] < 0.1 < row["ci_high"] and row["ci_high"] - row["ci_low"] < 0.08


def test_intervals_resample_whole_patients():
    n = 60
    scores = np.eye(n)
    scores[: n // 2] *= -1
    found = rank_partners(given(scores), distinct(n), k=1)
    alone = recall_rows(found, target="x", ks=(1,)).iloc[0]
    patients = recall_rows(found, target="x", ks=(1,), patients=np.arange(n) // 15).iloc[0]
    assert alone["value"] == patients["value"] == 0.5
    assert patients["ci_high"] - patients["ci_low"] > 2 * (alone["ci_high"] - alone["ci_low"])


def test_patients_are_those_of_the_merged_queries(monkeypatch):
    monkeypatch.setattr("gloria_core.tasks.metrics.MIN_PATIENTS", 2)
    found = rank_partners(given(SCORES), TEXTS, direction="text_to_image", k=1)
    patients = np.array(["a", "b", "unused", "b"])
    rows = recall_rows(found, target="x", ks=(), patients=patients, n_bootstrap=200).set_index("metric")
    # texts 0, 1 and 3 have ranks 1, 2 and 1.5; the last two are one patient, drawn together
    assert (rows.loc["mean_rank", "ci_low"], rows.loc["mean_rank", "ci_high"]) == (1, 1.75)


def test_median_rank_is_the_median_and_its_interval_contains_it():
    n = 41
    scores = np.where(np.arange(n)[:, None] > np.arange(n), 1.0, 0.0) + 0.5 * np.eye(n)  # query i has rank i + 1
    rows = recall_rows(rank_partners(given(scores), distinct(n), k=1), target="x", ks=()).set_index("metric")
    assert rows.loc["median_rank", "value"] == 21 and rows.loc["mean_rank", "value"] == 21
    assert rows.loc["median_rank", "ci_low"] < 21 < rows.loc["median_rank", "ci_high"]
    even = rank_partners(given(scores[:40, :40]), distinct(40), k=1)
    assert recall_rows(even, target="x", ks=(), n_bootstrap=0).loc[0, "value"] == 20.5


def test_recall_table_has_both_directions_and_all_rules():
    table = recall_table(given(SCORES), TEXTS, ks=(1,), n_bootstrap=5).set_index(["target", "metric"])["value"]
    assert len(table) == 2 * 3 * 3
    assert table["image_to_text", "mean_rank"] == 7 / 4 and table["image_to_text", "mean_rank_copies_wrong"] == 8.5 / 4
    assert table["text_to_image", "mean_rank_copies_right"] == 5.5 / 4


def classes(names):
    return pd.DataFrame({label: [float(label in name) for name in names] for label in "AB"})


def precision(scores, names, **options):
    rows = precision_table({"image_to_text": scores}, classes(names), distinct(len(names)), n_bootstrap=20, **options)
    return rows.set_index(["metric", "target"])


def test_precision_by_hand():
    scores = given([[0.9, 0.8, 0.7, 0.1], [0.1, 0.9, 0.8, 0.7], [0.9, 0.8, 0.7, 0.1], [0.1, 0.9, 0.8, 0.7]])
    rows = precision(scores, "ABAB", ks=(1, 3, 4))
    assert set(rows.index.get_level_values(0)) == {"precision_at_1", "precision_at_3"}  # 4 of 4 says nothing
    assert rows.loc[("precision_at_1", "A"), "value"] == 1 and rows.loc[("precision_at_3", "A"), "value"] == 2 / 3
    assert rows.loc[("precision_at_1", "B"), "value"] == 1 and rows.loc[("precision_at_3", "B"), "value"] == 2 / 3
    assert rows.loc[("precision_at_1", "macro"), "value"] == 1
    assert (rows["chance"] == 0.5).all()


def test_a_class_without_queries_is_undefined_and_left_out_of_the_macro():
    rows = precision(given(np.eye(3)), ["A", "A", ""], ks=(1,)).loc["precision_at_1"]
    assert np.isnan(rows.loc["B", "value"]) and rows.loc["B", "n"] == 0
    assert rows.loc["B", "note"] == "no query with this finding"
    assert rows.loc["macro", "value"] == 1 and rows.loc["macro", "chance"] == pytest.approx(2 / 3)


def test_own_patient_is_left_out_of_images_and_of_chance():
    vectors = np.array([[1.0, 0], [1, 0.01], [0.9, 0.3], [0.99, 0.05]])
    targets, patients = classes("AAAB"), ["p", "p", "q", "r"]
    scores = {"image_to_image": cosine(vectors, vectors), "text_to_image": cosine(vectors[::-1], vectors)}
    table = precision_table(scores, targets, patients, ks=(1,), n_bootstrap=10)
    assert table["direction"].unique().tolist() == ["image_to_image", "text_to_image"]
    row = table.set_index(["metric", "target"]).loc[("precision_at_1_image_to_image", "A")]
    # each A of patient p finds the B of r first; the A of q finds r, too
    assert row["value"] == 0 and row["n"] == 3
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)
    assert precision_table(scores, targets, patients, ks=(5,)).empty  # every list would contain all candidates
    assert precision_table(scores, targets[[]], patients, ks=(1,)).empty


def test_chance_has_rows_of_its_own():
    found = rank_partners(given(np.eye(3)), list("xyz"), k=1)
    rows = with_chance(recall_rows(found, target="x", ks=(1,), n_bootstrap=5))
    assert rows["metric"][3:].tolist() == ["recall_at_1_chance", "median_rank_chance", "mean_rank_chance"]
    assert rows["value"][3:].tolist() == pytest.approx([1 / 3, 2, 2]) and rows["ci_low"][3:].isna().all()


def test_report_texts_are_those_of_studies_that_have_one():
    rows = {"study_id": list("abc"), "findings": ["One.", "", " "], "impression": ["Two.", "Three.", np.nan]}
    frame = pd.DataFrame(rows, index=[5, 6, 7])
    assert report_texts(frame).to_dict() == {5: "Two.", 6: "Three."}
    assert report_texts(frame, "both").to_dict() == {5: "One.\n\nTwo.", 6: "Three."}
    assert report_texts(frame, "findings").to_dict() == {5: "One."}


def test_a_list_as_long_as_all_candidates_is_named():
    assert left_out([1, 5, 10], 5) == "K = 5, 10 left out: with 5 candidates, such a list contains them all"
    assert left_out([1, 5], 6) == "6 candidates: every K is below that"


@pytest.fixture
def texts(model, frame):
    return text_features(model, report_texts(frame).tolist())


@pytest.fixture
def index(model, frame, texts):
    return SearchIndex.of(model, frame["study_id"], texts.texts, texts.embedding)


def test_an_index_comes_back_whole_and_finds_the_nearest(model, frame, cache, texts, index, tmp_path):
    path = index.save(tmp_path / "deep" / "reports.index")
    again = load_index(path)
    assert (again.ids, again.contents, again.model) == (tuple(frame["study_id"]), texts.texts, fingerprint(model))
    np.testing.assert_array_equal(again.embedding, texts.embedding)
    assert [p.name for p in path.parent.iterdir()] == ["reports.index"]
    features = image_features(model, frame, cache)
    table = again.nearest(model, features.embedding[:2], k=3)
    full = unit(features.embedding[:2]) @ unit(texts.embedding).T
    assert table["rank"].tolist() == [1, 2, 3] * 2 and table["query"].tolist() == [0] * 3 + [1] * 3
    np.testing.assert_allclose(table["cosine"].to_numpy().reshape(2, 3), -np.sort(-full, axis=1)[:, :3], atol=1e-6)
    assert table.loc[0, "content"] == texts.texts[int(full[0].argmax())]
    assert len(again.nearest(model, features.embedding[:1], k=9)) == len(again)
    with pytest.raises(ValueError, match="1 ids, 8 texts"):
        SearchIndex.of(model, ["a"], texts.texts, texts.embedding)


def test_another_model_is_refused(model, make_model, texts, index, tmp_path):
    path, other = index.save(tmp_path / "x"), make_model()
    assert fingerprint(other) == fingerprint(model)  # same seed, same weights: the same model
    with torch.no_grad():
        next(iter(other.objective.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(SearchIndexError, match="cannot be compared"):
        load_index(path).nearest(other, texts.embedding)


def test_the_fingerprint_depends_on_configuration_and_buffers(model, make_model):
    assert fingerprint(make_model(max_tokens=50)) != fingerprint(model)
    before = fingerprint(model)
    name, buffer = next((n, b) for n, b in model.named_buffers() if b.is_floating_point() and b.numel())
    buffer.add_(1)
    assert fingerprint(model) != before, name


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_damaged_files_are_refused(index, tmp_path, damage):
    path = index.save(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(SearchIndexError, match="damaged"):
        load_index(path)
    with pytest.raises(SearchIndexError, match="cannot be opened"):
        load_index(tmp_path / "absent")


@pytest.mark.parametrize("objective", ["gloria", "convirt"])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_reranking_everything_is_the_full_similarity(make_model, frame, cache, objective, direction):
    model = make_model(objective)
    texts = text_features(model, report_texts(frame).tolist())
    features = image_features(model, frame, cache)
    options = {"direction": direction, "k": 4 if direction == "image_to_text" else 8}  # four distinct texts
    coarse = rank_partners(cosine(features.embedding, texts.embedding), texts.texts, **options)
    found = rerank(model, frame, cache, texts, coarse, direction=direction, batch_size=3)
    full = given(similarities(model, frame, cache, texts.texts))
    expected = rank_partners(full, texts.texts, **options)
    np.testing.assert_allclose(found.rank, expected.rank)
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), atol=1e-5)
