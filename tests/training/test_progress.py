import pytest

from gloria_core.training import progress
from gloria_core.training.progress import Progress

ROW = {"learning_rate": 1e-4, "train_total": 2.5, "train_local": 1.5, "valid_total": 2.25}
ROW |= {"images_per_second": 80.0, "seconds": 61.0}
HISTORY = [{"epoch": epoch, "step": 10 * epoch, **ROW} for epoch in (1, 2)]


def test_in_a_log_one_line_an_epoch(capsys):
    shown = Progress(epochs=2, steps_per_epoch=10, step=10)
    for _ in range(10):
        shown.step({"total": 2.0, "local": 1.25})
    shown.epoch(HISTORY)
    shown.finish("finished after epoch 2 of 2")
    out, err = capsys.readouterr()
    first, second, last = out.splitlines()
    assert (first, last) == ("resuming after step 10 of 20", "finished after epoch 2 of 2")
    assert second.startswith(
        "epoch 2/2: train_total 2.5, train_local 1.5, valid_total 2.25, lr 1.0e-04, 80 images/s, 61 s"
    )
    assert err == ""


def test_in_a_kernel_a_bar_with_loss_terms(monkeypatch, capsys):
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    shown = Progress(epochs=2, steps_per_epoch=1)
    shown.step({"total": 2.0, "local": 1.25})
    shown.epoch(HISTORY[:1])
    shown.step({"total": 1.5, "local": 1.0})
    assert shown.bar.n == 2 and shown.bar.postfix == "total=1.500, local=1.000"
    shown.finish("finished")
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 1/2: train_total 2.5" in lines[0] and lines[-1] == "finished"


@pytest.mark.parametrize("kernel", [True, False])
def test_nothing_is_shown_where_nothing_is_wanted(monkeypatch, capsys, kernel):
    monkeypatch.setattr(progress, "in_kernel", lambda: kernel)
    shown = Progress(epochs=2, steps_per_epoch=1, step=1, show=False)
    shown.step({"total": 2.0})
    shown.epoch(HISTORY)
    shown.finish("finished")
    assert capsys.readouterr() == ("", "")
