import math

import pytest
import torch
from torch import nn

from gloria_core.training.schedule import learning_rate, make_optimizer


def test_cosine_with_warmup_is_its_closed_form_at_every_step():
    rates = [learning_rate(t, base=2.0, total_steps=20, warmup_steps=5) for t in range(26)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[5:20] == pytest.approx([1 + math.cos(math.pi * (t - 5) / 15) for t in range(5, 20)])
    assert 0 < rates[19] < 0.03
    assert rates[20:] == pytest.approx([0.0] * 6, abs=1e-12)  # it does not rise again


def test_cosine_without_warmup_equals_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    for t in range(12):
        rate = learning_rate(t, base=0.3, total_steps=12)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        reference.step()


def test_constant_stays_after_warmup():
    rates = [learning_rate(t, total_steps=10, warmup_steps=2, schedule="constant") for t in (0, 1, 2, 9)]
    assert rates == [0.5, 1.0, 1.0, 1.0]


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


def test_nothing_trainable_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter"):
        make_optimizer(model, "adam", learning_rate=0.1, betas=(0.5, 0.999), weight_decay=0.0)
