"""What a notebook records: the exact columns, only numbers that mean something, files that are whole."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import IPython
import numpy as np
import pandas as pd
import pytest

from gloria_core.study import record
from gloria_core.study.parameters import ParameterError
from gloria_core.study.record import COLUMNS, RecordError, start_run

PARAMETERS = {"objective": "gloria", "dataset": "phantom", "seed": 3, "epochs": 2}


@pytest.fixture
def run(tmp_path):
    return start_run(tmp_path / "07_zero_shot-gloria-s3-abc", notebook="07_zero_shot", parameters=PARAMETERS)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_csv(run):
    run.metric(
        task="zero_shot", target="macro", metric="auroc", value=np.float32(0.5), ci_low=0.25, ci_high=1, n=np.int64(8)
    )
    run.metric(task="zero_shot", target="Edema, left", metric="auroc", value=float("nan"), n=0, split="valid", seed=4)
    path = run.finish()
    assert path.read_text().splitlines()[0] == (
        "run_id,notebook,objective,dataset,task,label_fraction,seed,split,target,metric,value,ci_low,ci_high,n"
    )
    first, second = read(path)
    assert first == dict(
        zip(COLUMNS, [
            "07_zero_shot-gloria-s3-abc", "07_zero_shot", "gloria", "phantom", "zero_shot", "", "3", "test", "macro",
            "auroc", "0.5", "0.25", "1.0", "8",
        ], strict=True)
    )  # fmt: skip
    assert (second["target"], second["value"], second["n"], second["seed"]) == ("Edema, left", "nan", "0", "4")
    notes = json.loads((run.folder / "notes.json").read_text())
    assert notes["device"] == record.device_in_use()
    assert notes["peak_memory_mb"] > 10


def test_parameters_that_were_given_by_hand_are_checked(monkeypatch, tmp_path):
    """In a kernel the values in use must have the types of the notebook's file."""
    values = {"options": '{"n_patients": 20}', "seed": 0}
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=values))
    wanted = r"parameter 'options' is dict.*papermill -p.*-y 'options: \{\"n_patients\": 20\}'"
    with pytest.raises(ParameterError, match=wanted):
        start_run(tmp_path, notebook="01_data_preparation", parameters={})
    values["options"] = {}
    start_run(tmp_path, notebook="01_data_preparation", parameters={})


def test_runs_by_hand_with_other_settings_have_folders_of_their_own(monkeypatch, write_notebook, tmp_path):
    (tmp_path / "notebooks").mkdir()
    text = 'epochs: int = 2  # few\nout: str = ""  # by the runner'
    write_notebook(tmp_path / "notebooks", "02_pretraining", text)
    monkeypatch.chdir(tmp_path / "notebooks")
    values, folders = {"out": ""}, []
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=values))
    for epochs in (2, 3, 4, 3):
        values["epochs"] = epochs
        folders.append(start_run("", notebook="02_pretraining", parameters={}).folder.name)
    assert folders[0] == "02_pretraining" and folders[1] == folders[3] and len(set(folders)) == 3
    assert start_run(tmp_path / "mine", notebook="02_pretraining", parameters={}).folder == tmp_path / "mine"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "zeroshot"}, "zeroshot/macro/auroc: Input should be 'data'.*(task)"),
        ({"split": "dev"}, "Input should be 'train', 'valid'.*(split)"),
        ({"metric": "AUROC"}, "pattern.*(metric)"),
        ({"target": " "}, "pattern.*(target)"),
        ({"target": "two\nlines"}, "pattern.*(target)"),
        ({"value": None}, "Field required.*(value)"),
        ({"value": float("inf")}, "finite"),
        ({"value": "0.5"}, "valid number.*(value)"),
        ({"value": True}, "valid number.*(value)"),
        ({"value": float("nan")}, "number of cases n"),
        ({"n": 2.5}, "valid integer.*(n)"),
        ({"ci_low": 0.1}, "both"),
        ({"ci_low": 0.9, "ci_high": 0.1}, "upside down"),
        ({"label_fraction": 10}, "less than or equal to 1.*(label_fraction)"),
    ],
)
def test_refuses_what_means_nothing(run, changed, message):
    good = {"task": "zero_shot", "target": "macro", "metric": "auroc", "value": 0.5}
    with pytest.raises(RecordError, match=message):
        run.metric(**(good | changed))
    assert run.rows == []
    run.metric(**good)


def test_a_number_is_recorded_once(run, monkeypatch, tmp_path):
    number = {"task": "classification", "target": "macro", "metric": "auroc"}
    run.metric(**number, value=0.5, label_fraction=0.01)
    run.metric(**number, value=0.6, label_fraction=0.1)
    with pytest.raises(RecordError, match=r"recorded twice: 0.5 and 0.7"):
        run.metric(**number, value=0.7, label_fraction=0.01)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    playing = start_run("", notebook="04_finetune_classification", parameters={})
    assert playing.folder == tmp_path / "results" / "runs" / "interactive" / "04_finetune_classification"
    playing.metric(**number, value=0.5)
    playing.metric(**number, value=0.7)  # the cell was run again
    assert [row.value for row in playing.rows] == [0.7]


def test_a_whole_table(run):
    rows = pd.DataFrame(
        {
            "target": ["macro", "Edema"],
            "metric": "auroc",
            "value": [0.5, float("nan")],
            "n": [8, 0],
            "objective": ["imagenet", None],
            "ci_low": [0.1, None],
            "ci_high": [0.9, None],
            "why_undefined": ["", "only negative studies"],
        }
    )
    recorded = run.metrics(rows, task="classification", dataset=pd.Series(["nih", "rsna"]), label_fraction=0.01)
    assert set(recorded) == set(rows) - {"why_undefined"} | {"task", "dataset", "label_fraction"}
    first, second = read(run.finish())
    assert (first["objective"], first["ci_low"], first["n"], first["dataset"]) == ("imagenet", "0.1", "8", "nih")
    assert (second["objective"], second["ci_low"], second["value"], second["dataset"]) == ("gloria", "", "nan", "rsna")
    assert {row["task"] for row in (first, second)} == {"classification"} and first["label_fraction"] == "0.01"
    run.metrics(rows.assign(task="zero_shot"))  # the table names its task itself
    with pytest.raises(RecordError, match=r"Field required \(value\)"):
        run.metrics(pd.DataFrame({"target": ["macro"], "metric": "auroc", "score": 1.0}), task="zero_shot")


def test_figures_and_tables(run):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1])
    assert run.figure(figure, "loss") is figure
    content = (run.folder / "figures" / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)  # a notebook shows it once
    run.figure(figure, "again")
    assert (run.folder / "figures" / "again.png").read_bytes() == content
    table = pd.DataFrame({"a": [1]}, index=pd.Index(["x"], name="finding"))
    assert run.table(table, "scores") is table
    assert (run.folder / "tables" / "scores.csv").read_text() == "finding,a\nx,1\n"
    for bad in ("../out", "a/b", "", ".hidden"):
        with pytest.raises(RecordError, match="plain file name"):
            run.figure(figure, bad)


def test_parameters_must_be_single_values(tmp_path):
    run = start_run(tmp_path, notebook="04", parameters={"seed": [0, 1]})
    with pytest.raises(RecordError, match=r"valid integer.*\(seed\)"):
        run.metric(task="data", target="all", metric="studies", value=1)
