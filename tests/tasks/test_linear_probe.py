import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from gloria_core.data.splits import label_subset
from gloria_core.tasks.classification.linear_probe import (
    FIXED_STRENGTH,
    STRENGTHS,
    fit_probe,
    linear_probe,
    mean_auroc,
)
from gloria_core.tasks.label_efficiency import LabelEfficiency


def _study(n=600, labels=2, seed=0, width=12):
    """Two studies a patient; label k is the sign of feature k plus noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, width)).astype(np.float32) * np.linspace(1, 50, width, dtype=np.float32)
    patients = np.arange(n) // 2
    frame = pd.DataFrame(
        {
            "study_id": [f"s{i}" for i in range(n)],
            "patient_id": [f"p{i}" for i in patients],
            "split": np.array(["train", "train", "train", "valid", "test"])[patients % 5],
            "label_rank": np.random.default_rng(1).permutation(n // 2)[patients] / (n // 2),
        }
    )
    for k in range(labels):
        frame[f"L{k}"] = (features[:, k] / features[:, k].std() + 0.3 * rng.normal(size=n) > 0).astype(float)
    return features, frame


def probe(features, frame, labels, *, metrics=("auroc",), **protocol):
    return linear_probe(features, frame, frame[labels], LabelEfficiency(**protocol), metrics=metrics)[0]


def test_probe_is_logistic_regression_on_standardised_features():
    features, frame = _study()
    targets = frame[["L0"]]
    fitted = fit_probe(features, targets, strength=0.1)
    scaled = (features - features.mean(0)) / features.std(0)
    reference = LogisticRegression(C=0.1, max_iter=500).fit(scaled, targets["L0"].astype(int))
    np.testing.assert_allclose(fitted.scores(features)["L0"], reference.decision_function(scaled), atol=1e-3)


def test_strength_is_the_best_on_validation():
    features, frame = _study(n=400, width=200, seed=3)
    rows, valid = frame.index[frame["split"] == "train"], frame.index[frame["split"] == "valid"]
    targets = frame[["L0", "L1"]]
    grid, validation = (1e-6, 1e-2, 1e3), (features[valid], targets.loc[valid])
    chosen = fit_probe(features[rows], targets.loc[rows], strength=grid, validation=validation)
    reached = [mean_auroc(fit_probe(features[rows], targets.loc[rows], strength=value), *validation) for value in grid]
    assert chosen.strength == grid[int(np.argmax(reached))]
    with pytest.raises(ValueError, match="validation"):
        fit_probe(features[rows], targets.loc[rows], strength=grid)


def test_constant_features_and_ignored_targets_are_no_trouble():
    features, frame = _study(n=100)
    features[:, 3] = 7.0
    targets = frame[["L0"]].copy()
    targets.iloc[:20] = np.nan
    fitted = fit_probe(features, targets, strength=1.0)
    assert np.isfinite(fitted.scores(features)).all(axis=None)
    other = fit_probe(features, targets.fillna(1.0), strength=1.0)
    assert not np.allclose(fitted.weights, other.weights)


def test_linear_probe_rows():
    features, frame = _study()
    both = ["L0", "L1"]
    rows = probe(features, frame, both, macro=both, fractions=(0.05, 1.0), subsets=2, n_bootstrap=50)
    assert len(rows) == 3 * (2 + 1)  # at 100 % all seeds have the same subset
    assert set(rows["split"]) == {"test"} and (rows["n"] == (frame["split"] == "test").sum()).all()
    macro = rows[rows["target"] == "macro"].set_index(["label_fraction", "seed"])["value"]
    assert macro[1.0, 0] > 0.93 and macro[1.0, 0] >= macro[0.05, 0] and macro[0.05, 0] != macro[0.05, 1]
    again = probe(features, frame, both, fractions=(0.05,), subsets=2, n_bootstrap=50, test_sets={"x": frame[300:]})
    assert set(again["dataset"]) == {"x"} and (again["n"] == 60).all()


def test_noise_features_give_chance():
    _, frame = _study(n=2000)
    noise = np.random.default_rng(9).normal(size=(2000, 8))
    rows = probe(noise, frame, ["L0"], fractions=(1.0,), n_bootstrap=200)
    assert rows.loc[0, "ci_low"] < 0.5 < rows.loc[0, "ci_high"]


def test_a_label_with_one_class_in_the_subset_is_noted_and_left_out_of_the_macro():
    features, frame = _study()
    frame.loc[label_subset(frame, 0.1).index, "L1"] = 0.0
    both = ["L0", "L1"]
    rows = probe(features, frame, both, macro=both, fractions=(0.1,), n_bootstrap=20).set_index("target")
    assert np.isnan(rows.loc["L1", "value"]) and rows.loc["L1", "n"] > 0
    assert rows.loc["L1", "note"].startswith("not fitted: 0 positive of")
    assert rows.loc["macro", "value"] == rows.loc["L0", "value"]
    assert rows.loc["macro", "note"] == "mean over 1 of 2 labels"


def test_no_label_can_be_fitted_at_all():
    features, frame = _study()
    rows = probe(features, frame.assign(L0=1.0), ["L0"], macro=["L0"], fractions=(0.1,), n_bootstrap=5)
    assert rows["value"].isna().all()


def test_probe_input_errors():
    features, frame = _study(n=100)
    with pytest.raises(ValueError, match="99 rows of features"):
        probe(features[:99], frame, ["L0"])
    with pytest.raises(ValueError, match="split 'test' is empty"):
        probe(features, frame.replace({"split": {"test": "train"}}), ["L0"])


def test_without_a_choice_on_validation_the_strength_is_fixed():
    features, frame = _study(n=200)
    one_class = frame.assign(L0=frame["L0"].mask(frame["split"] == "valid", 1.0))
    no_study = frame[frame["split"] != "valid"].reset_index(drop=True)
    for part, values in ((one_class, features), (no_study, features[(frame["split"] != "valid").to_numpy()])):
        rows = probe(values, part, ["L0"], fractions=(1.0,), n_bootstrap=0)
        assert set(rows["strength"]) == {FIXED_STRENGTH} and rows["value"].notna().all()
    rows, probes = linear_probe(features, frame, frame[["L0"]], LabelEfficiency((1.0,), n_bootstrap=0))
    assert set(rows["strength"]) == {probes[1.0, 0].strength} and set(rows["strength"]) <= set(STRENGTHS)
    scores = probes[1.0, 0].scores(features)
    assert (probes[1.0, 0].probabilities(features)["L0"] > 0.5).equals(scores["L0"] > 0)


def test_a_frame_whose_index_does_not_start_at_zero():
    features, frame = _study()
    shuffled = frame.set_axis(np.arange(len(frame))[::-1] + 7)
    one, other = (probe(features, f, ["L0"], fractions=(1.0,), n_bootstrap=5) for f in (frame, shuffled))
    pd.testing.assert_frame_equal(one, other)
