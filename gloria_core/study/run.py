"""Runs one notebook of a study in a fresh kernel and writes its run.json, last and atomically.

`status: ok` in run.json is the only proof of success. It is written when the notebook ended without an error output
and its metrics.csv can be read. Everything else leaves another status, or, when this process was killed, no run.json:

| status         | what happened                                                                         |
|----------------|---------------------------------------------------------------------------------------|
| ok             | all cells ran, metrics.csv is there                                                   |
| not applicable | a cell raised `NotApplicable`, or a run that this one needs did; finished, no numbers |
| failed         | a cell raised; executed.ipynb holds the traceback                                     |
| died           | the kernel was gone, most often for want of memory                                    |
| no_kernel      | the kernel did not start                                                              |
| incomplete     | all cells ran, but an output is an error or metrics.csv is missing or unreadable      |

A run that was killed or failed keeps its folder: a training finds its checkpoint there and goes on. A run that is
repeated because its code, its data or a run before it changed, or because it was asked for, starts in an empty one.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from traitlets.config import Config

from gloria_core.data.files import atomic_write, content_hash, file_hash
from gloria_core.study.paths import PACKAGE_PARENT, read_json
from gloria_core.study.plan import COLLECTOR, PATHS, Plan, PlannedRun, StudyError
from gloria_core.study.provenance import provenance
from gloria_core.study.record import COLUMNS, NotApplicable, peak_memory_mb

EXECUTED = "executed.ipynb"
NOT_APPLICABLE = "not applicable"
# Statuses after which a run is not repeated; the runs that need it may follow.
FINISHED = ("ok", NOT_APPLICABLE)
START_SECONDS = 90
# A status other than "ok" and the error for run.json: name, value, and the n of `In [n]` in executed.ipynb.
Fault = tuple[str, dict[str, Any]]


def run_one(plan: Plan, run_id: str, *, threads: int | None = None) -> dict[str, Any]:
    """Execute the notebook of one run of the plan and return its record, the content of run.json.

    A run that needs one that is not applicable is not applicable either; only the collector, notebook 09, still runs.
    `threads` is what OpenMP and friends may use (default: the plan's). Raises `StudyError` when another process is
    at the same run, or when a run that this one needs has not finished.
    """
    run = plan[run_id]
    folder = plan.folder / run_id
    with locked(folder, f"run {run_id}"):
        for need in run.needs:
            if status_of(plan, plan[need]) not in FINISHED:
                raise StudyError(f"{run_id} needs {need}, which has no fresh run.json with status ok")
        _clear(plan, run)
        record = {"run_id": run_id, "study": plan.study, "notebook": run.notebook}
        record |= {name: run.parameters.get(name) for name in ("objective", "seed")}
        record |= {"parameters": run.parameters, "needs": list(run.needs), "fingerprint": run.fingerprint}
        record |= provenance(plan.root)  # of the code that is about to run
        record["started"] = datetime.now(UTC).isoformat(timespec="seconds")
        clock = time.monotonic()
        fault = _unmet(plan, run) or execute(plan, run, threads=threads or run.threads) or _incomplete(folder, run_id)
        status, error = fault or ("ok", None)
        notes = read_json(folder / "notes.json")  # written by the notebook
        given = run.parameters.get("manifest")
        manifest = plan.root / given if given else folder / "manifest.csv"
        record |= {
            "status": status,
            "error": error,
            "wall_seconds": round(time.monotonic() - clock, 2),
            "device": notes.get("device", "unknown"),
            "peak_memory_mb": notes.get("peak_memory_mb") or peak_memory_mb(),
            "manifest_hash": file_hash(manifest) if manifest.is_file() else None,
        }
        atomic_write(folder / "run.json", json.dumps(record, indent=1) + "\n")
        if status in FINISHED:
            atomic_write(folder / run.stamp, "")
    return record


def _unmet(plan: Plan, run: PlannedRun) -> Fault | None:
    """ "not applicable" with the reason of the first run that this one needs and that is not applicable."""
    for need in run.needs if run.notebook != COLLECTOR else ():
        record = read_json(plan.folder / need / "run.json")
        if record["status"] == NOT_APPLICABLE:
            reason = f"it needs {need}, which is not applicable: {record['error']['value']}"
            return NOT_APPLICABLE, _error(NotApplicable.__name__, reason)
    return None


def status_of(plan: Plan, run: PlannedRun) -> str:
    """Status in run.json; `stale` when it was written for other code or data, `missing` when there is none."""
    record = read_json(plan.folder / run.run_id / "run.json")
    if "status" not in record:
        return "missing"
    return record["status"] if record.get("fingerprint") == run.fingerprint else "stale"


def is_done(plan: Plan, run: PlannedRun) -> bool:
    """Whether nothing remains to be done: finished with this very code and data, and the stamp for Snakemake."""
    return status_of(plan, run) in FINISHED and (plan.folder / run.run_id / run.stamp).exists()


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[int]:
    """Hold `folder` for this process, and yield the open lock file; the system lets go when its holders have ended.

    Raises `StudyError` that names the process which holds it already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = read_json(folder / ".lock")
            pid, since = holder.get("pid", "?"), holder.get("since", "?")
            raise StudyError(
                f"{what} is already being run by another process: {pid} on {holder.get('host', '?')}, since {since}. "
                f"Wait for it, or stop it with `kill -INT {pid}`"
            ) from None
        lock.truncate(0)
        json.dump({"pid": os.getpid(), "host": os.uname().nodename, "since": time.strftime("%F %T")}, lock)
        lock.flush()
        yield lock.fileno()


def execute(plan: Plan, run: PlannedRun, *, threads: int) -> Fault | None:
    """Run the notebook of `run`; the copy with outputs goes to executed.ipynb in its folder, cell by cell.

    The kernel works in notebooks/ and may use `threads` threads.
    """
    executed = plan.folder / run.run_id / EXECUTED
    try:
        with contextlib.chdir(plan.root), _environment(threads) as private:
            papermill.execute_notebook(
                f"notebooks/{run.notebook}.ipynb",
                str(executed.relative_to(plan.root)),
                parameters=for_kernel(run.parameters),
                kernel_name="python3",
                language="python",
                cwd="notebooks",
                log_output=False,
                progress_bar=False,
                start_timeout=START_SECONDS,
                # sockets are files in a folder of this run: kernels that start together cannot collide over a port, and
                # no other user of the machine can listen
                config=Config({"KernelManager": {"transport": "ipc", "ip": f"{private}/kernel"}}),
            )
    except papermill.PapermillExecutionError as error:
        status = NOT_APPLICABLE if error.ename == NotApplicable.__name__ else "failed"
        return status, _error(error.ename, error.evalue, error.exec_count)
    except Exception as error:  # what jupyter raises for a kernel that does not start is spread over many types
        begun = _cells_begun(executed)
        hint = " (out of memory?)" if isinstance(error, DeadKernelError) else ""
        return "died" if begun else "no_kernel", _error(type(error).__name__, f"{error}{hint}", begun)
    return None


def _error(name: str, value: str, cell: int | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "cell": cell}


def _cells_begun(executed: Path) -> int | None:
    """The n of `In [n]` that was at work when the end came; None when no cell had begun."""
    cells = [cell for cell in read_json(executed).get("cells", []) if cell["cell_type"] == "code"]
    return sum(cell["metadata"].get("papermill", {}).get("start_time") is not None for cell in cells) or None


@contextlib.contextmanager
def _environment(threads: int) -> Iterator[str]:
    """What the kernel inherits: its share of the processor, this very package, none of the user's IPython start-up
    files. Yields a private folder, in /tmp because the path of a socket has at most about 100 letters."""
    short = "/tmp" if Path("/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="run-", dir=short, ignore_cleanup_errors=True) as private:
        before = dict(os.environ)
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        os.environ |= {"IPYTHONDIR": private, "JUPYTER_RUNTIME_DIR": private, "JUPYTER_PREFER_ENV_PATH": "1"}
        os.environ |= {"PYTHONPATH": package_path()}
        try:
            yield private
        finally:
            os.environ.clear()
            os.environ.update(before)


def package_path() -> str:
    """PYTHONPATH for a child process that is to import this very package."""
    return os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])


def for_kernel(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with paths as the kernel sees them, which works in notebooks/: `../results/runs/...`.

    Relative, so that an executed notebook can be shown to others and looks the same on every machine.
    """
    values = dict(parameters)
    for key in (*PATHS, "out"):
        path = values.get(key)
        if path and not Path(path).expanduser().is_absolute():
            values[key] = (Path("..") / path).as_posix()
    return values


def _clear(plan: Plan, run: PlannedRun) -> None:
    """Empty the folder of the run, except of what an attempt with the same inputs left that did not end."""
    folder = plan.folder / run.run_id
    needs = {need: file_hash(plan.folder / need / "run.json") for need in run.needs}
    inputs, begun = content_hash([run.fingerprint, needs]), folder / ".begun"
    if status_of(plan, run) in FINISHED or not begun.exists() or begun.read_text(encoding="utf-8") != inputs:
        for item in folder.iterdir():
            if item.name != ".lock":
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        atomic_write(begun, inputs)
    for name in ("run.json", "metrics.csv", "notes.json", EXECUTED):
        (folder / name).unlink(missing_ok=True)


def _incomplete(folder: Path, run_id: str) -> Fault | None:
    """What a notebook that ended lacks: it shows an error, or left no metrics."""
    for cell in read_json(folder / EXECUTED)["cells"]:
        for output in cell.get("outputs", []):
            if output["output_type"] == "error":
                return "incomplete", _error(output["ename"], output["evalue"], cell["execution_count"])
    try:
        header, *rows = (folder / "metrics.csv").read_text(encoding="utf-8").splitlines()
        if header != ",".join(COLUMNS) or not all(row.startswith(f"{run_id},") for row in rows):
            raise ValueError(f"header {header!r}, or rows of another run")
    except (OSError, ValueError) as error:
        return "incomplete", _error("RecordError", f"metrics.csv: {error}; does the notebook call run.finish()?")
    return None
