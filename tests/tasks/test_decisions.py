"""Thresholds, decisions and calibration on arrays small enough to count by hand, and against scikit-learn."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.classification import BinaryCalibrationError

from gloria_core.tasks.classification.decisions import (
    DECISIONS,
    best_threshold,
    decision_rows,
    reliability,
    thresholds_of,
)

Y = [0, 0, 1, 1, 0, 1]
P = [0.1, 0.4, 0.35, 0.8, 0.2, 0.9]


def values(y, p, threshold, **options):
    rows = decision_rows(pd.DataFrame({"a": y}), pd.DataFrame({"a": p}), {"a": threshold}, n_bootstrap=0, **options)
    return rows.set_index("metric")["value"]


def test_threshold_has_the_highest_f1():
    best = best_threshold(Y, P)
    everything = {t: sk.f1_score(Y, np.array(P) >= t) for t in P}
    assert everything[best] == max(everything.values())
    assert best == 0.35
    assert best_threshold([0, 1], [0.2, 0.9]) == 0.9
    assert best_threshold([0, 1, np.nan], [0.2, 0.9, 0.95]) == 0.9


def test_one_class_has_no_threshold_and_no_decision():
    assert np.isnan(best_threshold([1, 1], [0.2, 0.4]))
    rows = decision_rows(pd.DataFrame({"a": [1, 0]}), pd.DataFrame({"a": [0.5, 0.5]}), {"a": np.nan}, n_bootstrap=5)
    assert rows["value"].isna().all() and (rows["note"] == "no threshold: validation does not have both classes").all()


def test_a_label_that_could_not_be_fitted_has_no_threshold():
    scores = pd.DataFrame({"a": P, "b": np.nan, "c": [np.nan, *P[1:]]})
    thresholds = thresholds_of(pd.DataFrame(dict.fromkeys("abc", Y)), scores)
    assert thresholds["a"] == best_threshold(Y, P) and np.isnan(thresholds["b"])
    assert thresholds["c"] == best_threshold(Y[1:], P[1:])


def test_by_hand():
    found = values(Y, P, 0.35)  # calls 0.4, 0.35, 0.8, 0.9 positive: one of them wrongly
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["sensitivity"] == 1.0
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx(5 / 6)
    assert found["f1"] == pytest.approx(6 / 7)


def test_against_other_libraries():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, 300), rng.random(300)
    found, called = values(y, p, 0.6), p >= 0.6
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, called))
    assert found["f1"] == pytest.approx(sk.f1_score(y, called))
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, called))
    # torchmetrics compares the confidence of the predicted class; ours is of the positive class: fold to compare
    high = np.clip(p, 0.5, 1)
    other = BinaryCalibrationError(n_bins=10, norm="l1")(torch.tensor(high), torch.tensor(y))
    assert values(y, high, 0.6)["ece"] == pytest.approx(float(other), abs=1e-6)


def test_limits():
    assert (values([0, 1, 1], [0.0, 1.0, 1.0], 0.5)[["accuracy", "f1", "sensitivity", "specificity"]] == 1).all()
    assert values([0, 1, 1], [0.0, 1.0, 1.0], 0.5)["ece"] == 0
    assert values([0, 1], [1.0, 0.0], 0.5)["ece"] == 1
    nothing_called = values([0, 1], [0.1, 0.2], 0.5)
    assert nothing_called["f1"] == 0 and nothing_called["specificity"] == 1
    no_positive = values([0, 0], [0.1, 0.9], 0.5)
    assert np.isnan(no_positive["f1"]) and np.isnan(no_positive["sensitivity"]) and no_positive["specificity"] == 0.5
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        values([0, 1], [-2.0, 3.0], 0.5)


def test_unknown_targets_take_no_part():
    with_unknown = values([*Y, np.nan], [*P, 0.99], 0.35)
    pd.testing.assert_series_equal(with_unknown, values(Y, P, 0.35))


def test_macro_interval_and_baseline():
    rng = np.random.default_rng(1)
    targets = pd.DataFrame(rng.integers(0, 2, (200, 2)), columns=["a", "b"])
    p = pd.DataFrame(np.clip(targets * 0.4 + rng.random((200, 2)) * 0.6, 0, 1), columns=["a", "b"])
    rows = decision_rows(targets, p, thresholds_of(targets, p), macro=["a", "b"], groups=np.arange(200) // 2)
    table = rows.set_index(["target", "metric"])
    for metric in DECISIONS:
        both = table.loc[[("a", metric), ("b", metric)], "value"]
        assert table.loc[("macro", metric), "value"] == pytest.approx(both.mean())
        assert table.loc[("a", metric), "ci_low"] <= both.iloc[0] <= table.loc[("a", metric), "ci_high"]
    share = targets["a"].mean()
    assert table.loc[("a", "accuracy"), "chance"] == pytest.approx(max(share, 1 - share))


def test_reliability_counts():
    found = reliability([0, 1, 1, np.nan], [0.05, 0.15, 0.12, 0.5])
    assert found["n"].tolist() == [1, 2]
    assert found["frequency"].tolist() == [0, 1]
    assert found["confidence"].tolist() == pytest.approx([0.05, 0.135])
    assert reliability([1], [1.0])["n"].tolist() == [1]
