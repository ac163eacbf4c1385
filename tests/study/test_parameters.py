"""Parameters are read without a kernel, and nothing unknown, computed or ill-typed passes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from gloria_core.study.parameters import ParameterError, read

GOOD = """
# sizes
epochs: int = 12  # flat after ten
learning_rate: float = 5e-5  # published
fractions: list[float] = [0.01, 1]  # "few" is 1 % of labels
names: list[str] = []  # all
shift: int = -1  # left
augment: bool = True  # helps
objective: str = "gloria"  # the paper
options: dict = {"chunk_size": 4}  # of the objective
copy: bool = False  # a name that pydantic's models have, too
"""


@pytest.fixture
def parameters_of(tmp_path):
    def make(source):
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(keepends=True)}
        path = tmp_path / "02_pretraining.ipynb"
        path.write_text(json.dumps({"cells": [cell]}))
        return read(path)

    return make


def test_reads_each_line(parameters_of):
    parameters = parameters_of(GOOD)
    assert parameters.defaults == {
        "epochs": 12, "learning_rate": 5e-5, "fractions": [0.01, 1], "names": [], "shift": -1, "augment": True,
        "objective": "gloria", "options": {"chunk_size": 4}, "copy": False,
    }  # fmt: skip
    assert list(parameters.types) == list(parameters.defaults) and parameters.types["fractions"] == "list[float]"


@pytest.mark.parametrize(
    "line",
    [
        "epochs = 3  # why",
        "epochs: int = 3  # 1 = short",
        "epochs: int  # why",
        "epochs: int = 1 + 2  # why",
        "epochs: int = int('3')  # why",
        "epochs: int = 3.5  # why",
        "epochs: int = True  # why",
        "epochs: int = None  # why",
        "epochs: int | str = 3  # why",
        "epochs: tuple = ()  # why",
        "epochs: list[int] = ['a', 1]  # why",
        "epochs: str = 'a#b'  # why",
        "epochs: int = 1  # why\nepochs: int = 2  # again",
        "epochs: int = (  # why",
    ],
)
def test_refuses(parameters_of, line):
    with pytest.raises(ParameterError, match=r"02_pretraining.*'(epochs|seed)'"):
        parameters_of(f"\nseed: int = 0  # any\n{line}\n")


def test_needs_exactly_one_tagged_cell(tmp_path):
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["a: int = 1  # b\n"]}
    path = tmp_path / "x.ipynb"
    for cells, count in (([], 0), ([cell, cell], 2)):
        path.write_text(json.dumps({"cells": cells}))
        with pytest.raises(ParameterError, match=f"{count} code cells tagged"):
            read(path)
    path.write_text("no json")
    with pytest.raises(ParameterError, match="no Jupyter notebook"):
        read(path)


def test_a_misspelt_name_and_a_wrong_type_are_named(parameters_of):
    check = parameters_of(GOOD).check
    assert check({}) == parameters_of(GOOD).defaults
    assert check({"learning_rate": 1, "fractions": [1]}) | {"learning_rate": 1.0} == check({}) | {
        "learning_rate": 1.0, "fractions": [1.0],
    }  # fmt: skip
    assert isinstance(check({"learning_rate": 1})["learning_rate"], float)
    assert isinstance(check({"fractions": [1]})["fractions"][0], float)
    with pytest.raises(
        ParameterError, match=r"unknown parameter 'epoch' for 02_pretraining. Did you mean 'epochs'\? It has: epochs, "
    ):
        check({"epoch": 3})
    for value in ("3", 2.5, True, None):
        with pytest.raises(ParameterError, match=f"02_pretraining: parameter 'epochs' is int, not {value!r}; its def"):
            check({"epochs": value})
    for name, value in (
        ("augment", 1),
        ("fractions", 0.1),
        ("names", ["a", 1]),
        ("options", {1: 2}),
        ("options", "{}"),
    ):
        with pytest.raises(ParameterError, match=f"parameter {name!r} is"):
            check({name: value})


def test_planning_imports_nothing_heavy():
    code = "import sys, gloria_core.study.plan, gloria_core.study.driver; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "pandas", "numpy", "matplotlib", "snakemake"} & set(done.stdout.split())
    assert not heavy
