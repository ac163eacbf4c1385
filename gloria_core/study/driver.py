"""Runs a whole study: finds what is missing or stale, hands it to Snakemake, ends everything on Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloria_core.study.parameters import unknown
from gloria_core.study.paths import PACKAGE_PARENT
from gloria_core.study.plan import Plan, Run, StudyError
from gloria_core.study.report import measured_study, report, summarise
from gloria_core.study.run import is_done, status_of


@dataclass(frozen=True)
class Options:
    """How a study is run. `overrides` and `data_root` are those that the plan was loaded with.

    `force`: "all", or how the ids of the runs begin that are to be repeated. `snakemake`: further arguments for it,
    e.g. ("--executor", "slurm", "--jobs", "40").
    """

    overrides: Mapping[str, Any]
    data_root: str = ""
    cores: int = 2
    force: str = ""
    snakemake: tuple[str, ...] = ()


def run_study(plan: Plan, options: Options) -> int:
    """Does what is missing or stale; returns 0 when every run is done and 1 when not. Prints as it goes.

    Raises `StudyError` when the study is already being run, or when its data folder is not there.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _only_one(plan) as lock:
        _forget(plan, options.force)
        missing = _to_do(plan)
        _check_data(plan, missing)
        plan.write()
        print(
            f"study {plan.study}: {len(plan)} runs, {len(plan) - len(missing)} done, {len(missing)} to do", flush=True
        )
        if missing:
            for run in missing:  # from here on they are not done, whatever happens
                for name in ("run.json", run.stamp):
                    (plan.folder / run.run_id / name).unlink(missing_ok=True)
            with measured_study() as measured:
                _snakemake(plan, options, lock)
            summarise(plan, {run.run_id for run in missing}, measured)
        return report(plan)


def one_command(plan: Plan, run: Run, *, overrides: Mapping[str, Any], data_root: str) -> list[str]:
    """The command that runs one notebook, on this machine or as a job on another that shares the folder."""
    command = [sys.executable, "-m", "gloria_core.study", "one", str(plan.file), run.run_id]
    for name, value in overrides.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    return command + (["--data-root", data_root] if data_root else [])


def _to_do(plan: Plan) -> list[Run]:
    """The runs that are not done, and all that depend on them."""
    chosen: dict[str, Run] = {}
    for run in plan:
        if not is_done(plan, run) or any(need in chosen for need in run.needs):
            chosen[run.run_id] = run
    return list(chosen.values())


def _snakemake(plan: Plan, options: Options, lock: int) -> None:
    """One Snakemake in a process group of its own, so that an interruption reaches all of it, and once.

    It inherits the lock: should this process be killed, the study counts as running until Snakemake has ended, too.
    """
    config = [
        f"study={plan.file}",
        # in hexadecimal: Snakemake reads whatever looks like YAML, nested too, and makes a text of every number in it
        f"overrides={json.dumps(dict(options.overrides)).encode().hex()}",
        f"data_root={options.data_root}",
    ]
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(PACKAGE_PARENT / "notebooks" / "Snakefile")]
    command += ["--directory", str(plan.folder), "--cores", str(options.cores), "--config", *config]
    # --nolock: a killed Snakemake leaves its lock behind; ours (`_only_one`) goes with the process
    command += ["--keep-going", "--nolock", "--rerun-incomplete", "--rerun-triggers", "input"]
    path = os.pathsep.join([str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # what Snakemake says of itself goes into a file; the runs speak for themselves on standard output
    with (plan.folder / "snakemake.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, *options.snakemake],
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
            pass_fds=[lock],
            stderr=log,
        )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        process.wait()
    except KeyboardInterrupt:
        _end(process)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if process.returncode and not any(status_of(plan, run) not in ("ok", "missing") for run in plan):
        # no run failed, so Snakemake itself did
        print((plan.folder / "snakemake.log").read_text(encoding="utf-8")[-4000:], flush=True)


def _end(process: subprocess.Popen[bytes], patience: float = 15) -> None:
    """Asks the group to end, as Ctrl-C does, then insists."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _forget(plan: Plan, force: str) -> None:
    """Removes the folders of the runs that are to be repeated."""
    if not force:
        return
    chosen = [run for run in plan if force in ("all", "1") or run.run_id.startswith(force)]
    if not chosen:
        raise StudyError(unknown("run to repeat", force, [run.run_id for run in plan], where=plan.study))
    for run in chosen:
        shutil.rmtree(plan.folder / run.run_id, ignore_errors=True)


def _check_data(plan: Plan, missing: list[Run]) -> None:
    for run in missing:
        path = run.parameters.get("data_root")
        if path and not (plan.root / Path(path).expanduser()).is_dir():
            raise StudyError(
                f"{run.notebook}: data_root {path!r} is no folder (relative paths hang from {plan.root}); give "
                "`make study DATA=/path`, GLORIA_DATA, or data_root in the study file"
            )


@contextlib.contextmanager
def _only_one(plan: Plan) -> Iterator[int]:
    """Two studies may run at once, one study only once. The system drops this lock when its holders have ended."""
    with (plan.folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(f"study {plan.study} is already being run by another process") from None
        yield lock.fileno()
