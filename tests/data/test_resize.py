"""Area interpolation: against a naive loop over covered areas, and its rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria_core.data.geometry import coverage, resize_area

side = st.integers(1, 400)


def naive_area(image, height, width):
    out = np.zeros((height, width))
    step_y, step_x = image.shape[0] / height, image.shape[1] / width
    for row in range(height):
        for column in range(width):
            total = 0.0
            for y in range(image.shape[0]):
                for x in range(image.shape[1]):
                    over_y = min((row + 1) * step_y, y + 1) - max(row * step_y, y)
                    over_x = min((column + 1) * step_x, x + 1) - max(column * step_x, x)
                    total += max(over_y, 0) * max(over_x, 0) * image[y, x]
            out[row, column] = total / (step_y * step_x)
    return out


@pytest.mark.parametrize("new", [(3, 4), (6, 8), (5, 7), (11, 5), (12, 16), (17, 19), (24, 32), (1, 1)])
def test_resize_area_is_the_mean_over_the_covered_area(new):
    image = np.random.default_rng(1).integers(0, 256, (12, 16)).astype(np.uint8)
    result = resize_area(image, *new)
    assert result.dtype == np.uint8
    # half a gray level for the byte, and up to half more where OpenCV counts in 11-bit fixed point
    enlarging = new[0] > 12 or new[1] > 16
    assert np.abs(result - naive_area(image, *new)).max() <= (1.0 if enlarging else 0.501)


def test_whole_factors_round_as_opencv_does():
    quarter = np.array([[0, 1], [0, 1]], np.uint8)
    assert resize_area(quarter, 1, 1)[0, 0] == 1  # 0.5: a 2 x 2 block rounds halves up
    third = np.zeros((2, 4), np.uint8)
    third[0] = 1
    assert resize_area(third, 1, 1)[0, 0] == 0  # 0.5: any other block rounds halves to even


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_resize_refuses_what_is_no_gray_byte_image(image):
    with pytest.raises(ValueError, match="gray uint8"):
        resize_area(image, 2, 2)


def test_resize_keeps_a_constant_image_constant():
    for height, width in [(7, 5), (64, 64), (33, 200), (3, 2)]:
        assert (resize_area(np.full((61, 47), 201, np.uint8), height, width) == 201).all()


@given(side, side)
@settings(max_examples=60, deadline=None)
def test_coverage_rows_sum_to_one(old, new):
    weights = coverage(old, new)
    assert weights.shape == (new, old)
    assert np.abs(weights.sum(axis=1) - 1).max() < 1e-4
    assert np.abs(weights.sum(axis=0) - new / old).max() < 1e-4 * max(1, new / old)
