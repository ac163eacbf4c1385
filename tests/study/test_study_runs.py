"""Studies that are really run: what is redone, what is kept, and what a failure or a kill leaves behind.

Each kernel costs a second or two, so a few long stories are told in place of many short ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from gloria_core.study import run as kernel
from gloria_core.study.plan import load_study
from gloria_core.study.results import collect
from gloria_core.study.run import _incomplete, for_kernel, is_done, run_one, status_of

COMMAND = [sys.executable, "-m", "gloria_core.study"]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
ONE_STAGE = "study: tiny\nstages:\n  - notebook: 01_data_preparation\n"


def start(*arguments):
    command = [*COMMAND, *map(str, arguments)]
    # a shell that runs the tests in the background lets its children ignore ctrl-c; people do not start a study so
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=-1, stderr=-1, text=True, preexec_fn=heeding)


def study(*arguments):
    process = start(*arguments)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def marks(plan):
    """Identity of each run.json: a rewritten file is another file."""
    files = {run.run_id: plan.folder / run.run_id / "run.json" for run in plan}
    return {name: (file.stat().st_ino, file.stat().st_mtime_ns) for name, file in files.items() if file.exists()}


def wait_for(path: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.05)
    return path.read_text()


def wait_for_end(pid: int, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_misspelt_parameter_fails_before_a_kernel_starts(make_study):
    file = make_study()
    file.write_text(file.read_text().replace("grid:", "parameters: {epoch: 3}\n    grid:", 1))
    code, _, err = study(file)
    assert code == 2
    assert "tiny.yaml: unknown parameter 'epoch' for 02_pretraining. Did you mean 'epochs'?" in err
    code, _, err = study("plan", make_study(), "--data", file.parent)
    assert code == 2 and "this study simulates its images" in err
    assert not (file.parents[2] / "results").exists()


def test_failure_fix_and_deletion(make_study):
    """A failed notebook stops only what depends on it; after the fix, only what is missing is done."""
    file = make_study()
    plan = load_study(file)
    data, gloria, broken, zero_gloria, zero_broken, _ = [run.run_id for run in plan]
    (file.parents[1] / "broken").touch()

    code, out, _ = study(file, "--cores", 4)
    assert code == 1
    assert [status_of(plan, run) for run in plan] == ["ok", "ok", "failed", "ok", "missing", "missing"]
    record = json.loads((plan.folder / broken / "run.json").read_text())
    assert (record["status"], record["error"]["name"]) == ("failed", "AssertionError")
    assert "the coil is open" in record["error"]["value"]
    executed = (plan.folder / broken / "executed.ipynb").read_text()
    assert f"In [{record['error']['cell']}]" in executed
    assert "Traceback" in executed
    assert f"{broken}/executed.ipynb" in out
    assert f"not run  {zero_broken}, waits for {broken}" in out
    good = plan.folder / gloria
    record = json.loads((good / "run.json").read_text())
    assert {"commit", "dirty", "packages", "python", "platform", "manifest_hash", "seed", "device"} <= record.keys()
    assert record["parameters"]["manifest"] == f"results/runs/tiny/{data}/manifest.csv"
    assert str(plan.root) not in (good / "executed.ipynb").read_text() + json.dumps(record["parameters"])
    written = {item.name: item.stat().st_mtime_ns for item in good.iterdir() if not item.name.startswith(".")}
    assert max(written, key=written.get) == "run.json"

    before = marks(plan)
    (file.parents[1] / "broken").unlink()
    for item in sorted((plan.folder / zero_gloria).iterdir()):
        item.unlink()
    (plan.folder / zero_gloria).rmdir()
    code, out, err = study(file, "--cores", 4)
    assert code == 0, out + err
    assert all(is_done(plan, run) for run in plan)
    kept = {name for name, mark in marks(plan).items() if before.get(name) == mark}
    assert kept == {data, gloria}
    assert re.search(r"took +\d+ s; the largest process had 0\.\d GiB", out)

    before = marks(plan)
    code, out, _ = study(file)
    assert (code, marks(plan)) == (0, before)
    assert "0 to do" in out


def test_what_makes_no_sense_is_finished(make_study, write_notebook):
    """A notebook that does not apply is no failure; what needs it does not apply either, and nothing is repeated."""
    stages = "  - notebook: {}\n" * 4
    names = ("01_data_preparation", "02_pretraining", "07_zero_shot", "09_paper_tables")
    file = make_study("study: tiny\nstages:\n" + stages.format(*names))
    parameters = 'manifest: str = ""  # of 01\nout: str = ""  # by the runner'
    refuse = "from gloria_core.study.record import NotApplicable\nraise NotApplicable('no text; give some')"
    write_notebook(file.parents[1], "02_pretraining", parameters, refuse)
    plan = load_study(file)

    code, out, err = study(file, "--cores", 4)
    assert code == 0, out + err
    assert [status_of(plan, run) for run in plan] == ["ok", "not applicable", "not applicable", "ok"]
    _, pretraining, zero_shot, _ = [run.run_id for run in plan]
    reason = f"it needs {pretraining}, which is not applicable: no text; give some"
    assert f"not applicable {zero_shot}: NotApplicable: {reason}" in out and "study tiny: complete" in out
    assert not (plan.folder / zero_shot / "executed.ipynb").exists()
    assert "Not applicable: no text; give some" in (plan.folder / pretraining / "executed.ipynb").read_text()
    skipped = collect("tiny", results_root=plan.folder.parent).attrs["skipped"]
    assert {"run_id": zero_shot, "reason": f"not applicable: {reason}"} in skipped

    before = marks(plan)
    code, out, _ = study(file)
    assert (code, marks(plan)) == (0, before)
    assert "0 to do" in out


def sleeping(write_notebook, file):
    """Makes 01 write the pid of its kernel and wait; the second time it finds `half` and ends."""
    write_notebook(
        file.parents[1],
        "01_data_preparation",
        'out: str = ""  # by the runner',
        'import os, time\nhalf = run.folder / "half"\nwas_there = half.exists()\nhalf.write_text(str(os.getpid()))',
        "time.sleep(0 if was_there else 600)",
        "run.finish()",
    )


def test_killed_and_interrupted(make_study, write_notebook):
    """Neither SIGKILL nor Ctrl-C leaves a run.json, a kernel or a lock; the next call goes on from what is there."""
    file = make_study(ONE_STAGE)
    sleeping(write_notebook, file)
    plan = load_study(file)
    folder = plan.folder / plan.runs[0].run_id

    runner = start("one", file, plan.runs[0].run_id)
    process = int(wait_for(folder / "half"))
    runner.kill()
    runner.communicate()
    wait_for_end(process)
    assert not (folder / "run.json").exists()
    assert status_of(plan, plan.runs[0]) == "missing"

    (folder / "half").unlink()
    whole = start(file)
    process = int(wait_for(folder / "half"))
    code, _, err = study(file)  # a second one is told to wait
    assert code == 2
    assert f"study tiny is already being run by another process: {whole.pid} on " in err and "since 20" in err
    assert f"kill -INT {whole.pid}" in err
    whole.send_signal(signal.SIGINT)
    _, err = whole.communicate(timeout=60)
    assert whole.returncode == 130
    assert "goes on from here" in err
    wait_for_end(process)
    assert not (folder / "run.json").exists()

    (folder / "half").unlink()
    whole = start(file)
    process = int(wait_for(folder / "half"))
    whole.kill()  # not even then does anything go on
    whole.communicate()
    wait_for_end(process)
    assert not (folder / "run.json").exists()

    code, out, err = study(file)
    assert code == 0, out + err  # `half` was still there, so it did not sleep
    assert status_of(plan, plan.runs[0]) == "ok"


def test_a_repeated_run_starts_in_an_empty_folder(make_study, write_notebook):
    """What an older attempt left is for the same code and data only; a dead kernel is told from a failed cell."""
    file = make_study(ONE_STAGE)
    parameters = 'out: str = ""  # by the runner'
    left = 'print((run.folder / "left").exists())\n(run.folder / "left").touch()'
    path = write_notebook(
        file.parents[1], "01_data_preparation", parameters, left, "import os\nos.kill(os.getpid(), 9)"
    )
    plan = load_study(file)
    record = run_one(plan, plan.runs[0].run_id)
    assert (record["status"], record["error"]["name"]) == ("died", "DeadKernelError")
    folder = plan.folder / plan.runs[0].run_id
    assert (folder / "left").exists()

    write_notebook(path.parent, path.stem, parameters, left, "run.finish()")
    plan = load_study(file)
    assert status_of(plan, plan.runs[0]) == "stale"
    assert run_one(plan, plan.runs[0].run_id)["status"] == "ok"
    cells = json.loads((folder / "executed.ipynb").read_text())["cells"]
    printed = [output["text"] for cell in cells for output in cell.get("outputs", []) if "text" in output]
    assert "".join(printed[0]).strip() == "False"


def test_a_kernel_gets_its_share_and_no_more(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    monkeypatch.delenv("IPYTHONDIR", raising=False)
    with kernel._environment(2) as private:
        assert os.environ["OMP_NUM_THREADS"] == "2"
        assert os.environ["IPYTHONDIR"] == private
        assert len(f"{private}/kernel-1") < 100  # the path of a socket
    assert os.environ["OMP_NUM_THREADS"] == "16"
    assert "IPYTHONDIR" not in os.environ
    assert not Path(private).exists()


def test_ok_needs_more_than_an_end(tmp_path):
    """A notebook that ended without run.finish(), or that shows an error, is incomplete."""
    cell = {"cell_type": "code", "execution_count": 3, "metadata": {}, "outputs": [], "source": ""}
    (tmp_path / "executed.ipynb").write_text(json.dumps({"cells": [cell]}))
    status, error = _incomplete(tmp_path, "a")
    assert (status, "run.finish()" in error["value"]) == ("incomplete", True)
    header = "run_id,notebook,objective,dataset,task,label_fraction,seed,split,target,metric,value,ci_low,ci_high,n\n"
    (tmp_path / "metrics.csv").write_text(header + "b" + "," * 13 + "\n")
    assert _incomplete(tmp_path, "a")[0] == "incomplete"
    assert _incomplete(tmp_path, "b") is None
    cell["outputs"] = [{"output_type": "error", "ename": "KeyError", "evalue": "x"}]
    (tmp_path / "executed.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert _incomplete(tmp_path, "b") == ("incomplete", {"name": "KeyError", "value": "x", "cell": 3})


def test_paths_for_the_kernel():
    """The kernel works in notebooks/; absolute paths and blanks stay."""
    given = {"out": "results/x", "manifest": "", "checkpoint": "/a/b.pt", "data_root": "../images", "objective": "x"}
    given |= {"model": "results/y/best.pt"}
    changed = {"out": "../results/x", "data_root": "../../images", "model": "../results/y/best.pt"}
    assert for_kernel(given) == given | changed
