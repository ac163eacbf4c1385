"""Cosines and the contrastive loss on hand-made numbers."""

import math

import pytest
import torch

from gloria_core.models.heads import MLPHead, contrastive_terms, cosine_matrix


def test_cosines_by_hand():
    found = cosine_matrix(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 4.0], [-6.0, -8.0], [4.0, -3.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))


def test_contrastive_terms_by_hand():
    """Rows are images: text 1 is confused, text 0 is not."""
    to_text, to_image = contrastive_terms(torch.log(torch.tensor([[3.0, 1.0], [1.0, 1.0]])))
    assert to_text.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)
    assert to_image.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)
    to_text, to_image = contrastive_terms(torch.log(torch.tensor([[1.0, 3.0], [1.0, 1.0]])))
    assert to_text.item() == pytest.approx((-math.log(1 / 4) - math.log(1 / 2)) / 2)
    assert to_image.item() == pytest.approx((-math.log(1 / 2) - math.log(1 / 4)) / 2)


def test_direction_is_rows_first():
    to_text, to_image = contrastive_terms(torch.tensor([[0.0, 50.0], [0.0, 50.0]]))
    assert to_text.item() == pytest.approx(25)
    assert to_image.item() == pytest.approx(math.log(2))


def test_limits():
    assert contrastive_terms(torch.zeros(5, 5))[0].item() == pytest.approx(math.log(5))
    assert contrastive_terms(torch.eye(5) * 100)[0].item() == pytest.approx(0, abs=1e-6)
    assert contrastive_terms(torch.zeros(1, 1))[1].item() == 0
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        contrastive_terms(torch.zeros(2, 3))


def test_head_is_linear_relu_linear():
    head = MLPHead(3, 2)
    x = torch.randn(5, 3)
    expected = head[2](torch.clamp(head[0](x), min=0))
    torch.testing.assert_close(head(x), expected)
    assert head[0].out_features == 2
