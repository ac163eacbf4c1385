import math

import pandas as pd
import pytest
import tiny_study
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gloria_core.checkpoints import native
from gloria_core.data.dataset import StudyDataset
from gloria_core.training import pretrain as loop
from gloria_core.training.config import PretrainConfig
from gloria_core.training.pretrain import TrainingError, best_losses, numbers, on_device, pretrain, validation_loader
from gloria_core.training.schedule import learning_rate

TERMS = ["local_image_to_text", "local_text_to_image", "global_image_to_text", "global_text_to_image"]


def run(folder, *, model=None, data=None, **changes):
    train, valid = data or tiny_study.datasets()
    model = model or tiny_study.model()
    config = tiny_study.config(**changes)
    return pretrain(model, train, valid, config, folder=folder, show=False, device="cpu")


def logged(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def plainer():
    train, valid = tiny_study.datasets()
    train.sentence = "all"
    return train, valid


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    model = tiny_study.model()
    return folder, model, run(folder, model=model, epochs=4, warmup_fraction=0.25)


def test_history_holds_every_term_of_every_epoch(finished):
    folder, _, history = finished
    losses = [f"{part}_{name}" for part in ("train", "valid") for name in ("total", *TERMS)]
    columns = ["epoch", "step", "learning_rate", *losses, "gradient_norm", "images_per_second", "seconds"]
    assert list(history.columns) == columns
    assert history["epoch"].tolist() == [1, 2, 3, 4] and history["step"].tolist() == [3, 6, 9, 12]
    assert (history[losses] > 0).all().all() and (history["gradient_norm"] > 0).all()
    pd.testing.assert_frame_equal(pd.read_csv(folder / "history.csv"), history)
    for part in ("train", "valid"):
        parts = sum(history[f"{part}_{name}"] for name in TERMS)
        assert parts.tolist() == pytest.approx(history[f"{part}_total"].tolist(), rel=1e-5)


def test_it_learns(finished):
    history = finished[2]
    assert history["train_total"].iloc[-1] < 0.8 * history["train_total"].iloc[0]


def test_log_has_the_learning_rate_of_the_schedule_at_every_step(finished):
    values = logged(finished[0])
    assert [step for step, _ in values["learning_rate"]] == list(range(1, 13))
    rates = [rate for _, rate in values["learning_rate"]]
    assert rates == pytest.approx(
        [learning_rate(t, base=1e-3, total_steps=12, warmup_steps=3) for t in range(12)], rel=1e-5
    )
    assert [step for step, _ in values["valid/total"]] == [3, 6, 9, 12]
    assert set(values) == {"learning_rate", "gradient_norm"} | {
        f"{p}/{n}" for p in ("train", "valid") for n in ("total", *TERMS)
    }


def test_best_and_last_are_what_they_say(finished):
    folder, model, history = finished
    last = native.load(folder / "last.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, last.state_dict()[name]), name
    best = native.load(folder / "best.pt")
    wanted = history["valid_total"].min()
    valid = tiny_study.datasets()[1]
    assert mean_loss(best, valid) == pytest.approx(wanted, rel=1e-6)
    assert native.read(folder / "best.pt")["extra"]["epoch"] == history["valid_total"].idxmin() + 1
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def mean_loss(model, valid):
    """Ten studies in batches of 8 and 2: an average over studies, not over batches."""
    model.eval()
    collate, total = tiny_study.collate(), 0.0
    for begin, end in ((0, 8), (8, 10)):
        batch = collate([valid[index] for index in range(begin, end)])
        with torch.no_grad():
            total += model(batch).total.item() * (end - begin)
    return total / 10


def test_a_finished_run_returns_its_history_at_once(finished, monkeypatch):
    folder, model, history = finished
    monkeypatch.setattr(loop, "make_loader", None)  # no batch may be asked for
    monkeypatch.setattr(loop, "validation_loader", None)
    fresh = tiny_study.model()
    again = run(folder, model=fresh, epochs=4, warmup_fraction=0.25)
    pd.testing.assert_frame_equal(again, history)
    assert torch.equal(fresh.objective.local_embedder.weight, model.objective.local_embedder.weight)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": 3}, "epochs: saved 4, now 3"),
        ({"learning_rate": 2e-3}, "learning_rate: saved 0.001, now 0.002"),
        ({"data": tiny_study.datasets(train=32)}, "training studies: saved"),
        ({"data": tiny_study.datasets(valid=9)}, "validation studies: saved"),
        ({"data": plainer()}, "training sentence: saved 'random', now 'all'"),
        ({"model": tiny_study.model("convirt")}, "model.objective: saved 'gloria', now 'convirt'"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(finished, changes, field):
    before = (finished[0] / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match=field) as error:
        run(finished[0], **{"epochs": 4, "warmup_fraction": 0.25, **changes})
    assert "another folder" in str(error.value)
    assert (finished[0] / "last.pt").read_bytes() == before


def test_a_finished_run_can_be_given_more_epochs(tmp_path):
    first = run(tmp_path, epochs=2)
    more = run(tmp_path, epochs=4)
    assert more["epoch"].tolist() == [1, 2, 3, 4] and more["step"].tolist() == [3, 6, 9, 12]
    pd.testing.assert_frame_equal(more.head(2), first)
    rates = [learning_rate(step, base=1e-3, total_steps=12, warmup_steps=1) for step in (8, 11)]
    assert more["learning_rate"].tail(2).tolist() == pytest.approx(rates)
    assert len(run(tmp_path, epochs=4)) == 4
    run(tmp_path / "stages", model=tiny_study.model("prior"), epochs=3)
    with pytest.raises(TrainingError, match="epochs: saved 3, now 4"):  # its stages would begin elsewhere
        run(tmp_path / "stages", model=tiny_study.model("prior"), epochs=4)


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path, epochs=1)
    assert torch.equal(torch.rand(3), expected)


def test_early_stopping_counts_epochs_without_gain(tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 9.0, 9.0])
    monkeypatch.setattr(loop.Pretraining, "_validate", lambda self: {"total": next(losses)})
    history = run(tmp_path, epochs=6, patience=2)
    assert history["valid_total"].tolist() == [3.0, 2.0, 2.5, 2.0]
    assert native.read(tmp_path / "best.pt")["extra"]["epoch"] == 2
    again = run(tmp_path, epochs=6, patience=2)  # stopped is finished
    assert len(again) == 4


def test_a_loss_that_is_not_finite_names_the_studies(tmp_path):
    train, valid = tiny_study.datasets()
    model = tiny_study.model()
    run(tmp_path, model=model, data=(train, valid), epochs=1)
    kept = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        model.objective.local_embedder.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"total is nan.* in epoch 1, step 1; studies of the batch: (s\d+(, )?){8}"):
        run(tmp_path / "other", model=model, data=(train, valid), epochs=1)
    assert not (tmp_path / "other" / "last.pt").exists()
    assert (tmp_path / "last.pt").read_bytes() == kept


def test_gradient_norm_is_measured_before_clipping(tmp_path, monkeypatch):
    norms = []
    original = torch.optim.Adam.step

    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return original(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    history = run(tmp_path, epochs=1, gradient_clip=0.25)
    assert norms == pytest.approx([0.25] * 3, rel=1e-3)
    assert history["gradient_norm"].item() > 1.0
    norms.clear()
    history = run(tmp_path / "free", epochs=1, gradient_clip=0.0)
    assert sum(norms) / 3 == pytest.approx(history["gradient_norm"].item(), rel=1e-4)


def test_objective_and_loader_are_told_the_epoch(tmp_path, monkeypatch):
    model, told, asked = tiny_study.model(), [], []
    model.objective.on_epoch = told.append
    original = loop.make_loader
    monkeypatch.setattr(loop, "make_loader", lambda *a, **k: asked.append(k["epoch"]) or original(*a, **k))
    run(tmp_path, model=model, epochs=3)
    assert told == asked == [0, 1, 2]
    assert model.training is False  # the last thing it did was to validate


def test_stages_peak_at_their_share_of_the_rate(tmp_path):
    settings = {"epochs": 3, "schedule": "constant", "warmup_fraction": 0.0}
    history = run(tmp_path, model=tiny_study.model("prior"), **settings)
    assert history["learning_rate"].tolist() == pytest.approx([1e-3, 1e-3, 5e-4])


@pytest.mark.parametrize("objective", ["gloria", "convirt"])
def test_bfloat16_stays_close_to_float32(tmp_path, objective):
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = tiny_study.model(objective, dropout=0.0)
        losses[precision] = run(tmp_path / precision, model=model, epochs=1, precision=precision)["train_total"].item()
        assert all(value.dtype == torch.float32 for value in model.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]  # it was in fact used


def test_validation_batches_are_the_same_however_many_processes_share_them():
    valid = tiny_study.datasets(valid=21)[1]
    valid.set_epoch(7)
    config, collate = tiny_study.config(), tiny_study.collate()
    alone = [b.index.tolist() for b in validation_loader(valid, collate, config, rank=0, world_size=1)]
    assert alone == [list(range(8)), list(range(8, 16)), list(range(16, 21))]
    shares = [
        [b.index.tolist() for b in validation_loader(valid, collate, config, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert shares == [[alone[0], alone[2]], [alone[1]]]
    assert valid.epoch == 7


def test_images_go_to_the_encoder_with_channels_innermost():
    batch = tiny_study.collate()([tiny_study.datasets()[0][index] for index in range(3)])
    placed = on_device(batch, torch.device("cpu"))
    assert torch.equal(placed.pixels, batch.pixels)
    assert placed.pixels.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    values = numbers({"a": torch.tensor(1.5, dtype=torch.bfloat16), "b": torch.tensor([2.0])})
    assert values == {"a": 1.5, "b": 2.0}


def test_without_validation_studies_the_last_epoch_is_kept(tmp_path):
    train, valid = tiny_study.datasets()
    empty = StudyDataset(valid.frame.head(0), valid.cache, crop=valid.crop, labels=["Edema"])
    history = run(tmp_path, data=(train, empty), epochs=2, patience=1)
    assert history["epoch"].tolist() == [1, 2] and not [name for name in history if name.startswith("valid")]
    best, last = (native.load(tmp_path / name).state_dict() for name in ("best.pt", "last.pt"))
    assert all(torch.equal(value, last[name]) for name, value in best.items())
    rows = best_losses(history).set_index("target")
    assert set(rows["split"]) == {"train"} and rows.loc["total", "value"] == history["train_total"].iloc[1]


def test_losses_of_the_best_epoch(finished):
    history = finished[2].assign(valid_total=[0.1, 3.0, 2.0, 4.0])
    rows = best_losses(history, since=1)  # the first epoch was of another stage
    assert rows["target"].tolist() == ["total", *TERMS] and set(rows["split"]) == {"valid"}
    assert rows["value"].tolist() == [2.0, *history.loc[2, [f"valid_{name}" for name in TERMS]]]


def test_too_little_data_is_said_plainly(tmp_path):
    with pytest.raises(TrainingError, match="7 training studies do not fill one batch of 8: lower batch_size"):
        run(tmp_path, data=tiny_study.datasets(train=7))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 2.5},
        {"batch_size": True},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"gradient_clip": -1.0},
        {"schedule": "step"},
        {"optimizer": "sgd"},
        {"precision": "bf16"},
        {"warmup_fraction": 1.0},
        {"betas": (0.9, 1.0)},
    ],
)
def test_bad_settings_are_named(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f"1 validation error for PretrainConfig\n{field}"):
        PretrainConfig(**{"epochs": 1, "batch_size": 2, **changes})


def test_after_every_epoch_somebody_may_look(tmp_path):
    train, valid = tiny_study.datasets()
    seen, histories = [], []

    def look(epoch, model):
        seen.append((epoch, model.training))

    for name, hook in (("a", look), ("b", None)):
        model = tiny_study.model("gloria")
        settings = {"folder": tmp_path / name, "show": False, "device": "cpu", "after_epoch": hook}
        histories.append(pretrain(model, train, valid, tiny_study.config(epochs=2), **settings))
    assert [epoch for epoch, _ in seen] == [1, 2]
    assert histories[0]["train_total"].tolist() == histories[1]["train_total"].tolist()
