import numpy as np
import pandas as pd
import pytest

from gloria_core.data.splits import label_subset
from gloria_core.tasks.label_efficiency import LabelEfficiency


@pytest.fixture
def frame():
    """Two studies a patient, 600 studies; three fifths of them train."""
    patients = np.arange(600) // 2
    return pd.DataFrame(
        {
            "study_id": [f"s{i}" for i in range(600)],
            "patient_id": [f"p{i}" for i in patients],
            "split": np.array(["train", "train", "train", "valid", "test"])[patients % 5],
            "label_rank": np.random.default_rng(1).permutation(300)[patients] / 300,
        }
    )


@pytest.mark.parametrize("seed", [0, 1, 2, 7])
def test_subsets_are_nested_within_a_seed_and_keep_patients_whole(frame, seed):
    small, middle, whole = (label_subset(frame, p, seed) for p in (0.02, 0.1, 1.0))
    assert set(small.index) <= set(middle.index) <= set(whole.index)
    assert len(whole) == (frame["split"] == "train").sum()
    train = frame[frame["split"] == "train"]
    assert (train[train["patient_id"].isin(middle["patient_id"])].index == middle.index).all()
    assert 0.05 < len(middle) / len(whole) < 0.15


def test_small_subsets_of_different_seeds_do_not_overlap(frame):
    parts = [set(label_subset(frame, 0.05, seed).index) for seed in range(5)]
    assert len(set.union(*parts)) == sum(map(len, parts))


def run(protocol, frame):
    """Fits are the row numbers of the subset; a score is the number of test rows."""
    return protocol.run(
        frame,
        lambda train, subset: (subset, list(train)),
        targets=pd.DataFrame({"A": np.arange(len(frame)) % 2, "B": np.arange(len(frame)) % 4 == 0}),
        score=lambda fitted, rows: pd.DataFrame({"target": ["A", "macro"], "value": len(rows)}),
    )


def test_every_subset_is_fitted_once_and_numbered(frame):
    rows, fits = run(LabelEfficiency((0.1, 1.0), subsets=3, seed=2), frame)
    assert list(fits) == [(0.1, 0), (0.1, 1), (0.1, 2), (1.0, 0)]  # one subset at 100 %
    positives = rows[rows["target"] == "A"]["train_positives"].tolist()
    assert positives == [sum(row % 2 for row in train) for _, train in fits.values()]
    positives = rows[rows["target"] == "macro"]["train_positives"].tolist()
    assert positives == [sum(row % 2 or row % 4 == 0 for row in train) for _, train in fits.values()]
    rows = rows[rows["target"] == "A"]
    assert rows["seed"].tolist() == [6, 7, 8, 6] and set(rows["split"]) == {"test"} and "dataset" not in rows
    for (fraction, subset), (number, train) in fits.items():
        assert number == subset and train == list(label_subset(frame, fraction, subset).index)
    assert rows["n_train"].tolist() == [len(train) for _, train in fits.values()]
    first, _ = run(LabelEfficiency((0.1,), subsets=3, repeats=1, seed=2), frame)
    assert set(first["seed"]) == {6}
    assert run(LabelEfficiency(()), frame)[0].empty


def test_sizes_of_the_first_subsets(frame):
    targets = pd.DataFrame({"A": (frame["label_rank"] < 0.05).astype(float)})
    sizes, few = LabelEfficiency((0.1, 1.0)).sizes(frame, targets), label_subset(frame, 0.1)
    assert list(sizes.index) == ["10 %", "100 %"] and sizes.loc["100 %", "studies"] == (frame["split"] == "train").sum()
    assert sizes.loc["10 %"].tolist() == [len(few), len(few) / 2, targets.loc[few.index, "A"].sum()]


def test_every_test_set_is_scored(frame):
    frame = frame.set_axis(np.arange(len(frame))[::-1] + 7)
    kept = frame[frame.index % 3 == 0]  # of all splits; only its test studies count
    rows, fits = run(LabelEfficiency((0.1, 1.0), test_sets={"all": frame, "part": kept}), frame)
    rows = rows[rows["target"] == "A"]
    assert len(fits) == 2 and rows["dataset"].tolist() == ["all", "part"] * 2
    assert rows["value"].tolist() == [120, (kept["split"] == "test").sum()] * 2


def test_errors(frame):
    with pytest.raises(ValueError, match="fraction"):
        run(LabelEfficiency((1.1,)), frame)
    with pytest.warns(UserWarning, match=r"fraction 0\.01, subset 0 is left out: .* use a larger fraction"):
        assert list(run(LabelEfficiency((0.01, 1.0)), frame.assign(label_rank=0.5))[1]) == [(1.0, 0)]
    with pytest.raises(ValueError, match="no study to test on"):
        run(LabelEfficiency(), frame.assign(split="train"))
    with pytest.raises(ValueError, match="in 'none'"):
        run(LabelEfficiency(test_sets={"none": frame[:0]}), frame)
