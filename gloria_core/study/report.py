"""What a study took, what came out and where it lies: summary.json, and the last lines on the screen."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from gloria_core.study.paths import write_atomically
from gloria_core.study.plan import Plan, Run
from gloria_core.study.provenance import package_hash
from gloria_core.study.run import EXECUTED, is_done, status_of


@contextlib.contextmanager
def measured_study() -> Iterator[dict[str, Any]]:
    """Fills `wall_seconds` and `peak_memory_mb`: the resident memory of all our processes together, once a second."""
    import psutil

    result: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "peak_memory_mb": 0.0}
    stop, me = threading.Event(), psutil.Process()

    def watch() -> None:
        while not stop.wait(1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            result["peak_memory_mb"] = max(result["peak_memory_mb"], round(total / 2**20, 1))

    watcher, clock = threading.Thread(target=watch, daemon=True), time.monotonic()
    watcher.start()
    try:
        yield result
    finally:
        stop.set()
        watcher.join()
        result["wall_seconds"] = round(time.monotonic() - clock, 1)


def summarise(plan: Plan, done_now: set[str], measured: Mapping[str, Any]) -> None:
    """Writes summary.json: time and memory of this invocation, of each run, and of the last time that all were done
    at once (`whole_study`). An invocation in which nothing ended leaves the file alone."""
    runs = []
    for run in plan:
        record, status = _record(plan, run), status_of(plan, run)
        known = {key: record.get(key) for key in ("wall_seconds", "peak_memory_mb", "device")}
        now = run.run_id in done_now and status != "missing"
        runs.append({"run_id": run.run_id, "notebook": run.notebook, "status": status, **known, "done_now": now})
    done = sum(run["done_now"] for run in runs)
    if not done:
        return
    whole = dict(measured) if done == len(plan) else _last_summary(plan).get("whole_study")
    content = {
        "study": plan.study,
        "status": "ok" if all(run["status"] == "ok" for run in runs) else "failed",
        **measured,
        "runs_done_now": done,
        "whole_study": whole,
        "all_runs_seconds": round(sum(run["wall_seconds"] or 0 for run in runs), 1),
        "runs": runs,
    }
    write_atomically(plan.folder / "summary.json", json.dumps(content, indent=1) + "\n")


def report(plan: Plan) -> int:
    """Prints where everything lies; returns the exit code."""
    here = os.path.relpath(plan.folder)
    open_runs = [run for run in plan if not is_done(plan, run)]
    for run in open_runs:
        status = status_of(plan, run)
        if status == "missing":
            waits = [need for need in run.needs if not is_done(plan, plan[need])]
            print(f"  not run  {run.run_id}" + (f", waits for {', '.join(waits)}" if waits else ""))
        else:
            error = _record(plan, run).get("error") or {}
            text = str(error.get("value", "")).strip().splitlines() or [""]
            print(
                f"  {status:8} {run.run_id}: {error.get('name')}: {text[0]}\n           {here}/{run.run_id}/{EXECUTED}"
            )
    package = package_hash()
    older = [run.run_id for run in plan if _record(plan, run).get("package") not in (None, package)]
    if older:
        print(
            f"  note: {len(older)} runs were made with other code in gloria_core; `make study FORCE=all` repeats them"
        )
    tables = sorted(path for run in plan for path in (plan.folder / run.run_id).glob("tables/*"))
    figures = [path for run in plan for path in (plan.folder / run.run_id).glob("figures/*.png")]
    for path in tables:
        print(f"  table      {os.path.relpath(path)}")
    print(f"  figures    {here}/*/figures/ ({len(figures)} pictures)")
    print(f"  notebooks  {here}/*/{EXECUTED}")
    last = _last_summary(plan)
    if last:
        whole = last.get("whole_study")
        print(
            f"  took       {_cost(last)} for {last['runs_done_now']} runs"
            + (f"; all at once {_cost(whole)}" if whole else "")
        )
    print(f"study {plan.study}: " + (f"{len(open_runs)} of {len(plan)} runs are not done" if open_runs else "complete"))
    return 1 if open_runs else 0


def duration(seconds: float) -> str:
    """`95 s` or `12 min 5 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60} s"


def _record(plan: Plan, run: Run) -> dict[str, Any]:
    try:
        return json.loads((plan.folder / run.run_id / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _last_summary(plan: Plan) -> dict[str, Any]:
    try:
        return json.loads((plan.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _cost(measured: Mapping[str, Any]) -> str:
    return f"{duration(measured['wall_seconds'])} and {measured['peak_memory_mb'] / 1024:.1f} GiB"
