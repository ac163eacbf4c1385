"""Executes one notebook in a fresh kernel by papermill, and tells apart the ways in which that can end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gloria_core.study.paths import PACKAGE_PARENT

START_ATTEMPTS = 3
START_SECONDS = 90

Outcome = tuple[str, dict[str, Any] | None]
"""A status (see `gloria_core.study.run`) and, when it is not "ok", a summary of the error."""


class TimeLimitError(Exception):
    """The run took longer than the study file allows."""


def execute(
    root: Path, notebook: str, executed: Path, parameters: Mapping[str, Any], *, threads: int, minutes: int = 0
) -> Outcome:
    """Runs notebooks/<notebook>.ipynb of the repository `root`; the copy with outputs goes to `executed`, cell by cell.

    The kernel works in notebooks/ and may use `threads` threads. After `minutes` it is ended (0: no limit). Only a
    kernel that did not start is tried again; a notebook that failed would fail again.
    """
    for attempt in range(1, START_ATTEMPTS + 1):
        executed.unlink(missing_ok=True)
        with contextlib.chdir(root), _environment(threads) as private, _time_limit(minutes * 60):
            status, error = _attempt(notebook, executed.relative_to(root), parameters, private, minutes)
        if status != "no_kernel":
            break
        if attempt < START_ATTEMPTS:
            time.sleep(random.uniform(0.5, 2.0) * attempt)  # parallel starts may be in each other's way; step aside
    return status, error


def summary(name: str, value: str, cell: int | None) -> dict[str, Any]:
    """What went wrong, for run.json; `cell` is the n of `In [n]` in executed.ipynb."""
    return {"name": name, "value": value, "cell": cell}


def _attempt(notebook: str, executed: Path, parameters: Mapping[str, Any], private: str, minutes: int) -> Outcome:
    import papermill  # half a second: only where a notebook is really run
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    # sockets are files in a folder of this run: many kernels starting at once cannot collide over a port, and no
    # other user of the machine can listen
    sockets = Config({"KernelManager": {"transport": "ipc", "ip": f"{private}/kernel"}})
    try:
        papermill.execute_notebook(
            f"notebooks/{notebook}.ipynb",
            str(executed),
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            cwd="notebooks",
            log_output=False,
            progress_bar=False,
            start_timeout=START_SECONDS,
            config=sockets,
        )
    except papermill.PapermillExecutionError as error:
        return "failed", summary(error.ename, error.evalue, error.exec_count)
    except (TimeLimitError, CellTimeoutError):
        return "timeout", summary("TimeLimitError", f"longer than {minutes} minutes", _cells_begun(executed))
    except Exception as error:  # what jupyter raises for a kernel that does not start is spread over many types
        begun = _cells_begun(executed)
        hint = " (out of memory?)" if isinstance(error, DeadKernelError) else ""
        return "died" if begun else "no_kernel", summary(type(error).__name__, f"{error}{hint}", begun)
    return "ok", None


def _cells_begun(executed: Path) -> int | None:
    """The n of `In [n]` that was at work when the end came; None when no cell had begun."""
    try:
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return None
    code = [cell["metadata"].get("papermill", {}) for cell in cells if cell["cell_type"] == "code"]
    return sum(cell.get("start_time") is not None for cell in code) or None


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises `TimeLimitError` in here after so many seconds; 0 means no limit. Main thread only."""

    def ring(signum: int, frame: object) -> None:
        raise TimeLimitError

    if not seconds:
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[str]:
    """What the kernel inherits: its share of the processor, this very package, none of the user's IPython start-up
    files. Yields a private folder, in /tmp because the path of a socket has at most about 100 letters."""
    short = "/tmp" if Path("/tmp").is_dir() else None
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory(prefix="run-", dir=short, ignore_cleanup_errors=True) as private:
        mine = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        mine |= {"IPYTHONDIR": private, "JUPYTER_RUNTIME_DIR": private}
        mine |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": path}
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            yield private
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
