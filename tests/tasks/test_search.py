"""Exact search in blocks against naive loops over the full matrix, and ties against chance."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_precision

from gloria_core.tasks.retrieval import cosine, labels_at, matrix, none_of, reordered, search

BLOCKS = [(1, 1), (3, 7), (64, 5), (1024, 8192)]


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    queries, candidates = (rng.normal(size=(n, 8)).astype(np.float32) for n in (23, 31))
    return queries, candidates, rng.integers(0, 4, 23), rng.integers(0, 4, 31), unit(queries) @ unit(candidates).T


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_any_size_give_the_full_matrix(data, block):
    queries, candidates, ask, answer, full = data
    found = search(cosine(queries, candidates), k=6, query_group=ask, candidate_group=answer, block=block)
    order = np.argsort(-full, axis=1)
    np.testing.assert_array_equal(found.nearest, order[:, :6])
    np.testing.assert_allclose(found.scores, np.take_along_axis(full, order[:, :6], 1), atol=1e-6)
    for i in range(len(queries)):
        ranked = answer[order[i]] == ask[i]
        assert found.rank[i] == ranked.argmax() + 1
        assert found.right[i] == ranked.sum() and found.allowed[i] == len(candidates)
        for k in (1, 3, 5):
            expected = retrieval_hit_rate(torch.tensor(full[i]), torch.tensor(answer == ask[i]), top_k=k)
            assert found.recall(k)[i] == pytest.approx(float(expected))


@pytest.mark.parametrize("block", BLOCKS)
def test_precision_is_that_of_torchmetrics(data, block):
    queries, candidates, _, answer, full = data
    labels = (answer[:, None] == np.arange(4)).astype(float)
    shares = labels_at(cosine(queries, candidates), labels, [1, 5, 10], block=block)
    for i, (place, k), label in itertools.product(range(len(queries)), enumerate([1, 5, 10]), range(4)):
        expected = retrieval_precision(torch.tensor(full[i]), torch.tensor(answer == label), top_k=k)
        assert shares[place, i, label] == pytest.approx(float(expected), abs=1e-6)


def test_matrix_and_cosine_agree_and_can_be_turned(data):
    queries, candidates, ask, answer, full = data
    one = search(cosine(queries, candidates).turned(), k=3, query_group=answer, candidate_group=ask)
    other = search(matrix(full.T), k=3, query_group=answer, candidate_group=ask)
    np.testing.assert_array_equal(one.nearest, other.nearest)
    np.testing.assert_array_equal(one.rank, other.rank)
    part = cosine(queries, candidates).take([4, 2], [7, 0, 9])
    np.testing.assert_allclose(part.block(slice(0, 2), slice(0, 3)), full[[4, 2]][:, [7, 0, 9]], atol=1e-6)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_constant_embeddings_are_at_chance(value):
    same, rows = np.full((40, 512), value, dtype=np.float32), np.arange(40)
    found = search(cosine(same, same), k=3, query_group=rows, candidate_group=rows, block=(7, 9))
    np.testing.assert_allclose(found.rank, 20.5)
    for k in (1, 5, 10, 39):
        np.testing.assert_allclose(found.recall(k), k / 40)
        np.testing.assert_allclose(found.recall(k), found.chance_recall(k))
    np.testing.assert_allclose(found.chance_rank, 20.5)
    # candidates sorted by class: an order of convenience would give the first class everything
    labels = (rows[:, None] // 10 == np.arange(4)).astype(float)
    np.testing.assert_allclose(labels_at(cosine(same, same), labels, [5], block=(7, 9)), 0.25)


def test_ties_are_the_mean_over_all_orders():
    scores = np.array([[0.9, 0.5, 0.5, 0.5, 0.5, 0.1]])
    answer = np.array([1, 0, 1, 0, 1, 0])
    found = search(matrix(scores), k=2, query_group=np.array([0]), candidate_group=answer)
    orders = [[0, *middle, 5] for middle in itertools.permutations([1, 2, 3, 4])]
    ranks = np.array([1 + next(i for i, c in enumerate(order) if answer[c] == 0) for order in orders])
    assert found.rank[0] == pytest.approx(ranks.mean())
    for k in range(1, 7):
        assert found.recall(k)[0] == pytest.approx((ranks <= k).mean())
        share = np.mean([[answer[c] == 0 for c in order[:k]] for order in orders])
        assert labels_at(matrix(scores), (answer == 0)[:, None], [k])[0, 0, 0] == pytest.approx(share)


def test_rounding_within_the_margin_is_a_tie():
    scores = np.array([[0.5, 0.5 + 3e-8, 0.5 + 1e-3]])
    found = search(matrix(scores), k=1, query_group=np.array([0]), candidate_group=np.array([0, 1, 2]))
    assert (found.better[0], found.tied[0], found.level[0]) == (1, 1, 1)


def test_none_of_is_hypergeometric():
    items = [True, True, False, False, False]
    for drawn in range(6):
        draws = [not any(draw) for draw in itertools.combinations(items, drawn)]
        assert none_of(np.array([2]), np.array([5]), np.array([drawn]))[0] == pytest.approx(np.mean(draws))


@pytest.mark.parametrize("block", [(1, 1), (4, 3), (64, 64)])
def test_own_candidates_cannot_be_found(data, block):
    queries, _, ask, _, _ = data
    patients = np.arange(len(queries)) // 2
    full = unit(queries) @ unit(queries).T
    full[patients[:, None] == patients] = -np.inf
    found = search(
        cosine(queries, queries),
        k=3, query_group=ask, candidate_group=ask, query_own=patients, candidate_own=patients, block=block,
    )  # fmt: skip
    np.testing.assert_array_equal(found.nearest, np.argsort(-full, axis=1)[:, :3])
    for i in range(len(queries)):
        others = patients != patients[i]
        assert found.allowed[i] == others.sum() and found.right[i] == (others & (ask == ask[i])).sum()
        best = full[i][others & (ask == ask[i])].max()
        assert found.rank[i] == 1 + (full[i][others & (ask != ask[i])] > best).sum()
    shares = labels_at(
        cosine(queries, queries), (ask[:, None] == np.arange(4)), [3], query_own=patients, candidate_own=patients
    )
    expected = (ask[found.nearest][..., None] == np.arange(4)).mean(axis=1)
    np.testing.assert_allclose(shares[0], expected, atol=1e-6)


def test_no_tensor_grows_beyond_a_block():
    class Largest(TorchDispatchMode):
        cells = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.cells = max(self.cells, tensor.numel())
            return out

    vectors = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
    rows, scores = np.arange(3000), cosine(vectors, vectors)
    with Largest() as seen:
        search(scores, k=10, query_group=rows, candidate_group=rows, block=(64, 256))
        labels_at(scores, np.ones((3000, 2)), [10], block=(64, 256))
    assert 64 * 256 <= seen.cells <= 2 * 64 * 256 < 3000 * 3000  # topk holds the block beside its own output


def test_many_right_candidates_are_listed_piece_by_piece(monkeypatch):
    monkeypatch.setattr("gloria_core.tasks.retrieval._PAIRS", 50)
    rng = np.random.default_rng(1)
    full, ask, answer = rng.normal(size=(20, 40)), rng.integers(0, 2, 20), rng.integers(0, 2, 40)
    found = search(matrix(full), k=1, query_group=ask, candidate_group=answer)
    for i in range(20):
        assert found.rank[i] == 1 + (full[i] > full[i][answer == ask[i]].max()).sum()


def test_reordering_moves_within_the_shortlist_only():
    full = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.5, 0.5, 0.5, 0.5]])
    ask, answer = np.array([1, 3, 3]), np.arange(4)
    found = search(matrix(full), k=2, query_group=ask, candidate_group=answer)
    assert found.rank.tolist() == [2, 4, 2.5]
    fine = np.array([[0.1, 0.2], [0.1, 0.2], [0.3, 0.3]])
    again = reordered(found, fine, answer[found.nearest] == ask[:, None])
    assert again.nearest[:2].tolist() == [[1, 0], [1, 0]]
    assert again.rank[:2].tolist() == [1, 4]
    inside = 3 in found.nearest[2]
    assert again.rank[2] == (1.5 if inside else 3.5)  # the tied that were left out share the last two places
    assert again.recall(2)[2] == float(inside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 4}, "k is 4"),
        ({"block": (0, 5)}, "block"),
        ({"query_group": np.zeros(2)}, "both or none"),
        ({"query_group": np.zeros(3), "candidate_group": np.zeros(3)}, "3 and 3 numbers"),
        ({"query_group": np.array([0, 5]), "candidate_group": np.zeros(3)}, "query 1 has no right"),
    ],
)
def test_bad_questions_are_refused(change, message):
    scores = matrix(np.arange(6.0).reshape(2, 3))
    with pytest.raises(ValueError, match=message):
        search(scores, **{"k": 1, **change})


def test_bad_embeddings_are_refused():
    good = np.ones((2, 3))
    with pytest.raises(ValueError, match="candidate 1"):
        cosine(good, np.array([[1.0, 1, 1], [1, np.nan, 1]]))
    with pytest.raises(ValueError, match="must be"):
        cosine(good, np.ones((2, 4)))
    with pytest.raises(ValueError, match="nothing to search"):
        cosine(good, np.ones((0, 3)))
    with pytest.raises(ValueError, match="query 0"):
        matrix(np.array([[np.inf]]))
    with pytest.raises(ValueError, match="rows of labels"):
        labels_at(matrix(good), np.ones((2, 1)), [1])
