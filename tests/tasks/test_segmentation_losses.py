from typing import get_args

import numpy as np
import pytest
import segmentation_models_pytorch.losses as smp
import torch

from gloria_core.tasks.segmentation.losses import LossName, focal, mixed, segmentation_loss, soft_dice


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 2, 6, 5, generator=generator)
    truth = (torch.rand(4, 2, 6, 5, generator=generator) < 0.3).float()
    truth[1:3, 0] = 0
    return logits, truth


def released_mixed_loss(logits, truth, *, alpha=10.0, gamma=2.0):
    """Pixel by pixel from loss/segmentation_loss.py of the released code."""
    x, y = logits.double().numpy().ravel(), truth.double().numpy().ravel()
    total = 0.0
    for a, t in zip(x, y, strict=True):
        m = max(-a, 0.0)
        entropy = a - a * t + m + np.log(np.exp(-m) + np.exp(-a - m))
        inverse = -np.log1p(np.exp(a * (2 * t - 1)))  # logsigmoid(-x (2 y - 1))
        total += np.exp(gamma * inverse) * entropy
    p = 1 / (1 + np.exp(-x))
    dice = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    return alpha * total / len(x) - np.log(dice)


def test_mixed_is_the_released_one(case):
    logits, truth = case
    assert float(mixed(logits[:, 0], truth[:, 0])) == pytest.approx(released_mixed_loss(logits[:, 0], truth[:, 0]))
    for name in ("gloria", "mgca"):
        known = torch.ones(4, 2, dtype=torch.bool)
        expected = np.mean([released_mixed_loss(logits[:, k], truth[:, k]) for k in range(2)])
        assert float(segmentation_loss(name, logits, truth, known)) == pytest.approx(expected, rel=1e-5)


def test_dice_is_of_the_whole_batch_not_of_its_images(case):
    logits, truth = (part[:, 0] for part in case)
    p = torch.sigmoid(logits)
    assert float(soft_dice(logits, truth)) == pytest.approx(
        float((2 * (p * truth).sum() + 1) / (p.sum() + truth.sum() + 1))
    )
    each = [float(soft_dice(logits[i : i + 1], truth[i : i + 1])) for i in range(4)]
    assert abs(np.mean(each) - float(soft_dice(logits, truth))) > 0.03


def test_limits():
    truth = torch.zeros(1, 4, 4)
    truth[0, :2] = 1
    right, nothing = 40 * (2 * truth - 1), torch.full((1, 4, 4), -40.0)
    assert float(mixed(right, truth)) == pytest.approx(0, abs=1e-5)
    assert float(focal(right, truth)) == pytest.approx(0, abs=1e-6)
    assert float(mixed(nothing, 0 * truth)) == pytest.approx(0, abs=1e-5)  # empty on empty
    assert float(mixed(-right, truth)) > 100


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("dice", smp.DiceLoss("binary")),
        ("jaccard", smp.JaccardLoss("binary")),
        ("focal", smp.FocalLoss("binary")),
        ("tversky", smp.TverskyLoss("binary")),
        ("lovasz", smp.LovaszLoss("binary")),
    ],
)
def test_the_librarys_losses_are_the_librarys(case, name, reference):
    logits, truth = case
    found = segmentation_loss(name, logits, truth, torch.ones(4, 2, dtype=torch.bool))
    expected = np.mean([float(reference(logits[:, k : k + 1], truth[:, k : k + 1])) for k in range(2)])
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_is_finite_has_a_gradient_and_falls(case, name):
    logits, truth = case
    known = torch.ones(4, 2, dtype=torch.bool)
    logits = logits.clone().requires_grad_()
    loss = segmentation_loss(name, logits, truth, known)
    loss.backward()
    assert torch.isfinite(loss.detach()) and float(logits.grad.abs().sum()) > 0
    better = segmentation_loss(name, logits.detach() + 2 * (2 * truth - 1), truth, known)
    assert float(better) < float(loss.detach())


@pytest.mark.parametrize("name", get_args(LossName))
def test_what_is_not_known_counts_nowhere(case, name):
    logits, truth = case
    known = torch.ones(4, 2, dtype=torch.bool)
    known[3, 0] = False
    changed = truth.clone()
    changed[3, 0] = 1 - changed[3, 0]
    logits = logits.clone().requires_grad_()
    loss = segmentation_loss(name, logits, truth, known)
    assert float(loss.detach()) == float(segmentation_loss(name, logits, changed, known).detach())
    loss.backward()
    assert not logits.grad[3, 0].any() and logits.grad[3, 1].any()
    nothing = segmentation_loss(name, logits, truth, torch.zeros_like(known))
    nothing.backward()
    assert float(nothing.detach()) == 0
    only = torch.zeros_like(known)
    only[:, 1] = True
    assert float(segmentation_loss(name, logits.detach(), truth, only)) == pytest.approx(
        float(segmentation_loss(name, logits.detach()[:, 1:], truth[:, 1:], known[:, 1:])), rel=1e-6
    )
