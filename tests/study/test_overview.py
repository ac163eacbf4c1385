"""The overview takes one number a task, and says who stands apart only where intervals do not touch."""

import pandas as pd
import pytest

from gloria_core.study.results import HEADLINES, headlines, separated, summary


def row(which=0, **changes):
    base = HEADLINES.iloc[which].to_dict() | {"dataset": "phantom"}
    base |= {"objective": "gloria", "label_fraction": float("nan"), "seed": 0}
    return base | {"value": 0.8, "ci_low": 0.7, "ci_high": 0.9, "n": 50} | changes


def frame(*rows):
    return pd.DataFrame(list(rows))


def test_only_headlines_of_the_test_split():
    rows = frame(row(1, label_fraction=0.1), row(), row(split="valid"), row(target="Edema"), row(dataset="nih not a=1"))
    assert headlines(rows)["task"].tolist() == ["zero_shot", "zero_shot", "classification"]
    assert summary(headlines(rows))["dataset"].tolist() == ["phantom", "nih not a=1", "phantom"]
    table = summary(headlines(frame(row(), row(seed=1, value=0.6))))
    assert table["mean"].tolist() == [pytest.approx(0.7)]
    assert headlines(frame(row(target="Edema"))).empty


def test_apart_only_where_intervals_do_not_touch():
    near, far = {"objective": "random", "ci_high": 0.7}, {"objective": "random", "ci_high": 0.69, "value": 0.6}
    assert separated(frame(row(), row(**near)))["apart"].tolist() == [False]
    found = separated(frame(row(), row(**far)))
    assert found["apart"].tolist() == [True]
    assert found.loc[0, ["ci_low", "ci_high", "random", "random_high"]].tolist() == [0.7, 0.9, 0.6, 0.69]
    for blank in ({"ci_low": float("nan")}, {}):  # where one side has no interval, nobody knows
        baseline = far if blank else far | {"ci_high": float("nan")}
        assert separated(frame(row(**blank), row(**baseline)))["apart"].isna().tolist() == [True]


def test_smallest_fraction_and_first_seed():
    random = {"objective": "random", "ci_high": 0.1}
    rows = [row(1, label_fraction=f, seed=s, value=f + s) for f in (0.01, 1.0) for s in (3, 1)]
    rows += [row(1, label_fraction=0.01, **random), row(1, label_fraction=1.0, **random)]
    found = separated(frame(*rows))
    assert found[["label_fraction", "value"]].to_numpy().tolist() == [[0.01, 1.01]]
    assert separated(frame(row())).empty  # no baseline, nothing to stand apart from
