"""Runs a whole study: finds what is missing or stale, hands it to Snakemake, and reports results and costs."""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from gloria_core.data import source_files
from gloria_core.study.parameters import unknown
from gloria_core.study.paths import PACKAGE_PARENT, read_json
from gloria_core.study.plan import Plan, PlannedRun, StudyError
from gloria_core.study.provenance import package_hash
from gloria_core.study.run import EXECUTED, FINISHED, NOT_APPLICABLE, is_done, locked, package_path, status_of

# Environment variable with the host and process id of a running study; its runs end when that process has ended.
PARENT = "GLORIA_STUDY_PROCESS"


def run_study(
    plan: Plan, *, cores: int = 2, force: str = "", trust_data: bool = False, snakemake: Sequence[str] = ()
) -> int:
    """Do what is missing or stale; return 0 when every run is done and 1 when not. Prints as it goes.

    `force`, `trust_data`: see `to_do`. `snakemake`: further arguments for it, e.g. ("--executor", "slurm").
    Raises `StudyError` when the study is already being run, or when its data folder is not there.
    """
    with locked(plan.folder, f"study {plan.study}") as lock:
        missing = to_do(plan, force, trust_data=trust_data)
        plan.check_data(missing)
        plan.write()
        done = len(plan) - len(missing)
        print(f"study {plan.study}: {len(plan)} runs, {done} done, {len(missing)} to do", flush=True)
        for run in missing:  # from here on they are not done, whatever happens
            folder = plan.folder / run.run_id
            if _forced(run, force):
                shutil.rmtree(folder, ignore_errors=True)
            (folder / "run.json").unlink(missing_ok=True)
            (folder / run.stamp).unlink(missing_ok=True)
        if missing:
            began = time.monotonic()
            _snakemake(plan, ["--cores", str(cores), *snakemake], lock)
            records = [read_json(plan.folder / run.run_id / "run.json") for run in missing]
            largest = max(record.get("peak_memory_mb", 0) for record in records)
            took = duration(time.monotonic() - began)
            print(f"  took       {took}; the largest process had {largest / 1024:.1f} GiB")
        return _report(plan)


def to_do(plan: Plan, force: str = "", *, trust_data: bool = False) -> list[PlannedRun]:
    """The runs that are not done or are to be repeated, and all that depend on them.

    `force`: "all", or how the ids of the runs begin that are to be repeated. A run whose source files have changed is
    not done, and they are named, unless `trust_data` leaves them unread.
    """
    if force and not any(_forced(run, force) for run in plan):
        raise StudyError(unknown("run to repeat", force, [run.run_id for run in plan], where=plan.study))
    chosen: dict[str, PlannedRun] = {}
    for run in plan:
        stale = _forced(run, force) or not is_done(plan, run) or not chosen.keys().isdisjoint(run.needs)
        if stale or not (trust_data or _same_sources(plan, run)):
            chosen[run.run_id] = run
    return list(chosen.values())


def _same_sources(plan: Plan, run: PlannedRun) -> bool:
    """Whether the files that a finished run was prepared from are as they were; prints which are not."""
    if not run.parameters.get("data_root"):
        return True
    root = plan.root / Path(run.parameters["data_root"]).expanduser()
    changes = source_files.changes(plan.folder / run.run_id, root, skip=plan.folder.parent)
    if changes:
        more = f", and {len(changes) - 3} more" if len(changes) > 3 else ""
        print(f"{run.run_id} is stale: {', '.join(changes[:3])}{more} (--trust-data: take what was prepared as it is)")
    return not changes


def _forced(run: PlannedRun, force: str) -> bool:
    return force == "all" or (force != "" and run.run_id.startswith(force))


def _snakemake(plan: Plan, arguments: Sequence[str], lock: int) -> None:
    """Run Snakemake in a process group of its own, so that an interruption reaches all of it, and once.

    It inherits the lock, so the study counts as running until Snakemake has ended, too.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PACKAGE_PARENT / "notebooks" / "Snakefile")]
    # --nolock: a killed Snakemake leaves its lock behind; ours goes with the process
    command += ["--directory", str(plan.folder), "--nolock", "--keep-going", "--rerun-incomplete"]
    command += ["--rerun-triggers", "input", *arguments]
    environment = {"PYTHONPATH": package_path(), PARENT: f"{os.uname().nodename}:{os.getpid()}"}
    # what Snakemake says of itself goes into a file; the runs speak for themselves on standard output
    with (plan.folder / "snakemake.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            start_new_session=True,
            pass_fds=[lock],
            stderr=log,
            preexec_fn=_interrupted_with_parent,
        )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        process.wait()
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode and not any(status_of(plan, run) not in (*FINISHED, "missing") for run in plan):
        # no run failed, so Snakemake itself did
        print((plan.folder / "snakemake.log").read_text(encoding="utf-8")[-4000:], flush=True)


def _interrupted_with_parent() -> None:
    """In the child: take SIGINT as Ctrl-C and, on Linux, get it when the parent has ended, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)  # 1: PR_SET_PDEATHSIG


def end_with_study() -> None:
    """Interrupt this process, a run on the machine of its study, when the process of the study has ended."""
    host, _, pid = os.environ.get(PARENT, "").rpartition(":")
    if host != os.uname().nodename:
        return

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            study = psutil.Process(int(pid))
            while study.is_running() and study.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def _end(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Ask the group to end, as Ctrl-C does, then insist."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _report(plan: Plan) -> int:
    """Print what is not done and where everything lies; return the exit code."""
    here, package, older = os.path.relpath(plan.folder), package_hash(), 0
    unfinished = [run for run in plan if not is_done(plan, run)]
    for run in plan:
        record = read_json(plan.folder / run.run_id / "run.json")
        older += record.get("package", package) != package
        if run not in unfinished and record["status"] != NOT_APPLICABLE:
            continue
        if "error" in record:
            error = record["error"] or {"name": "stale", "value": "made by other code or data"}
            first = (str(error["value"]).strip() or " ").splitlines()[0]
            print(f"  {record['status']:8} {run.run_id}: {error['name']}: {first}")
            print(f"           {here}/{run.run_id}/{EXECUTED}")
        else:
            waits = ", ".join(need for need in run.needs if plan[need] in unfinished)
            print(f"  not run  {run.run_id}" + (f", waits for {waits}" if waits else ""))
    if older:
        print(f"  note: {older} runs were made with other code in gloria_core; `make study FORCE=all` repeats them")
    for path in sorted(path for run in plan for path in (plan.folder / run.run_id).glob("tables/*")):
        print(f"  table      {os.path.relpath(path)}")
    print(f"  figures    {here}/*/figures/\n  notebooks  {here}/*/{EXECUTED}")
    end = f"{len(unfinished)} of {len(plan)} runs are not done" if unfinished else "complete"
    print(f"study {plan.study}: {end}")
    return 1 if unfinished else 0


def duration(seconds: float) -> str:
    """`95 s` or `12 min 5 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60} s"
