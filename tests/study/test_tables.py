"""Tables are made of finished, fresh runs only, and say what is missing."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from gloria_core.study.plan import load_study
from gloria_core.study.record import COLUMNS, start_run
from gloria_core.study.results import TableError, collect, confounds, paper_table, published, summary, wide, with_counts


@pytest.fixture
def finished(make_study):
    """A study whose runs all ended well, by hand and without a kernel; returns its plan."""
    plan = load_study(make_study())
    plan.write()
    for number, run in enumerate(plan):
        folder = plan.folder / run.run_id
        here = start_run(folder, notebook=run.notebook, parameters=run.parameters)
        here.metric(task="data", target="None", metric="count", value=number, n=8)
        here.finish()
        (folder / "run.json").write_text(json.dumps({"status": "ok", "fingerprint": run.fingerprint}))
    return plan


def test_collect(finished):
    rows = collect("tiny", results_root=finished.folder.parent)
    assert tuple(rows.columns) == COLUMNS
    assert rows["value"].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows["run_id"].tolist() == [run.run_id for run in finished]
    assert set(rows["target"]) == {"None"}  # a name, not a missing value
    assert rows.attrs["skipped"] == []


def test_a_run_without_numbers_leaves_the_others_numbers(finished):
    path = finished.folder / finished.runs[0].run_id / "metrics.csv"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    rows = collect("tiny", results_root=finished.folder.parent)
    assert rows["value"].tolist() == [1, 2, 3, 4, 5]
    assert all(rows[name].dtype.kind in "if" for name in ("value", "ci_low", "ci_high", "label_fraction", "n"))


def test_what_is_no_success_does_not_count(finished):
    folders = [finished.folder / run.run_id for run in finished]
    (folders[0] / "run.json").unlink()
    (folders[1] / "run.json").write_text(json.dumps({"status": "failed", "fingerprint": finished.runs[1].fingerprint}))
    (folders[2] / "run.json").write_text(json.dumps({"status": "ok", "fingerprint": "older"}))
    (folders[3] / "run.json").write_text('{"status": "o')
    (folders[4] / "metrics.csv").write_text("run_id,value\nx,1\n")
    (finished.folder / "02_pretraining-of-an-older-plan").mkdir()
    rows = collect("tiny", results_root=finished.folder.parent)
    assert rows["value"].tolist() == [5]
    reasons = [item["reason"] for item in rows.attrs["skipped"]]
    assert [item["run_id"] for item in rows.attrs["skipped"]] == [run.run_id for run in finished.runs[:5]]
    assert ["no run.json" in reasons[0], "failed" in reasons[1], "stale" in reasons[2]] == [True] * 3
    assert "no run.json" in reasons[3]
    assert "columns" in reasons[4]


def test_no_study(tmp_path):
    with pytest.raises(TableError, match="make study STUDY=quickstart"):
        collect("quickstart", results_root=tmp_path)


def rows_of(values, **columns):
    base = {"dataset": "chexpert", "task": "classification", "split": "test", "target": "macro", "metric": "auroc"}
    base |= {"objective": "gloria", "label_fraction": 0.01, "n": 100, "ci_low": float("nan"), "ci_high": float("nan")}
    return pd.DataFrame([base | columns | {"seed": seed, "value": value} for seed, value in enumerate(values)])


def test_summary_over_seeds():
    rows = pd.concat([rows_of([0.8, 0.9]), rows_of([0.7], objective="random", ci_low=0.6, ci_high=0.8)])
    gloria, baseline = summary(rows).to_dict("records")
    assert gloria["mean"] == pytest.approx(0.85)
    assert gloria["sd"] == pytest.approx(0.0707, abs=1e-4)
    assert (gloria["seeds"], pd.isna(gloria["ci_low"])) == (2, True)
    assert (baseline["seeds"], baseline["ci_low"], pd.isna(baseline["sd"])) == (1, 0.6, True)
    with pytest.raises(TableError, match="share a case and a seed"):
        summary(pd.concat([rows_of([0.8]), rows_of([0.9])]))


def test_an_undefined_number_is_not_a_seed():
    (row,) = summary(rows_of([0.8, float("nan")])).to_dict("records")
    assert (row["mean"], row["seeds"]) == (0.8, 1)


def test_wide():
    rows = pd.concat(
        [
            rows_of([0.8, 0.9]),
            rows_of([0.7], objective="random", ci_low=0.6, ci_high=0.8),
            rows_of([0.5], target="Edema"),
        ]
    )
    grid = wide(summary(rows), index=["objective"], columns=["target"], digits=2)
    assert grid.loc["gloria", "macro"] == "0.85 ± 0.07"
    assert grid.loc["random", "macro"] == "0.70 (0.60-0.80)"
    assert grid.loc["random", "Edema"] == "-" and grid["n"].tolist() == ["100", "100"]
    assert wide(summary(rows_of([0.8])), index=["objective"], columns=["target"])["macro"].tolist() == ["0.800 (-)"]
    with pytest.raises(TableError, match=r"several numbers in one cell.*target"):
        wide(summary(rows), index=["objective"], columns=["metric"])


def test_lines_carry_what_was_counted_and_why_a_number_is_missing():
    counted = [
        {"target": "all", "metric": "patients", "value": 60.0},
        {"target": "Edema", "metric": "positives", "value": 0.0},
        {"target": "Mass", "metric": "positives", "value": 7.0},
        {"target": "Mass", "metric": "positives", "value": 99.0, "split": "train"},
    ]
    data = pd.concat([rows_of([0.0], task="data", **row).assign(value=row["value"]) for row in counted])
    numbers = pd.concat([rows_of([float("nan")], target="Edema"), rows_of([0.8], target="Mass", n=90)])
    rows = with_counts(pd.concat([data, numbers], ignore_index=True))
    grid = wide(summary(rows[rows["task"] != "data"]), index=["target"], columns=["objective"])
    assert grid.loc["Mass"].tolist() == ["0.800 (-)", "90", "7", "60", "-"]
    assert grid.loc["Edema"].tolist() == ["-", "100", "0", "60", "auroc: no positive"]
    (empty,) = summary(rows_of([float("nan")], n=0)).to_dict("records")
    assert empty["note"] == "auroc: nothing to score"


def test_confounds_are_those_of_the_card_or_a_sentence(tmp_path, monkeypatch):
    assert confounds("nih").startswith("**Confounds")
    assert confounds("mine") == "It has no card."
    monkeypatch.setattr("gloria_core.study.results.repository_root", lambda: tmp_path)
    (tmp_path / "data_manifests").mkdir()
    (tmp_path / "data_manifests" / "mine.md").write_text(
        "# mine\n\n**Confounds.** One,\ntwo.\n\nMore.\n\n**Confounds again**"
    )
    assert confounds("mine") == "**Confounds.** One,\ntwo.\n\n**Confounds again**"
    (tmp_path / "data_manifests" / "mine.md").write_text("# mine")
    assert "says nothing of confounds" in confounds("mine")


def test_paper_table_keeps_the_marks():
    theirs = published()
    assert set(theirs["status"]) == {"read", "recalled"}
    rows = pd.concat([rows_of([0.8, 0.9]), rows_of([0.1], target="Edema"), rows_of([0.3], task="zero_shot")])
    table = paper_table(rows, theirs, "GLoRIA ICCV 2021 linear probe")
    ours = table[table["who"] == "ours"]
    assert ours[["method", "mark", "seeds"]].to_numpy().tolist() == [["gloria", "measured", 2]]
    assert ours["value"].item() == pytest.approx(85)  # the paper prints percent
    published_rows = table[table["who"] == "published"]
    assert len(published_rows) == (theirs["source_table"] == "GLoRIA ICCV 2021 linear probe").sum() > 0
    assert set(published_rows["mark"]) <= {"read", "recalled"}
    assert published_rows["source"].str.contains("quoted by").all()
    with pytest.raises(TableError, match="mean 'GLoRIA ICCV 2021 linear probe'"):
        paper_table(rows, theirs, "GLoRIA linear probe")
