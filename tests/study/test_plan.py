"""A study file becomes runs: names that stay, files that are wired, mistakes that are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gloria_core.data import source_files
from gloria_core.study.driver import to_do
from gloria_core.study.parameters import ParameterError
from gloria_core.study.plan import StudyError, load_study, parse, study_file

HEAD = "study: tiny\ncommon: {dataset: phantom}\nstages:\n  - notebook: 01_data_preparation\n"


def test_wiring(make_study):
    plan = load_study(make_study())
    data, gloria, baseline, *zero_shot, tables = plan
    assert [run.notebook[:2] for run in plan] == ["01", "02", "02", "07", "07", "09"]
    assert gloria.parameters["manifest"] == f"results/runs/tiny/{data.run_id}/manifest.csv"
    assert gloria.needs == (data.run_id,)
    for run, maker in zip(zero_shot, (gloria, baseline), strict=True):
        assert run.parameters["objective"] == maker.parameters["objective"]
        assert run.parameters["checkpoint"] == f"results/runs/tiny/{maker.run_id}/checkpoints/best.pt"
        assert set(run.needs) == {data.run_id, maker.run_id}
        assert run.parameters["out"] == f"results/runs/tiny/{run.run_id}"
    assert set(tables.needs) == {run.run_id for run in plan if run is not tables}
    assert tables.parameters["study"] == "tiny"
    assert gloria.run_id.startswith("02_pretraining-gloria-s0-")
    assert len(gloria.run_id.rsplit("-", 1)[1]) == 8


def test_a_run_id_is_the_same_on_every_machine(make_study, tmp_path):
    here = load_study(make_study())
    elsewhere = tmp_path / "another machine"
    shutil.copytree(tmp_path / "notebooks", elsewhere / "notebooks")
    there = load_study(elsewhere / "notebooks" / "studies" / "tiny.yaml")
    assert [(run.run_id, run.fingerprint) for run in here] == [(run.run_id, run.fingerprint) for run in there]


def test_a_parameter_changes_its_run_and_those_after_it(make_study):
    file = make_study()
    before = load_study(file)
    stage = "grid: {objective: [gloria, random]}\n  - notebook: 07"
    file.write_text(file.read_text().replace(stage, "parameters: {epochs: 3}\n    " + stage))
    after = load_study(file)
    same = {run.run_id for run in before} & {run.run_id for run in after}
    assert same == {before.runs[0].run_id}
    file.write_text(file.read_text().replace("epochs: 3", "epochs: 2"))  # the default, spelled out
    assert [run.run_id for run in load_study(file)] == [run.run_id for run in before]


def test_fingerprint_follows_code_not_prose(make_study):
    file = make_study()
    before = load_study(file)
    notebook = file.parents[1] / "02_pretraining.ipynb"
    content = json.loads(notebook.read_text())
    content["cells"][0]["source"] = "# A better question?"
    notebook.write_text(json.dumps(content))
    assert [run.fingerprint for run in load_study(file)] == [run.fingerprint for run in before]
    content["cells"][-1]["source"] += "\n1 + 1"
    notebook.write_text(json.dumps(content))
    after = load_study(file)
    assert [run.run_id for run in after] == [run.run_id for run in before]
    changed = [old.fingerprint != new.fingerprint for old, new in zip(before, after, strict=True)]
    assert changed == [False, True, True, True, True, True]


def test_overrides_and_data_root(make_study, tmp_path):
    file = make_study()
    plan = load_study(file, overrides={"epochs": 1})
    assert {run.parameters.get("epochs") for run in plan} == {1, None}
    with pytest.raises(ParameterError, match=r"override parameter 'epoch'.*mean 'epochs'"):
        load_study(file, overrides={"epoch": 1})
    assert load_study(file, data_root="/radiographs").runs[0].parameters["data_root"] == ""  # the phantom is simulated
    file.write_text(file.read_text().replace("dataset: phantom", "dataset: nih"))
    filled = load_study(file, data_root=str(tmp_path))
    assert filled.runs[0].parameters["data_root"] == str(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    assert load_study(file, data_root=str(copy)).runs[0].run_id == filled.runs[0].run_id  # a place is no identity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: tiny\nstage: []\n", "unknown key 'stage' for the study. Did you mean 'stages'"),
        ("study: tiny\nstages: []\n", "`stages`: List should have at least 1"),
        ("study: tiny\nstages: {a: b}\n", "`stages`: Input should be a valid list"),
        ("study: other\nstages: [{notebook: 01_data_preparation}]\n", "must be the file's name, 'tiny'"),
        ("study: tiny\nstudy: tiny\n", "line 2: found duplicate key .study."),
        ("study: [tiny\n", "tiny.yaml: line 2"),
        ("- a\n", "Input should be a valid dictionary"),
        (HEAD + "  - {notebook: 02_pretrainin}\n", "unknown notebook '02_pretrainin'.*mean '02_pretraining'"),
        (
            HEAD + "  - {notebook: 02_pretraining, params: {}}\n",
            "unknown key 'params' for stage 2.*It has: .*parameters",
        ),
        (HEAD + "  - {parameters: {}}\n", "stage 2, `notebook`: Field required"),
        (
            HEAD + "  - {notebook: 02_pretraining, parameters: {epoch: 3}}\n",
            "unknown parameter 'epoch'.*mean 'epochs'",
        ),
        (HEAD + "  - {notebook: 02_pretraining, parameters: {epochs: true}}\n", "is int, not True"),
        (HEAD + "  - {notebook: 02_pretraining, parameters: {out: here}}\n", "filled in by the runner"),
        (HEAD + "  - {notebook: 02_pretraining, grid: {seed: 3}}\n", "stage 2, `seed`: Input should be a valid list"),
        (HEAD + "  - {notebook: 02_pretraining, grid: {seed: [3, 3]}}\n", "must be a list of different values"),
        (HEAD + "  - {notebook: 02_pretraining, grid: {seed: [1]}, parameters: {seed: 1}}\n", "in one of them"),
        (
            HEAD + "  - {notebook: 02_pretraining, threads: 0}\n",
            "stage 2, `threads`: Input should be greater than 0, not 0",
        ),
        (HEAD + "  - {notebook: 01_data_preparation}\n", "two runs of 01_data_preparation have the same parameters"),
        (HEAD.replace("dataset", "datset"), "common parameter 'datset'.*mean 'dataset'"),
        (HEAD + "  - {notebook: 07_zero_shot}\n", "reads a checkpoint, but no stage above it runs 02_pretraining"),
        (
            HEAD + "  - {notebook: 02_pretraining}\n  - {notebook: 07_zero_shot, grid: {objective: [convirt]}}\n",
            "objective 'convirt', but 02_pretraining is run for objective 'gloria'",
        ),
        (
            HEAD + "  - {notebook: 02_pretraining}\n  - {notebook: 07_zero_shot, grid: {seed: [0, 1]}}\n",
            "seed 1, but 02_pretraining is run for seed 0",
        ),
        (
            HEAD + "  - {notebook: 02_pretraining, grid: {epochs: [1, 2]}}\n  - {notebook: 07_zero_shot}\n",
            "2 runs of 02_pretraining, which differ in epochs",
        ),
    ],
)
def test_mistakes_are_named(make_study, text, message):
    with pytest.raises((StudyError, ParameterError), match=message) as caught:
        load_study(make_study(text))
    assert "tiny.yaml" in str(caught.value)


def test_study_by_name(make_study):
    file = make_study()
    root = file.parents[2]
    assert study_file("tiny", root) == file
    with pytest.raises(StudyError, match=r"unknown study 'tyni'.*mean 'tiny'"):
        study_file("tyni", root)


def test_numbers_in_yaml_are_numbers():
    assert parse("[5e-5, 1E3, -2.5e-2, 1e-3x, 12]") == [5e-5, 1e3, -2.5e-2, "1e-3x", 12]
    assert isinstance(parse("1e3"), float)


def test_several_datasets_in_one_study(make_study, tmp_path):
    text = """
        study: tiny
        stages:
          - {notebook: 01_data_preparation, parameters: {dataset: nih, data_root: chests}}
          - {notebook: 01_data_preparation, parameters: {dataset: lungs, data_root: masks}}
          - {notebook: 02_pretraining, parameters: {dataset: nih}}
          - {notebook: 07_zero_shot, parameters: {dataset: lungs}}
    """
    file = make_study(text)
    for name in ("02_pretraining", "07_zero_shot"):
        path = file.parents[1] / f"{name}.ipynb"
        content = json.loads(path.read_text())
        content["cells"][1]["source"] += '\ndataset: str = ""  # of the study'
        path.write_text(json.dumps(content))
    chests, masks, model, other = load_study(file, data_root=str(tmp_path))
    assert chests.parameters["data_root"] == str(tmp_path / "chests")
    assert masks.parameters["data_root"] == str(tmp_path / "masks")
    assert set(model.needs) == {chests.run_id}
    assert set(other.needs) == {masks.run_id, model.run_id}  # pretrained on one, asked about the other
    file.write_text(file.read_text().replace("{dataset: lungs}", "{seed: 0}"))
    with pytest.raises(StudyError, match="could read the manifest of 2 runs"):
        load_study(file)


def test_a_change_of_the_data_repeats_what_was_made_from_it(make_study, tmp_path, capsys):
    """The files are looked at, whatever their folder is called; --trust-data leaves them unread."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "a.png").write_bytes(b"pixels")
    file = make_study(HEAD.replace("phantom", "nih") + "  - {notebook: 02_pretraining}\n  - {notebook: 00_tour}\n")
    shutil.copy(file.parents[1] / "09_paper_tables.ipynb", file.parents[1] / "00_tour.ipynb")
    plan = load_study(file, data_root=str(raw))
    assert to_do(plan) == list(plan)
    for run in plan:
        folder = plan.folder / run.run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": "ok", "fingerprint": run.fingerprint}))
        (folder / run.stamp).touch()
    assert to_do(plan) == list(plan.runs[:2])  # what was prepared without a record is not trusted
    source_files.record(plan.folder / plan.runs[0].run_id, raw, skip=plan.folder.parent)
    assert to_do(plan) == []
    moved = load_study(file, data_root=shutil.move(raw, tmp_path / "moved"))
    assert to_do(moved) == [] and to_do(plan) == list(plan.runs[:2])
    capsys.readouterr()
    (tmp_path / "moved/a.png").write_bytes(b"others")
    assert to_do(moved) == list(moved.runs[:2])
    assert f"{plan.runs[0].run_id} is stale: {tmp_path}/moved/a.png is another (--trust-data" in capsys.readouterr().out
    assert to_do(moved, trust_data=True) == []


def test_a_written_manifest_counts_whole_and_with_its_sources(make_study, tmp_path):
    manifest = tmp_path / "manifest.csv"
    text = "study_id,sex\n" + "".join(f"{number},M\n" for number in range(200_000))
    manifest.write_text(text)
    file = make_study(HEAD + f"  - {{notebook: 02_pretraining, parameters: {{manifest: {manifest}}}}}\n")
    first = load_study(file).runs[1].fingerprint
    manifest.write_text(text[:-2] + "F\n")  # after the first MiB
    second = load_study(file).runs[1].fingerprint
    (tmp_path / source_files.NAME).write_bytes(b"of other pixels")
    assert len({first, second, load_study(file).runs[1].fingerprint}) == 3


def test_a_model_needs_no_checkpoint_and_its_content_counts(make_study, write_notebook, tmp_path):
    parameters = 'manifest: str = ""\ncheckpoint: str = ""\nmodel: str = ""\nout: str = ""\n'
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks", "05_segmentation", parameters)
    for run in ("a", "b"):
        (tmp_path / run / "checkpoints").mkdir(parents=True)
        (tmp_path / run / "checkpoints" / "best.pt").write_text(run)
    stage = "  - {notebook: 05_segmentation, grid: {model: [a/checkpoints/best.pt, b/checkpoints/best.pt]}}\n"
    file = make_study(HEAD + stage)
    first = load_study(file).runs[1:]
    assert len({run.run_id for run in first}) == 2 and all(run.parameters["checkpoint"] == "" for run in first)
    (tmp_path / "a/checkpoints/best.pt").write_text("c")
    second = load_study(file).runs[1:]
    changed = [old.fingerprint != new.fingerprint for old, new in zip(first, second, strict=True)]
    assert changed == [True, False] and [run.run_id for run in first] == [run.run_id for run in second]
    with pytest.raises(StudyError, match="reads a checkpoint, but no stage above it runs 02_pretraining"):
        load_study(make_study(HEAD + "  - {notebook: 05_segmentation}\n"))


@pytest.mark.parametrize(
    ("data_root", "message"), [("", "no folder is given"), ("/not/there", "nih: the root /not/there is not a f")]
)
def test_a_missing_data_folder_is_named_with_its_remedy(make_study, data_root, message):
    file = make_study(HEAD.replace("phantom", "nih"))
    plan = load_study(file, data_root=data_root)
    with pytest.raises(StudyError, match=f"radiographs of nih, but {message}.*make study STUDY=tiny DATA="):
        plan.check_data(plan.runs)
    folder = file.parent / "radiographs"
    folder.mkdir()
    plan = load_study(file, data_root=str(folder))
    with pytest.raises(StudyError, match=r"(?s)radiographs of nih, but nih: .* lacks.*Data_Entry_2017.*DATA="):
        plan.check_data(plan.runs)
    (folder / "Data_Entry_2017.csv").touch()
    plan.check_data(plan.runs)


SHIPPED = sorted((Path(__file__).parents[2] / "notebooks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_whole(file):
    plan = load_study(file, data_root="/radiographs")
    assert plan.runs[-1].notebook == "09_paper_tables" and len(plan.runs[-1].needs) == len(plan) - 1
    trained = {run.parameters["objective"] for run in plan if run.notebook == "02_pretraining"}
    assert {"gloria", "random"} <= trained
    if file.stem in ("phantom", "nih", "real"):
        assert {"gloria", "mgca", "prior", "cxr_clip", "convirt"} <= trained
    if file.stem in ("quickstart", "phantom", "real"):
        assert {run.notebook[:2] for run in plan} >= {f"{number:02}" for number in range(1, 10)}
    roots = {run.parameters["data_root"] for run in plan if run.parameters.get("data_root")}
    assert all(root.startswith("/radiographs") for root in roots) and (file.stem in ("nih", "real")) == bool(roots)
