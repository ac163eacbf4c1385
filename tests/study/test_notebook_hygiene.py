"""Notebooks in the repository are meant to be read: no outputs, short cells, nothing of anybody's machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gloria_core.study import parameters

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_LINES = 15
ABSOLUTE = re.compile(r"""["'(\s](/(home|root|work|tmp|mnt|data|Users|scratch|opt)/|[A-Z]:\\\\)""")
MAGIC = re.compile(r"^\s*(%|!)\s*\w", re.MULTILINE)


def faults(notebook: dict) -> list[str]:
    """What is wrong with a notebook, one line each."""
    found = []
    if notebook["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if "papermill" in notebook["metadata"]:
        found.append("metadata of an executed copy")
    first = "".join(notebook["cells"][0]["source"]) if notebook["cells"] else ""
    if not re.match(r"# .*\?\s*($|\n)", first):
        found.append("the first line is no H1 question")
    for number, cell in enumerate(notebook["cells"], start=1):
        source = "".join(cell["source"])
        if ABSOLUTE.search(source):
            found.append(f"cell {number}: absolute path")
        if cell["cell_type"] != "code":
            continue
        if cell["outputs"] or cell["execution_count"] is not None:
            found.append(f"cell {number}: outputs")
        lines = sum(bool(line.strip()) for line in source.splitlines())
        if lines > MOST_LINES and "parameters" not in cell["metadata"].get("tags", []):
            found.append(f"cell {number}: {lines} lines")
        if MAGIC.search(source):
            found.append(f"cell {number}: magic or shell command")
        last = source.rstrip().rpartition("\n")[2]
        if "tables." not in last and re.search(r"\.(round|pivot|pivot_table)\(.*\)(\.T)?$", last):
            found.append(f"cell {number}: a table that is not shown by viz.tables, so that NaN stands in it")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path):
    assert faults(json.loads(path.read_text(encoding="utf-8"))) == []
    known = parameters.read(path).defaults
    assert known["out"] == "", '`out: str = ""` lets the runner say where results go'


def test_the_check_can_fail(write_notebook, tmp_path):
    path = write_notebook(tmp_path, "x", 'out: str = ""  # by the runner', "1 + 1")
    good = json.loads(path.read_text())
    assert faults(good) == []
    code = good["cells"][-1]
    for change, fault in (
        ({"outputs": [{}]}, "outputs"),
        ({"execution_count": 1}, "outputs"),
        ({"source": "x = 1\n" * 16}, "16 lines"),
        ({"source": 'open("/home/me/x.png")'}, "absolute path"),
        ({"source": "%matplotlib inline"}, "magic"),
        ({"source": "!pip install x"}, "magic"),
        ({"source": "rows.round(3)"}, "viz.tables"),
        ({"source": "rows.pivot(index='a', columns='b').T"}, "viz.tables"),
    ):
        bad = json.loads(json.dumps(good))
        bad["cells"][-1] = code | change
        assert [fault in text for text in faults(bad)] == [True]
    assert faults(good | {"metadata": {"kernelspec": {"name": "env"}, "papermill": {}}})[:2] == [
        "kernel is not python3", "metadata of an executed copy",
    ]  # fmt: skip
