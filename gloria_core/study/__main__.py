"""The command line of the study layer.

    python -m gloria_core.study quickstart                   check everything, run what is missing or stale, report
    python -m gloria_core.study nih --data /data/nih         the same on a folder of radiographs
    python -m gloria_core.study plan quickstart              only print the runs, and which of them are done
    python -m gloria_core.study nih --trust-data             do not look whether files of the data have changed
    python -m gloria_core.study one quickstart <run_id>      run one notebook (what Snakemake calls)

Exit codes: 0 everything is done; 1 a run failed; 2 the study file, its parameters or its data folder are wrong;
130 interrupted.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# jsonschema, which reads notebooks, would build a grammar for international addresses at every start: two seconds
sys.modules.setdefault("rfc3987_syntax", None)

from gloria_core.study.driver import duration, end_with_study, run_study, to_do  # noqa: E402
from gloria_core.study.parameters import ParameterError  # noqa: E402
from gloria_core.study.paths import repository_root  # noqa: E402
from gloria_core.study.plan import Plan, StudyError, load_study, parse, read_plan, study_file  # noqa: E402
from gloria_core.study.run import EXECUTED, FINISHED, run_one, status_of  # noqa: E402

COMMANDS = ("run", "plan", "one")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] not in (*COMMANDS, "-h", "--help"):
        arguments.insert(0, "run")
    given = _parser().parse_args(arguments)
    try:
        plan = read_plan(given.study) if given.study.endswith(".json") else _plan(given)
        if given.command == "one":
            return _one(plan, given.run_id, given.threads)
        if given.command == "plan":
            missing = to_do(plan, trust_data=given.trust_data)
            for run in plan:
                status = status_of(plan, run)
                print(f"{'stale' if run in missing and status in FINISHED else status:14} {run.run_id}")
            plan.check_data(missing)
            return 0
        options = {"cores": given.cores, "force": given.force, "trust_data": given.trust_data}
        return run_study(plan, **options, snakemake=shlex.split(given.snakemake))
    except (StudyError, ParameterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gloria_core.study", description="Run a study of notebooks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="[run] | plan | one")
    run, plan, one = (commands.add_parser(name) for name in COMMANDS)
    for command in commands.choices.values():
        command.add_argument("study", help="name or path of a study file, or the plan.json of a study")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="in every notebook")
        command.add_argument("--data", default="", help="folder of the real radiographs (default: $GLORIA_DATA)")
    for command in (run, plan):
        command.add_argument("--trust-data", action="store_true", help="do not look whether source files have changed")
    run.add_argument("--cores", type=int, default=2, help="processor cores to use at most")
    run.add_argument("--force", default="", help="'all', or how the run ids begin that are to be repeated")
    run.add_argument("--snakemake", default="", help="more arguments for Snakemake, in one string")
    one.add_argument("run_id")
    one.add_argument("--threads", type=int)
    return parser


def _plan(given: argparse.Namespace) -> Plan:
    file = study_file(given.study)
    data = given.data or os.environ.get("GLORIA_DATA", "")
    if data and not Path(data).expanduser().is_absolute():
        # it was typed where the user is; in a plan it is relative to the repository root
        data = os.path.relpath(Path(data).resolve(), repository_root(file.parent))
    plan = load_study(file, overrides=dict(_assignment(text) for text in given.set), data_root=data)
    if given.data and not any(run.parameters.get("data_root") for run in plan):
        raise StudyError("a data folder is given, but this study simulates its images (dataset: phantom)")
    return plan


def _one(plan: Plan, run_id: str, threads: int | None) -> int:
    # a job that is cancelled gets SIGTERM: end as after Ctrl-C, which shuts the kernel down
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    end_with_study()
    place = f"[{plan.runs.index(plan[run_id]) + 1}/{len(plan)}]"
    print(f"{place} {run_id} starts", flush=True)
    record = run_one(plan, run_id, threads=threads)
    took = f"{duration(record['wall_seconds'])}, {record['peak_memory_mb'] / 1024:.1f} GiB"
    print(f"{place} {run_id} {record['status']} ({took})", flush=True)
    if error := record["error"]:
        cell = f" in cell In [{error['cell']}]" if error["cell"] else ""
        see = f"      see {plan.folder / run_id / EXECUTED}"
        print(f"{place} {error['name']}{cell}: {error['value']}\n{see}", flush=True)
    return 0 if record["status"] in FINISHED else 1


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise StudyError(f"--set {text!r}: write NAME=VALUE, e.g. --set epochs=1")
    return name, parse(value)


if __name__ == "__main__":
    sys.exit(main())
