"""A study in a temporary folder: four notebooks of a few lines, no torch, seconds to run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

HEAD = """
from pathlib import Path
from gloria_core.study.record import start_run
run = start_run(out, notebook="{name}", parameters=dict(objective="{objective}", dataset="phantom", seed=0))
"""
NOTEBOOKS = {
    "01_data_preparation": (
        'dataset: str = "phantom"  # drawn\ndata_root: str = ""  # none\nout: str = ""  # by the runner',
        '(run.folder / "manifest.csv").write_text("study_id\\n1\\n")',
        "run.finish()",
    ),
    "02_pretraining": (
        'objective: str = "gloria"  # the paper\nseed: int = 0  # any\nepochs: int = 2  # few\n'
        'learning_rate: float = 5e-5  # published\nmanifest: str = ""  # of 01\nout: str = ""  # by the runner',
        'assert not (objective == "random" and Path("broken").exists()), "the coil is open"\n'
        '(run.folder / "checkpoints").mkdir(exist_ok=True)\n'
        '(run.folder / "checkpoints" / "best.pt").write_text(Path(manifest).read_text())',
        'run.metric(task="pretraining", target="valid", metric="loss", value=1.5, n=8, split="valid")\nrun.finish()',
    ),
    "07_zero_shot": (
        'objective: str = "gloria"  # the paper\nseed: int = 0  # any\ncheckpoint: str = ""  # of 02\n'
        'manifest: str = ""  # of 01\nout: str = ""  # by the runner',
        "assert Path(checkpoint).exists() and Path(manifest).exists()",
        'run.metric(task="zero_shot", target="macro", metric="auroc", value=0.5, n=8)\nrun.finish()',
    ),
    "09_paper_tables": (
        'study: str = ""  # by the runner\nout: str = ""  # by the runner',
        "assert study",
        "run.finish()",
    ),
}
STUDY = """
study: tiny
common: {dataset: phantom}
stages:
  - notebook: 01_data_preparation
  - notebook: 02_pretraining
    grid: {objective: [gloria, random]}
  - notebook: 07_zero_shot
    grid: {objective: [gloria, random]}
  - notebook: 09_paper_tables
"""


def write_notebook(folder: Path, name: str, parameters: str, *cells: str) -> Path:
    """Writes <folder>/<name>.ipynb with a title, a parameters cell and code cells; returns its path."""
    objective = '" + objective + "' if "objective:" in parameters else ""
    head = HEAD.format(name=name, objective=objective)
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    code = [nbformat.v4.new_code_cell(text.strip()) for text in (head, *cells)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Why?"), tagged, *code])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Path]:
    """make_study(yaml text) writes the four notebooks and notebooks/studies/tiny.yaml; returns the latter's path."""

    def make(text: str = STUDY) -> Path:
        folder = tmp_path / "notebooks"
        (folder / "studies").mkdir(parents=True, exist_ok=True)
        for name, (parameters, *cells) in NOTEBOOKS.items():
            write_notebook(folder, name, parameters, *cells)
        file = folder / "studies" / "tiny.yaml"
        file.write_text(textwrap.dedent(text))
        return file

    return make


@pytest.fixture(name="write_notebook")
def _write_notebook() -> Callable[..., Path]:
    return write_notebook
