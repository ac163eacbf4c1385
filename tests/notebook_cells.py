"""Runs the cells of a notebook in this process, with parameters, as papermill would in a kernel of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from IPython.core.interactiveshell import InteractiveShell

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


class CellError(AssertionError):
    """A cell raised: the notebook, the number of the cell, its source and the error."""


def run_notebook(name: str, parameters: dict, out: Path) -> dict:
    """Run notebooks/<name>.ipynb with `parameters` in place of its defaults; returns the names that it defined.

    Raises CellError for the first cell that fails, and ValueError for a parameter that the notebook does not have.
    """
    matplotlib.use("agg")
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    shell = InteractiveShell()
    shell.display_pub.publish = lambda *args, **kwargs: None  # pictures are made, and not sent to a terminal
    out.mkdir(parents=True, exist_ok=True)
    hook = sys.displayhook
    for number, cell in enumerate(code):
        source = "".join(cell["source"])
        result = shell.run_cell(source, silent=False)
        if not result.success:
            error = result.error_in_exec or result.error_before_exec
            raise CellError(f"{name}, code cell {number}: {type(error).__name__}: {error}\n\n{source}") from error
        if "parameters" in cell["metadata"].get("tags", []):
            unknown = [key for key in parameters if key not in shell.user_ns]
            if unknown:
                raise ValueError(f"{name} has no parameter {unknown[0]!r}")
            shell.user_ns.update(parameters, out=str(out))
    plt.close("all")
    sys.displayhook = hook
    return dict(shell.user_ns)
