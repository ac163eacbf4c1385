"""Killed at any moment and started again, a run ends with the numbers of an undisturbed one."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny_study
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - imported once here, inherited by every fork

from gloria_core.checkpoints import native
from gloria_core.training import pretrain as loop
from gloria_core.training import resume
from gloria_core.training.pretrain import pretrain
from gloria_core.training.resume import TrainingError, check_same_run, random_state, set_random_state

SETTINGS = {"epochs": 4, "checkpoint_steps": 2, "schedule": "cosine", "patience": 0}
TIMES = ["images_per_second", "seconds"]


def train(folder, *, kill=None, **changes):
    """One run in this process; `kill` is called first and may lay a trap."""
    torch.set_num_threads(1)  # a forked child has no OpenMP threads
    if kill is not None:
        kill()
    data = tiny_study.datasets(train=40)
    config = tiny_study.config(**{**SETTINGS, **changes})
    pretrain(tiny_study.model(seed=1), *data, config, folder=folder, show=False, device="cpu")


def in_child(folder, *, kill=None, after=None, **changes):
    """The same in a forked process, killed `after` so many seconds if it still runs; returns its exit code."""
    child = multiprocessing.get_context("fork").Process(target=train, args=(folder,), kwargs={"kill": kill, **changes})
    child.start()
    if after is not None:
        child.join(after)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
    child.join(60)
    assert not child.is_alive()
    return child.exitcode


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, number, *, half_written=False):
    """A trap: the `number`-th call of `owner.name` kills the process, if wanted after half a file is written."""

    def lay():
        original, calls = getattr(owner, name), []

        def trapped(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                if half_written:
                    args[1].write(b"PK half a file")
                    args[1].flush()
                die()
            return original(*args, **kwargs)

        setattr(owner, name, trapped)

    return lay


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    assert in_child(folder) == 0
    return folder, time.monotonic() - began


def assert_same_run(folder, reference):
    for name in ("last.pt", "best.pt"):
        ours, theirs = native.load(folder / name).state_dict(), native.load(reference / name).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (pd.read_csv(path / "history.csv").drop(columns=TIMES) for path in (folder, reference))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    ours, theirs = (native.read(path / "last.pt")["training_state"] for path in (folder, reference))
    for number, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][number][key], value) for key, value in state.items())
    assert torch.equal(ours["random"][0]["torch"], theirs["random"][0]["torch"])
    assert sorted(p.name for p in folder.iterdir()) == ["best.pt", "history.csv", "last.pt", "tensorboard"]


def test_dropout_is_at_work(undisturbed, tmp_path):
    """Otherwise the tests below would not see the random state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "set_random_state", lambda *_: None)
        assert in_child(tmp_path, kill=at_call(loop.Pretraining, "_step", 4)) == -signal.SIGKILL
        assert in_child(tmp_path) == 0
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, undisturbed[0])


def test_killed_in_the_middle_of_everything(undisturbed, tmp_path):
    """Each of these starts leaves off somewhere else; five steps an epoch, a checkpoint every second step."""
    kills = [
        at_call(loop.Pretraining, "_step", 2),  # before any checkpoint
        at_call(torch, "save", 1, half_written=True),
        at_call(os, "fsync", 1),  # written, not yet renamed
        at_call(loop.Pretraining, "_step", 4),
        at_call(Path, "replace", 1),
        at_call(loop.Pretraining, "_validate", 1),
        # of file and folder: the first checkpoint of this start is in place, the second just renamed
        at_call(os, "fsync", 4),
        at_call(loop.Pretraining, "_end_epoch", 1),
        at_call(loop.Pretraining, "_save_last", 3),  # best.pt may be newer than last.pt
        at_call(loop.Pretraining, "_write_history", 2),
        at_call(torch, "save", 2, half_written=True),
        at_call(loop.Pretraining, "_step", 3),
    ]
    for number, kill in enumerate(kills):
        assert in_child(tmp_path, kill=kill) == -signal.SIGKILL, number
        for path in tmp_path.glob("*.pt"):
            native.read(path)  # raises for a corrupt file
    assert in_child(tmp_path) == 0
    assert_same_run(tmp_path, undisturbed[0])


def test_killed_by_the_clock(undisturbed, tmp_path):
    """Killed at random times, four times in one run; a run that ends before its time comes is begun anew with less."""
    reference, seconds = undisturbed
    moments, folder, kills = random.Random(3), tmp_path / "0", 0
    for attempt in range(12):
        folder.mkdir(exist_ok=True)
        if in_child(folder, after=moments.uniform(0.4, 0.9) * seconds) == 0:
            folder, kills, seconds = tmp_path / str(attempt + 1), 0, seconds / 2
            continue
        kills += 1
        if kills == 4:
            break
    assert kills
    assert in_child(folder) == 0
    assert_same_run(folder, reference)


def test_log_has_every_step_once(tmp_path, undisturbed):
    reference = undisturbed[0]
    assert in_child(tmp_path, kill=at_call(loop.Pretraining, "_step", 9)) == -signal.SIGKILL
    assert in_child(tmp_path) == 0
    values = {}
    for folder in (tmp_path, reference):
        events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=True)
        events.Reload()
        values[folder] = [(event.step, event.value) for event in events.Scalars("train/total")]
    assert values[tmp_path] == values[reference]
    assert [step for step, _ in values[reference]] == list(range(1, 21))


def test_checkpoints_within_an_epoch_change_no_number(tmp_path, undisturbed):
    """The settings differ, so the runs are compared and not continued."""
    assert in_child(tmp_path, checkpoint_steps=0) == 0
    ours, theirs = (pd.read_csv(path / "history.csv").drop(columns=TIMES) for path in (tmp_path, undisturbed[0]))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def test_what_the_objective_does_at_the_start_of_an_epoch_is_not_done_twice(tmp_path):
    def doubling(self, epoch):
        with torch.no_grad():
            self.global_embedder.weight.mul_(1.5)

    for folder, kills in ((tmp_path / "a", []), (tmp_path / "b", [8, 3])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gloria_core.objectives.gloria.GLoRIA.on_epoch", doubling)
            for number in kills:
                assert in_child(folder, kill=at_call(loop.Pretraining, "_step", number), epochs=2) == -signal.SIGKILL
            assert in_child(folder, epochs=2) == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")


def test_random_states_come_back():
    device = torch.device("cpu")
    state = random_state(device)
    first = torch.rand(3)
    set_random_state(state, device)
    assert torch.equal(torch.rand(3), first)


def test_every_difference_is_named():
    check_same_run({"betas": (0.5, 0.9), "a": 1}, {"a": 1, "betas": (0.5, 0.9)}, Path("last.pt"))
    with pytest.raises(TrainingError, match=r"(?s)a: saved 1, now 2.*b: saved 3, now None.*c: saved None, now 4"):
        check_same_run({"a": 1, "b": 3}, {"a": 2, "c": 4}, Path("last.pt"))
