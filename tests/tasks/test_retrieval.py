"""Protocols of retrieval: who asks, who answers, what is right, with and without duplicate texts."""

import numpy as np
import pandas as pd
import pytest

from gloria_core.data.reports import ReportError
from gloria_core.tasks.retrieval import (
    chance_rows,
    cosine,
    find_partners,
    matrix,
    normalised,
    pairing,
    precision_rows,
    recall_rows,
    report_texts,
    text_groups,
)

TEXTS = ["No effusion.", "Small effusion.", "no  effusion", "Edema."]
# images by texts; the image of row 0 prefers the copy of its text, which stands in row 2
SCORES = np.array([[0.7, 0.1, 0.8, 0.2], [0.5, 0.6, 0.5, 0.9], [0.6, 0.9, 0.6, 0.7], [0.1, 0.2, 0.3, 0.9]])


def ranks(direction, duplicates):
    found, asked = find_partners(matrix(SCORES), TEXTS, direction=direction, duplicates=duplicates, k=2)
    return found.rank.tolist(), asked.tolist(), found


def test_texts_are_the_same_whatever_their_dress():
    assert normalised(" No  EFFUSION;\n") == "no effusion"
    assert text_groups(TEXTS).tolist() == [0, 1, 0, 2]


def test_image_to_text_by_hand():
    # merged: candidates are rows 0, 1, 3; image 2 asks for the text of row 0
    assert ranks("image_to_text", "merged")[:2] == ([1, 2, 3, 1], [0, 1, 2, 3])
    assert ranks("image_to_text", "right")[:2] == ([1, 2, 3, 1], [0, 1, 2, 3])
    # wrong: for image 0 its own text is second; for image 2 its text ties with its copy
    assert ranks("image_to_text", "wrong")[:2] == ([2, 2, 3.5, 1], [0, 1, 2, 3])


def test_text_to_image_by_hand():
    # text 0: images 0 (0.7), 2 (0.6), 1 (0.5); both 0 and 2 are right when merged
    assert ranks("text_to_image", "merged")[:2] == ([1, 2, 1.5], [0, 1, 3])
    assert ranks("text_to_image", "right")[:2] == ([1, 2, 1, 1.5], [0, 1, 2, 3])
    assert ranks("text_to_image", "wrong")[:2] == ([1, 2, 2, 1.5], [0, 1, 2, 3])


def test_nearest_are_rows_of_the_studies():
    found = ranks("image_to_text", "merged")[2]
    assert found.nearest.tolist() == [[0, 3], [3, 1], [1, 3], [3, 1]]
    assert found.chance_recall(1).tolist() == pytest.approx([1 / 3] * 4)
    assert ranks("image_to_text", "right")[2].chance_recall(1).tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 2, 1 / 4])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="direction"):
        pairing(TEXTS, "image_to_image")
    with pytest.raises(ValueError, match="duplicates"):
        pairing(TEXTS, "image_to_text", "dropped")
    with pytest.raises(ValueError, match="one image and one text"):
        find_partners(matrix(SCORES[:, :3]), TEXTS)


def test_recall_rows_perfect_reversed_and_constant():
    n = 30
    eye, texts = np.eye(n), [f"word{i}" for i in range(n)]

    def rows(scores):
        found, _ = find_partners(matrix(scores), texts, k=1)
        return recall_rows(found, target="x", ks=(1, 5, 30), n_bootstrap=50).set_index("metric")

    perfect, reversed_, constant = rows(eye), rows(-eye), rows(np.ones((n, n)))
    assert "recall_at_30" not in perfect.index  # of 30 candidates, the first 30 hold everything
    assert perfect["value"].tolist() == [1, 1, 1, 1] and perfect.loc["recall_at_1", "ci_low"] == 1
    assert reversed_["value"].tolist() == [0, 0, n, n]
    for name in constant.index:
        assert constant.loc[name, "value"] == pytest.approx(constant.loc[name, "chance"])
    assert constant.loc["recall_at_5", "chance"] == pytest.approx(5 / 30)
    assert (perfect["n"] == n).all()


def test_random_embeddings_are_within_reach_of_chance():
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(400, 16)).astype(np.float32) for _ in range(2))
    found, _ = find_partners(cosine(images, texts), [f"text {i}" for i in range(400)], k=1)
    row = recall_rows(found, target="x", ks=(40,)).set_index("metric").loc["recall_at_40"]
    assert row["chance"] == pytest.approx(0.1)
    assert row["ci_low"] < 0.1 < row["ci_high"] and row["ci_high"] - row["ci_low"] < 0.08


def test_intervals_draw_whole_patients():
    n = 60
    scores, texts = np.eye(n), [f"word{i}" for i in range(n)]
    scores[: n // 2] *= -1
    found, _ = find_partners(matrix(scores), texts, k=1)
    alone = recall_rows(found, target="x", ks=(1,)).iloc[0]
    patients = recall_rows(found, target="x", ks=(1,), patients=np.arange(n) // 15).iloc[0]
    assert alone["value"] == patients["value"] == 0.5
    assert patients["ci_high"] - patients["ci_low"] > 2 * (alone["ci_high"] - alone["ci_low"])


def test_median_rank_is_the_median_and_its_interval_holds_it():
    n = 41
    scores = np.where(np.arange(n)[:, None] > np.arange(n), 1.0, 0.0) + 0.5 * np.eye(n)  # query i has rank i + 1
    found, _ = find_partners(matrix(scores), [f"w{i}" for i in range(n)], k=1)
    rows = recall_rows(found, target="x", ks=()).set_index("metric")
    assert rows.loc["median_rank", "value"] == 21 and rows.loc["mean_rank", "value"] == 21
    assert rows.loc["median_rank", "ci_low"] < 21 < rows.loc["median_rank", "ci_high"]
    even, _ = find_partners(matrix(scores[:40, :40]), [f"w{i}" for i in range(40)], k=1)
    assert recall_rows(even, target="x", ks=(), n_bootstrap=0).loc[0, "value"] == 20.5


def classes(names):
    return pd.DataFrame({label: [float(label in name) for name in names] for label in "AB"})


def test_precision_by_hand():
    scores = matrix(np.array([[0.9, 0.8, 0.7, 0.1], [0.1, 0.9, 0.8, 0.7]]))
    rows = precision_rows(scores, classes("AB"), classes("ABAB"), ks=(1, 3, 4), n_bootstrap=20)
    rows = rows.set_index(["metric", "target"])
    assert set(rows.index.get_level_values(0)) == {"precision_at_1", "precision_at_3"}  # 4 of 4 says nothing
    assert rows.loc[("precision_at_1", "A"), "value"] == 1 and rows.loc[("precision_at_3", "A"), "value"] == 2 / 3
    assert rows.loc[("precision_at_1", "B"), "value"] == 1 and rows.loc[("precision_at_3", "B"), "value"] == 2 / 3
    assert rows.loc[("precision_at_1", "macro"), "value"] == 1
    assert (rows["chance"] == 0.5).all()


def test_a_class_without_queries_is_undefined_and_left_out_of_the_macro():
    scores = matrix(np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]]))
    rows = precision_rows(scores, classes("AA"), classes("ABA"), ks=(1,), n_bootstrap=10).set_index("target")
    assert np.isnan(rows.loc["B", "value"]) and rows.loc["B", "n"] == 0
    assert rows.loc["macro", "value"] == 1 and rows.loc["macro", "chance"] == pytest.approx(2 / 3)


def test_own_patient_is_left_out_of_images_and_of_chance():
    names, patients = ["A", "A", "A", "B"], ["p", "p", "q", "r"]
    vectors = np.array([[1.0, 0], [1, 0.01], [0.9, 0.3], [0.99, 0.05]])
    scores = cosine(vectors, vectors)
    rows = precision_rows(scores, classes(names), classes(names), ks=(1,), own=(patients, patients), n_bootstrap=10)
    row = rows.set_index("target").loc["A"]
    # each A of patient p finds the B of r first; the A of q finds r, too
    assert row["value"] == 0 and row["n"] == 3
    assert row["chance"] == pytest.approx((1 / 2 + 1 / 2 + 2 / 3) / 3)


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match="every K"):
        precision_rows(matrix(np.ones((1, 2))), classes("A"), classes("AB"), ks=(5,))
    with pytest.raises(ValueError, match="same classes"):
        precision_rows(matrix(np.ones((1, 2))), classes("A"), classes("AB")[["B", "A"]])


def test_chance_rows_have_names_of_their_own():
    found, _ = find_partners(matrix(np.eye(3)), list("xyz"), k=1)
    rows = chance_rows(recall_rows(found, target="x", ks=(1,), n_bootstrap=5))
    assert rows["metric"].tolist() == ["recall_at_1_chance", "median_rank_chance", "mean_rank_chance"]
    assert rows["value"].tolist() == pytest.approx([1 / 3, 2, 2]) and rows["ci_low"].isna().all()


def test_report_texts():
    frame = pd.DataFrame({"study_id": ["a", "b"], "findings": ["One.", ""], "impression": ["Two.", "Three."]})
    assert report_texts(frame) == ["Two.", "Three."]
    assert report_texts(frame, "both") == ["One.\n\nTwo.", "Three."]
    with pytest.raises(ReportError, match=r"study_id b"):
        report_texts(frame, "findings")
    with pytest.raises(ValueError, match="section"):
        report_texts(frame, "history")
