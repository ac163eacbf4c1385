import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from gloria_core.tasks.metrics import (
    bootstrap_rows,
    metric_rows,
    ratio_of_sums,
    resamples,
)


def estimate(y, score, metric="auroc", **options):
    """The only row of one label."""
    tables = (pd.DataFrame({"y": np.asarray(part, dtype=float)}) for part in (y, score))
    return metric_rows(*tables, metrics=(metric,), **options).iloc[0]


def auroc(y, score):
    return estimate(y, score, n_bootstrap=0)["value"]


def test_limits_by_hand():
    assert auroc([0, 0, 1, 1], [1, 2, 3, 4]) == 1.0
    assert auroc([1, 1, 0, 0], [1, 2, 3, 4]) == 0.0
    assert auroc([0, 1, 0, 1], [5, 5, 5, 5]) == 0.5
    assert auroc([0, 1, 1], [1, 1, 2]) == 0.75  # one tie counts half, one pair is won
    assert estimate([0, 0, 1, 1], [1, 2, 3, 4], "auprc").value == 1.0
    assert estimate([1, 0, 0, 0], [0, 0, 0, 0], "auprc").value == 0.25  # a constant score has the prevalence


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scikit_learn(ties, seed):
    rng = np.random.default_rng(seed)
    y, score = rng.integers(0, 2, 200), rng.normal(size=200)
    score = (score + 0.5 * y).round(0 if ties else 12)
    assert auroc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
    assert estimate(y, score, "auprc").value == pytest.approx(average_precision_score(y, score), abs=1e-12)


def test_every_resample_equals_scikit_learn_on_the_drawn_rows():
    rng = np.random.default_rng(1)
    y, score = rng.integers(0, 2, 30), rng.integers(0, 6, 30).astype(float)
    counts = next(resamples(30, n_bootstrap=20, seed=3)).astype(int)
    drawn = [np.repeat(np.arange(30), c) for c in counts]
    for metric, reference in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        expected = np.percentile([reference(y[rows], score[rows]) for rows in drawn], [2.5, 97.5])
        found = estimate(y, score, metric, n_bootstrap=20, seed=3)
        assert (found.ci_low, found.ci_high) == pytest.approx(tuple(expected), abs=1e-9), metric


@pytest.mark.parametrize("y", [[], [1, 1, 1], [0, 0], [np.nan, np.nan]])
def test_empty_and_one_class_are_nan(y):
    found = estimate(y, np.arange(len(y)), n_bootstrap=10)
    assert np.isnan([found.value, found.ci_low, found.ci_high]).all()
    assert found.n == np.isfinite(np.asarray(y, dtype=float)).sum()
    assert np.isnan(estimate(y, np.arange(len(y)), "auprc").value)


def test_unknown_targets_are_left_out():
    found = estimate([0, np.nan, 1, 1], [0.1, 9.0, 0.2, 0.05], n_bootstrap=10)
    assert (found.value, found.n) == (0.5, 3)


@pytest.mark.parametrize(
    ("y", "score", "message"),
    [
        ([0, 1, 2], [0, 1, 2], "1, 0 or NaN"),
        ([0, 1, 1], [0, np.nan, 1], "NaN"),
        ([0, 1], [0, 1, 2], "2 rows of targets, 3 rows of scores"),
    ],
)
def test_bad_input_is_refused(y, score, message):
    with pytest.raises(ValueError, match=message):
        auroc(y, score)


def test_resamples_keep_patients_together_and_size():
    groups = np.repeat(list("abcde"), [1, 2, 3, 4, 5])
    counts = np.concatenate(list(resamples(15, groups=groups, n_bootstrap=50, seed=0)))
    for name in "abcde":
        assert (counts[:, groups == name] == counts[:, groups == name][:, :1]).all()
    # five groups are drawn each time
    first = [np.flatnonzero(groups == name)[0] for name in "abcde"]
    assert (counts[:, first].sum(axis=1) == 5).all()
    with pytest.raises(ValueError, match="group ids"):
        next(resamples(3, groups=["a"]))


def test_grouping_widens_the_interval_of_repeated_studies():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    score = y + rng.normal(size=60) * 1.5
    y10, score10, groups = np.repeat(y, 10), np.repeat(score, 10), np.repeat(np.arange(60), 10)
    alone, grouped = estimate(y10, score10), estimate(y10, score10, groups=groups)
    assert grouped.ci_high - grouped.ci_low > 2.5 * (alone.ci_high - alone.ci_low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(100):
        y = rng.integers(0, 2, 150)
        found = estimate(y, rng.normal(size=150), n_bootstrap=200, seed=trial)
        hits += found.ci_low <= 0.5 <= found.ci_high
    assert 88 <= hits <= 100


def _table(n=80, labels="abc", seed=0):
    rng = np.random.default_rng(seed)
    y = pd.DataFrame(rng.integers(0, 2, (n, len(labels))).astype(float), columns=list(labels))
    return y, y * 0.7 + rng.normal(size=(n, len(labels)))


def test_metric_rows_hold_labels_and_the_named_macro():
    y, scores = _table()
    rows = metric_rows(y, scores, macro=["a", "b"], metrics=("auroc", "auprc"), n_bootstrap=100)
    assert list(rows["target"]) == ["a", "a", "b", "b", "c", "c", "macro", "macro"]
    table = rows.set_index(["target", "metric"])
    assert table.loc[("macro", "auroc"), "value"] == pytest.approx(
        np.mean([roc_auc_score(y[k], scores[k]) for k in "ab"])
    )
    assert table.loc[("b", "auroc"), "ci_low"] == pytest.approx(estimate(y["b"], scores["b"], n_bootstrap=100).ci_low)
    assert table.loc[("a", "auroc"), "prevalence"] == pytest.approx(y["a"].mean())
    assert ((rows["ci_low"] < rows["value"]) & (rows["value"] < rows["ci_high"])).all()


def test_macro_interval_is_joint():
    """Two copies of one label: their mean varies as one of them does, not sqrt(2) less."""
    y, scores = _table(labels="a")
    rows = metric_rows(y.assign(b=y["a"]), scores.assign(b=scores["a"]), macro=["a", "b"]).set_index("target")
    assert rows.loc["macro", ["ci_low", "ci_high"]].tolist() == pytest.approx(
        rows.loc["a", ["ci_low", "ci_high"]].tolist()
    )


def test_macro_leaves_out_and_counts_undefined_labels():
    y, scores = _table()
    y["b"], scores["c"] = 0.0, np.nan
    rows = metric_rows(y, scores, macro=["a", "b", "c"], n_bootstrap=50).set_index("target")
    assert np.isnan(rows.loc["b", "value"]) and rows.loc["b", "note"] == "only negative studies"
    assert np.isnan(rows.loc["c", "value"]) and rows.loc["c", "note"] == "not scored"
    assert rows.loc["macro", "value"] == rows.loc["a", "value"]
    assert rows.loc["macro", "note"] == "mean over 1 of 3 labels"
    with pytest.raises(KeyError, match="'z'"):
        metric_rows(y, scores, macro=["z"])


def _means(scores, known, **options):
    statistic = ratio_of_sums(np.where(known, scores, 0.0), known)
    return bootstrap_rows(lambda w: statistic(w)[..., None], known, list("ab"), ["mean"], **options).set_index("target")


def test_bootstrap_rows_of_a_mean_by_hand(monkeypatch):
    monkeypatch.setattr("gloria_core.tasks.metrics.MIN_PATIENTS", 2)
    scores, known = (
        np.array([[1.0, 0.0], [0.0, 0.5], [0.5, 9.0]]),
        np.array([[True, True], [True, True], [True, False]]),
    )
    options = {"groups": ["p", "q", "q"], "n_bootstrap": 50, "seed": 2}
    rows = _means(scores, known, macro=["a", "b"], columns={"chance": np.array([0.1, 0.3])}, **options)
    assert rows["value"].tolist() == [0.5, 0.25, 0.375] and rows["n"].tolist() == [3, 2, 3]
    assert rows["chance"].tolist() == pytest.approx([0.1, 0.3, 0.2]) and rows.loc["macro", "note"].startswith(
        "mean over 2"
    )
    counts = np.concatenate(list(resamples(3, **options)))
    expected = np.percentile((counts @ scores[:, 0]) / counts.sum(axis=1), [2.5, 97.5])
    assert rows.loc["a", ["ci_low", "ci_high"]].tolist() == pytest.approx(expected.tolist())


def test_resamples_that_all_agree_are_named():
    y = np.repeat([0.0, 1.0], 20)
    perfect, noisy = (estimate(y, score) for score in (y, y + np.random.default_rng(0).normal(size=40)))
    assert (perfect.ci_low, perfect.ci_high, perfect.note) == (1.0, 1.0, "every resample gives this number")
    assert noisy.ci_low < noisy.ci_high and noisy.note == ""


@pytest.mark.parametrize(("patients", "known"), [(2, False), (3, True)])
def test_a_mean_over_few_patients_has_no_interval(patients, known):
    counted = np.ones((8, 2), dtype=bool)
    counted[patients:, 1] = False
    rows = _means(np.random.default_rng(0).random((8, 2)), counted, macro=["a", "b"], n_bootstrap=50)
    assert rows["value"].notna().all() and rows["n"].tolist() == [8, patients, 8]
    for target in ("b", "macro"):
        assert rows.loc[target, ["ci_low", "ci_high"]].notna().all() == known
        assert ("no interval: 2 of 3 needed patients" in rows.loc[target, "note"]) != known
    assert rows.loc["a", ["ci_low", "ci_high"]].notna().all()


@pytest.mark.parametrize("positive", [1, 0])
def test_fewer_than_five_patients_of_a_class_give_no_interval(positive):
    y, score, groups = np.full(40, 1.0 - positive), np.arange(40.0), np.arange(40) // 2
    y[:8] = positive  # eight studies of four patients
    few = estimate(y, score, groups=groups, n_bootstrap=50)
    assert np.isnan([few.ci_low, few.ci_high]).all() and few.note == "no interval: 4 of 5 needed patients of a class"
    y[8] = positive
    enough = estimate(y, score, groups=groups, n_bootstrap=50)
    assert np.isfinite([enough.ci_low, enough.ci_high]).all() and "no interval" not in enough.note


def test_a_resample_that_lacks_a_target_is_dropped_or_averaged_over_the_others(monkeypatch):
    monkeypatch.setattr("gloria_core.tasks.metrics.MIN_PATIENTS", 1)
    scores, known = (
        np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]),
        np.array([[True, True], [True, False], [True, False]]),
    )
    counts = np.concatenate(list(resamples(3, n_bootstrap=99)))
    mean, lacking = (counts @ scores[:, 0]) / counts.sum(axis=1), counts[:, 0] == 0
    dropped, kept = (
        _means(scores, known, macro=["a", "b"], n_bootstrap=99, skip_undefined=skip) for skip in (False, True)
    )
    assert dropped.loc["macro", "ci_high"] == pytest.approx(np.percentile(mean[~lacking] / 2, 97.5))
    assert kept.loc["macro", "ci_high"] == pytest.approx(np.percentile(np.where(lacking, mean, mean / 2), 97.5))
    with pytest.raises(KeyError, match="'z'"):
        _means(scores, known, macro=["z"])


def test_rows_count_samples_positives_and_patients():
    y, scores = _table(n=40)
    y.loc[:9, "b"] = np.nan
    groups = np.arange(40) // 2
    rows = metric_rows(y, scores, macro=["a", "b"], groups=groups, n_bootstrap=5).set_index("target")
    assert rows["n"].tolist() == [40, 30, 40, 40] and rows["patients"].tolist() == [20, 15, 20, 20]
    assert rows["positives"].tolist() == [*(y == 1).sum(), (y[["a", "b"]] == 1).any(axis=1).sum()]
    mean = bootstrap_rows(ratio_of_sums(np.ones((4, 1, 1)), np.ones((4, 1, 1))), np.ones((4, 1)), ["a"], ["mean"])
    assert list(mean.columns) == ["target", "metric", "value", "ci_low", "ci_high", "n", "patients", "note"]
