"""Parameters are read without a kernel, and nothing unknown, computed or ill-typed passes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gloria_core.study.parameters import ParameterError, check, parse, read

GOOD = """
# sizes
epochs: int = 12  # flat after ten
learning_rate: float = 5e-5  # published
fractions: list[float] = [0.01, 1]  # "few" is 1 % of labels
names: list[str] = []  # all
shift: int = -1  # left
augment: bool = True  # helps
objective: str = "gl#oria"  # the paper
options: dict = {"chunk_size": 4}  # of the objective
"""


def test_reads_each_line():
    found = parse(GOOD, name="02")
    assert [p.name for p in found.values()] == [
        "epochs", "learning_rate", "fractions", "names", "shift", "augment", "objective", "options",
    ]  # fmt: skip
    assert found["epochs"].default == 12
    assert found["epochs"].reason == "flat after ten"
    assert found["fractions"].default == [0.01, 1.0]
    assert isinstance(found["fractions"].default[1], float)
    assert found["shift"].default == -1
    assert found["objective"].default == "gl#oria"
    assert found["options"].default == {"chunk_size": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epochs = 3  # why", "has no type"),
        ("epochs: int = 3", "no reason"),
        ("epochs: int = 3  #", "no reason"),
        ("epochs: int = 3  # 1 = short", "papermill cannot read"),
        ("epochs: int = 3  # 1 | 2", "papermill cannot read"),
        ("epochs: int  # why", "is not `name"),
        ("epochs: int = 1 + 2  # why", "computed"),
        ("epochs: int = int('3')  # why", "computed"),
        ("epochs: int = 3.5  # why", "is int, but 3.5 is float"),
        ("epochs: int = True  # why", "is int, but True is bool"),
        ("epochs: int = None  # why", "NoneType"),
        ("epochs: int | str = 3  # why", "must be one of"),
        ("epochs: tuple = ()  # why", "must be one of"),
        ("names: list[int] = ['a', 1]  # why", r"list\[int, str\]"),
        ("import os  # why", "is not `name"),
        ("names: list[int] = [\n 1]  # why", "one line"),
        ("seed: int = 1  # again", "there twice"),
        ("a: int = 1; b: int = 2  # why", "two parameters on one line"),
        ("epochs: int = (  # why", "line 3"),
    ],
)
def test_refuses(line, message):
    with pytest.raises(ParameterError, match=message) as caught:
        parse(f"\nseed: int = 0  # any\n{line}\n", name="02_pretraining")
    assert "02_pretraining" in str(caught.value)
    assert "line 3" in str(caught.value)


def test_needs_exactly_one_tagged_cell(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a: int = 1  # b\n"]}
    path = tmp_path / "x.ipynb"
    for cells, count in (([], 0), ([cell, cell], 2)):
        path.write_text(json.dumps({"cells": cells}))
        with pytest.raises(ParameterError, match=f"{count} code cells tagged"):
            read(path)
    path.write_text(json.dumps({"cells": [cell]}))
    assert read(path)["a"].default == 1
    path.write_text("no json")
    with pytest.raises(ParameterError, match="no Jupyter notebook"):
        read(path)


def test_check_names_the_nearest(write_notebook, tmp_path):
    path = write_notebook(tmp_path, "02_pretraining", GOOD)
    assert check(path, {"learning_rate": 1})["learning_rate"] == 1.0
    assert isinstance(check(path, {"learning_rate": 1})["learning_rate"], float)
    assert check(path, {})["epochs"] == 12
    with pytest.raises(
        ParameterError, match="unknown parameter 'epoch' for 02_pretraining; nearest: 'epochs'; it has: "
    ):
        check(path, {"epoch": 3})
    with pytest.raises(ParameterError, match="'epochs' is int, but '3' is str; its default is 12"):
        check(path, {"epochs": "3"})
    with pytest.raises(ParameterError, match="'augment' is bool, but 1 is int"):
        check(path, {"augment": 1})
    with pytest.raises(ParameterError, match=r"list\[float\], but 0.1 is float"):
        check(path, {"fractions": 0.1})


def test_planning_imports_nothing_heavy():
    code = "import sys, gloria_core.study.plan, gloria_core.study.driver; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "pandas", "numpy", "papermill", "matplotlib", "snakemake"} & set(done.stdout.split())
    assert not heavy
