"""Every notebook, run by papermill through the study runner, as a user runs it: a study small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gloria_core.study.plan import load_study
from gloria_core.study.record import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
study: smoke
common: {dataset: phantom, seed: 0, crop: 56, n_bootstrap: 20}
stages:
  - notebook: 00_tour
    parameters: {n_patients: 40, image_size: 64, epochs: 1, batch_size: 16}
  - notebook: 01_data_preparation
    parameters: {n_patients: 60, image_size: 64}
  - notebook: 02_pretraining
    parameters: {epochs: 1, batch_size: 16, image_encoder: resnet_tiny, snapshot_every: 1}
    grid: {objective: [gloria, mgca, cxr_clip, convirt, random]}
  - notebook: 02_pretraining
    parameters: {epochs: 3, batch_size: 16, image_encoder: resnet_tiny, options: {decoder_layers: 1}}
    grid: {objective: [prior]}
  - notebook: 03_attention_maps
    parameters: {n_studies: 6}
    grid: {objective: [gloria, mgca, cxr_clip, convirt, prior]}
  - notebook: 04_finetune_classification
    parameters: {subsets: 1, finetune_epochs: 1}  # 60 patients have no second 1 % subset
    grid: {objective: [gloria, random]}
  - notebook: 05_segmentation
    parameters: {fractions: [0.5], subsets: 1, steps: 2, validate_every: 1, channels: [8, 8, 8, 8, 8]}
    grid: {objective: [gloria, random]}
  - notebook: 06_detection
    parameters: {fractions: [0.5], subsets: 1, epochs: 0.1, min_steps: 2, width: 16}
    grid: {objective: [gloria, random]}
  - notebook: 07_zero_shot
    grid: {objective: [gloria, random]}
  - notebook: 08_retrieval
    parameters: {shortlist: 5}
    grid: {objective: [gloria, random]}
  - notebook: 09_paper_tables
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished study: its plan. The repository is linked, so that results land beside the test and not in it."""
    root = tmp_path_factory.mktemp("repository")
    for name in ("gloria_core", "data_manifests", "pyproject.toml", "README.md"):
        (root / name).symlink_to(ROOT / name)
    (root / "notebooks" / "studies").mkdir(parents=True)
    for notebook in [*(ROOT / "notebooks").glob("*.ipynb"), ROOT / "notebooks" / "Snakefile"]:
        (root / "notebooks" / notebook.name).write_bytes(notebook.read_bytes())
    file = root / "notebooks" / "studies" / "smoke.yaml"
    file.write_text(STUDY)
    command = [sys.executable, "-m", "gloria_core.study", "run", str(file), "--cores", "2"]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return load_study(file)


def test_every_notebook_is_in_the_study(study):
    assert {run.notebook for run in study} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_every_run_says_ok_and_has_its_rows(study):
    for run in study:
        folder = study.folder / run.run_id
        assert json.loads((folder / "run.json").read_text())["status"] == "ok"
        rows = pd.read_csv(folder / "metrics.csv")
        assert tuple(rows.columns) == COLUMNS
        assert set(rows["run_id"].dropna()) <= {run.run_id}


def test_the_promised_numbers_are_there(study):
    rows = pd.concat([pd.read_csv(study.folder / run.run_id / "metrics.csv") for run in study], ignore_index=True)
    for task in ("zero_shot", "classification"):
        macro = rows[(rows["task"] == task) & (rows["target"] == "macro") & (rows["notebook"] != "00_tour")]
        assert set(macro["objective"]) == {"gloria", "random"}
        values = pd.to_numeric(macro.loc[macro["metric"] != "kappa", "value"]).dropna()  # kappa lies in [-1, 1]
        assert values.between(0, 1).all() and len(values)
    probe = rows[(rows["task"] == "classification") & (rows["metric"] == "auroc")]
    assert set(probe["label_fraction"]) == {0.01, 0.1, 1.0}
    assert {"finetuned_auroc", "f1", "ece"} <= set(rows.loc[rows["task"] == "classification", "metric"])
    for task, metric in (("segmentation", "dice_positives"), ("detection", "map_40_75"), ("retrieval", "recall_at_10")):
        found = rows[(rows["task"] == task) & (rows["metric"] == metric)]
        assert {"gloria", "random"} <= set(found["objective"]), task
        assert found["value"].dropna().between(0, 1).all() and found["value"].notna().any(), task
    maps = rows[(rows["task"] == "grounding") & (rows["target"] == "macro")]["metric"]
    assert {"cnr_attention", "cnr_cosine", "cnr_word_softmax", "pointing_game_prior_centre"} <= set(maps)
    convirt = rows[(rows["task"] == "grounding") & (rows["objective"] == "convirt")]
    assert not any(name.startswith("cnr_attention") for name in convirt["metric"])  # its loss has none


def test_figures_are_pictures(study):
    pictures = [path for run in study for path in (study.folder / run.run_id / "figures").glob("*.png")]
    assert len(pictures) >= 40
    assert any(path.name == "snapshots.png" for path in pictures)
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in pictures)
