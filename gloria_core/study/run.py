"""Runs one notebook of a study and writes its run.json, last and atomically.

`status: ok` in run.json is the only proof of success. It is written when the notebook ended without an error output
and its metrics.csv can be read. Everything else leaves another status, or, when this process was killed, no run.json:

| status     | what happened                                                                    |
|------------|----------------------------------------------------------------------------------|
| ok         | all cells ran, metrics.csv is there                                              |
| failed     | a cell raised; executed.ipynb holds the traceback                                |
| died       | the kernel was gone, most often for want of memory                               |
| timeout    | longer than the `minutes` of the study file                                      |
| no_kernel  | the kernel did not start, three times                                            |
| incomplete | all cells ran, but an output is an error or metrics.csv is missing or unreadable |

A run that was killed or failed keeps its folder: a training finds its checkpoint there and goes on. A run that is
repeated because its code, its data or a run before it changed, or because it was asked for, starts in an empty one.

Executes one notebook in a fresh kernel by papermill, and tells apart the ways in which that can end.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from gloria_core.study.paths import PACKAGE_PARENT, write_atomically
from gloria_core.study.plan import PATHS, Plan, Run, StudyError
from gloria_core.study.provenance import package_versions, source_state
from gloria_core.study.record import COLUMNS, peak_memory_mb

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


EXECUTED = "executed.ipynb"


def run_one(plan: Plan, run_id: str, *, threads: int | None = None) -> dict[str, Any]:
    """Executes the notebook of one run of the plan and returns its record, the content of run.json.

    `threads` is what OpenMP and friends may use (default: the plan's). Raises `StudyError` when another process is
    at the same run, or when a run that this one needs has not succeeded.
    """
    run = plan[run_id]
    folder = plan.folder / run_id
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        for need in run.needs:
            if status_of(plan, plan[need]) != "ok":
                raise StudyError(f"{run_id} needs {need}, which has no fresh run.json with status ok")
        _prepare(plan, run)
        record = _first_half(plan, run)
        clock = time.monotonic()
        status, error = execute(
            plan.root,
            run.notebook,
            folder / EXECUTED,
            for_kernel(run.parameters),
            threads=threads or run.threads,
            minutes=run.minutes,
        )
        if status == "ok":
            status, error = _complete(folder, run_id)
        record |= {"status": status, "error": error, "wall_seconds": round(time.monotonic() - clock, 2)}
        record |= _second_half(plan, run)
        write_atomically(folder / "run.json", json.dumps(record, indent=1) + "\n")
        if status == "ok":
            write_atomically(folder / run.stamp, "")
    return record


def status_of(plan: Plan, run: Run) -> str:
    """Status in run.json; `stale` when it was written for other code or data, `missing` when there is none."""
    try:
        record = json.loads((plan.folder / run.run_id / "run.json").read_text(encoding="utf-8"))
        return record["status"] if record["fingerprint"] == run.fingerprint else "stale"
    except (OSError, ValueError, KeyError, TypeError):
        return "missing"


def is_done(plan: Plan, run: Run) -> bool:
    """Whether nothing remains to be done: status ok for this very code and data, and the stamp for Snakemake."""
    return status_of(plan, run) == "ok" and (plan.folder / run.run_id / run.stamp).exists()


def _prepare(plan: Plan, run: Run) -> None:
    """Makes the folder ready: what an attempt left that did not end is kept only if it began with the same inputs."""
    folder = plan.folder / run.run_id
    needs = {need: sha256((plan.folder / need / "run.json").read_bytes()).hexdigest() for need in run.needs}
    inputs = json.dumps({"fingerprint": run.fingerprint, "needs": needs})
    begun = folder / ".begun"
    ended = status_of(plan, run) == "ok"
    if ended or not begun.exists() or begun.read_text(encoding="utf-8") != inputs:
        for item in folder.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        write_atomically(begun, inputs)
    for name in ("run.json", "metrics.csv", "notes.json", EXECUTED):
        (folder / name).unlink(missing_ok=True)


def for_kernel(parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with paths as the kernel sees them, which works in notebooks/: `../results/runs/...`.

    Relative, so that an executed notebook can be shown to others and looks the same on every machine.
    """
    values = dict(parameters)
    for key in (*PATHS, "out"):
        path = values.get(key)
        if path and not Path(path).expanduser().is_absolute():
            values[key] = (Path("..") / path).as_posix()
    return values


def _complete(folder: Path, run_id: str) -> Outcome:
    """Whether a notebook that ended is also whole."""
    cells = json.loads((folder / EXECUTED).read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return "incomplete", summary(output["ename"], output["evalue"], cell["execution_count"])
    try:
        with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = {row["run_id"] for row in reader}
            if tuple(reader.fieldnames or ()) != COLUMNS or names - {run_id}:
                raise ValueError(f"columns {reader.fieldnames}, run ids {sorted(names)}")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        return "incomplete", summary("RecordError", f"metrics.csv: {error}; does the notebook call run.finish()?", None)
    return "ok", None


def _first_half(plan: Plan, run: Run) -> dict[str, Any]:
    """What is known before the notebook starts; the commit is that of the code which is about to run."""
    return {
        "run_id": run.run_id,
        "study": plan.study,
        "notebook": run.notebook,
        "objective": run.parameters.get("objective"),
        "seed": run.parameters.get("seed"),
        "parameters": run.parameters,
        "needs": list(run.needs),
        "fingerprint": run.fingerprint,
        **source_state(plan.root),
        **package_versions(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _second_half(plan: Plan, run: Run) -> dict[str, Any]:
    """What is known when the kernel has ended. notes.json is the notebook's own word (`record.Run.finish`)."""
    folder = plan.folder / run.run_id
    notes: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    given = run.parameters.get("manifest")
    manifest = plan.root / given if given else folder / "manifest.csv"
    return {
        "device": notes.get("device", "unknown"),
        "peak_memory_mb": notes.get("peak_memory_mb") or peak_memory_mb(),
        "manifest_hash": sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.is_file() else None,
    }


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go when the process ends, however it ends."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"another process is at work in {folder.name}; wait for it or end it") from None
        yield
