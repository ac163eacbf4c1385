import math

import pytest
import torch
from torch import nn

from gloria_core.training.schedule import Schedule, make_optimizer


def test_cosine_with_warmup_is_its_closed_form_at_every_step():
    schedule = Schedule("cosine", base=2.0, total_steps=20, warmup_fraction=0.25)
    assert [schedule.at(t) for t in range(5)] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert schedule.at(5) == pytest.approx(2.0)  # the peak
    for t in range(5, 20):
        assert schedule.at(t) == pytest.approx(1 + math.cos(math.pi * (t - 5) / 15))
    assert 0 < schedule.at(19) < 0.03
    assert schedule.at(20) == pytest.approx(0.0, abs=1e-12)
    assert schedule.at(25) == pytest.approx(0.0, abs=1e-12)  # it does not rise again


def test_cosine_without_warmup_equals_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    schedule = Schedule("cosine", base=0.3, total_steps=12)
    for t in range(12):
        assert schedule.at(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


def test_constant_stays_after_warmup():
    schedule = Schedule("constant", base=1.0, total_steps=10, warmup_fraction=0.2)
    assert [schedule.at(t) for t in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    for loss in (1.0, 2.0, 3.0):
        schedule.after_epoch(loss)
    assert schedule.at(9) == 1.0


def test_plateau_equals_torch():
    losses = [3.0, 2.0, 2.0, 2.1, 2.0, 1.9999, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
    schedule = Schedule("plateau", base=1.0, total_steps=100, plateau_factor=0.5, plateau_patience=2)
    rates = []
    for number, loss in enumerate(losses):
        if number == 8:  # through a checkpoint
            state = schedule.state_dict()
            schedule = Schedule("plateau", base=1.0, total_steps=100, plateau_factor=0.5, plateau_patience=2)
            schedule.load_state_dict(state)
        schedule.after_epoch(loss)
        reference.step(loss)
        rates.append(schedule.at(50))
        assert rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == 4  # it did fall, three times


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule 'cosin' is unknown"):
        Schedule("cosin", base=1.0, total_steps=1)


def test_adamw_spares_norms_and_biases_and_adam_does_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    settings = {"learning_rate": 0.1, "betas": (0.5, 0.999), "weight_decay": 0.2}
    adamw = make_optimizer(model, "adamw", **settings)
    decayed = {id(p) for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    spared = {id(p) for group in adamw.param_groups if not group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model[0].weight)}
    assert spared == {id(model[0].bias), id(model[1].weight), id(model[1].bias)}
    adam = make_optimizer(model, "adam", **settings)
    assert len(adam.param_groups) == 1 and len(adam.param_groups[0]["params"]) == 4
    assert adam.param_groups[0]["betas"] == (0.5, 0.999) and adam.param_groups[0]["weight_decay"] == 0.2


def test_nothing_trainable_and_unknown_optimizer_are_refused():
    model = nn.Linear(2, 2)
    settings = {"learning_rate": 0.1, "betas": (0.5, 0.999), "weight_decay": 0.0}
    with pytest.raises(ValueError, match="unknown; choose one of adam, adamw"):
        make_optimizer(model, "sgd", **settings)
    with pytest.raises(ValueError, match="no parameter"):
        make_optimizer(model.requires_grad_(False), "adam", **settings)
