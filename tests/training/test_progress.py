import io

import pytest

from gloria_core.training import progress
from gloria_core.training.progress import Progress, Silence, duration


def row(epoch, valid):
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "learning_rate": 1e-4,
        "train_total": 2.5,
        "train_local": 1.5,
        "valid_total": valid,
        "gradient_norm": 0.7,
        "images_per_second": 80.0,
        "seconds": 61.0,
    }


def step(shown, number):
    values = {"total": 2.0, "local": 1.25}
    shown.step(epoch=1, step=number, values=values, learning_rate=1e-4, images_per_second=81.7)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class FakeHandle:
    def __init__(self):
        self.updates = []

    def update(self, value):
        self.updates.append(repr(value))


@pytest.fixture
def handle(monkeypatch):
    """As in a kernel, with IPython's display replaced."""
    import IPython.display

    found = FakeHandle()
    displayed = []
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda value, display_id: displayed.append(repr(value)) or found)
    found.displayed = displayed
    return found


def test_durations():
    assert [duration(s) for s in (0, 59.4, 61, 3600, 7625)] == ["0 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 07 min"]


def test_outside_a_kernel_one_line_an_epoch(clock):
    stream = io.StringIO()
    shown = Progress(stream=stream)
    shown.start(epochs=2, steps_per_epoch=10)
    for number in range(1, 11):
        clock[0] += 5
        step(shown, number)
    shown.epoch(row(1, 2.25))
    shown.epoch(row(2, 2.0))
    shown.finish("finished after epoch 2 of 2")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and lines[0].startswith("epoch 1/2: train total 2.5, train local 1.5, valid total 2.25")
    assert "80 img/s" in lines[0] and lines[2] == "finished after epoch 2 of 2"


def test_in_a_kernel_one_output_updated_at_most_once_a_second(clock, handle, capsys):
    shown = Progress()
    shown.start(epochs=2, steps_per_epoch=10)
    for number in range(1, 11):
        clock[0] += 0.5
        step(shown, number)
    assert len(handle.displayed) == 1 and len(handle.updates) == 5
    last = handle.updates[-1]
    assert last.startswith("epoch 1/2 · step 10/10 · loss 2.000 (local 1.250) · lr 1.0e-04 · 82 img/s")
    assert "about 5 s left" in last  # nine steps took 4.5 s, ten are left
    shown.epoch(row(1, 2.25))
    shown.epoch(row(2, 2.5))
    shown.finish("finished")
    text = handle.updates[-1]
    assert text.splitlines()[0] == "finished" and "2.25 *" in text and "2.5 *" not in text
    assert capsys.readouterr().out == ""


def test_many_epochs_stay_readable():
    shown = Progress(rows=6)
    shown.history = [row(epoch, 10.0 / epoch) for epoch in range(1, 31)]
    lines = repr(shown).splitlines()
    assert len(lines) == 1 + 1 + 7 + 1
    assert [line.split()[0] for line in lines[2:-1]] == ["1", "2", "3", "…", "28", "29", "30"]
    assert shown._repr_html_().count("<tr>") == 8
    shown.headline = "a < b"
    assert "a &lt; b" in shown._repr_html_()


def test_resuming_says_so_and_silence_is_silent(capsys):
    Progress().start(epochs=3, steps_per_epoch=2, history=[row(1, 1.0)])
    assert capsys.readouterr().out == "resuming after epoch 1 of 3\n"
    quiet = Silence()
    quiet.start(epochs=3, steps_per_epoch=2, history=[row(1, 1.0)])
    quiet.epoch(row(2, 1.0))
    quiet.finish("done")
    assert capsys.readouterr().out == ""
