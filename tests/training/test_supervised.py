"""The training loop on a line that is fitted to points, where the best weights are known."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from gloria_core.training.supervised import FeatureStore, FitConfig, fit, seeded, shuffled_batches


def line(*, scores, metric="score", **options):
    """Fit y = w x with the given validation scores; returns (model, history, best step, weights at each validation)."""
    model, seen, scores = nn.Linear(1, 1, bias=False), [], iter(scores)
    nn.init.zeros_(model.weight)

    def validate():
        seen.append(float(model.weight.detach()))
        return next(scores)

    progress = options.pop("progress", None)
    config = FitConfig(**{"learning_rate": 0.01, "weight_decay": 0.0, "patience": 9, "precision": "float32"} | options)
    history, best = fit(
        model,
        ["s0", "s1", "s2", "s3"],
        itertools.cycle([np.array([1, 2]), np.array([3])]),
        lambda rows: ((model(torch.tensor(rows)[:, None].float())[:, 0] - 2 * torch.tensor(rows)) ** 2).mean(),
        validate,
        config,
        metric=metric,
        steps=6,
        validate_at=(2, 4, 6),
        progress=progress,
    )
    return model, history, best, seen


def test_the_best_weights_are_kept_and_the_loss_is_a_mean_over_studies():
    model, history, best, seen = line(scores=[0.1, 0.3, 0.2])
    assert history.columns.tolist() == ["step", "train_loss", "score"] and history["step"].tolist() == [2, 4, 6]
    assert best == 4 and model.weight.item() == seen[1] and not model.training
    w = 0.01  # Adam's first step is the rate itself
    assert history["train_loss"][0] == pytest.approx((2 * np.mean([4, 16]) + (3 * w - 6) ** 2) / 3)
    assert line(scores=[0.1, 0.3, 0.2], metric="valid_loss")[2] == 2


def test_patience_and_a_score_that_is_not_defined():
    assert len(line(scores=[0.3, 0.2, 0.1], patience=1)[1]) == 2
    assert line(scores=[float("nan")] * 3)[2] == 6


def test_schedule_and_progress():
    """The last step of a cosine has nearly no rate; a constant one goes on."""
    lines = []
    runs = {s: line(scores=[0, 1, 2], schedule=s, progress=lines.append)[3] for s in ("cosine", "constant")}
    assert runs["cosine"][2] - runs["cosine"][1] < 0.3 * (runs["constant"][2] - runs["constant"][1])
    assert len(lines) == 6 and lines[0].startswith("step 2 of 6: train_loss")


def test_a_loss_that_is_not_finite_names_the_studies():
    with pytest.raises(ValueError, match=r"not finite.*step 2, on studies s3"):
        line(scores=[], learning_rate=1e30)


def test_seeded_restores_the_state():
    state = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(3):
        assert torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("whole", [True, False])
def test_batches_are_shuffled_passes(whole):
    batches = list(itertools.islice(shuffled_batches([3, 4, 5, 6, 7], 4, np.random.default_rng(0), whole=whole), 6))
    assert [len(batch) for batch in batches] == ([4] * 6 if whole else [4, 1] * 3)
    stream = np.concatenate(batches)
    assert all(sorted(stream[first : first + 5]) == [3, 4, 5, 6, 7] for first in range(0, 15, 5))
    assert all(len(b) == 4 for b in itertools.islice(shuffled_batches([1], 4, np.random.default_rng(0), whole=True), 3))


def test_the_store_computes_once_and_answers_when_full():
    computed = []

    def encode(rows):  # four bytes a row
        computed.append(list(rows))
        return (torch.tensor(rows, dtype=torch.float32)[:, None],)

    store = FeatureStore(encode, limit=8)
    for rows in ([5, 6, 7], [7, 5], [9], [9, 9, 6]):
        assert store(rows)[0][:, 0].tolist() == rows
    assert len(store) == 2 and computed == [[5, 6, 7], [7], [9], [9]]
