"""Placing an image in a square and mapping back: golden numbers, corners, and round trips at odd sizes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parity_kit import golden_files

from gloria_core.data.geometry import Geometry, center_crop, crop_box
from gloria_core.data.images import to_tensor

side = st.integers(1, 400)
target = st.integers(1, 300)
behaviors = pytest.mark.parametrize("behavior", ["corrected", "published"])


GOLDEN = [
    pytest.param(case, id=f"parity-{path.stem}-{name}")
    for path in golden_files("gloria", "image_processing*.json")
    for name, case in json.loads(path.read_text())["cases"].items()
]


@pytest.mark.parametrize("case", GOLDEN)
def test_published_pipeline_matches_golden(case):
    y, x = np.mgrid[0 : case["height"], 0 : case["width"]]
    pattern = 7 * x + 13 * y + (x * y) // (11 + case["k"]) + 40 * ((x // 9 + y // 17) % 3)
    image = (pattern % 256).astype(np.uint8)
    assert image.mean() == pytest.approx(case["input_mean"], abs=1e-6)

    square = Geometry.fit(*image.shape, 256, behavior="published").apply(image)
    golden = case["resized_256"]
    assert int(square.sum()) == golden["sum"]
    assert int((square.sum(axis=0) == 0).sum()) == golden["zero_columns"]
    assert int((square.sum(axis=1) == 0).sum()) == golden["zero_rows"]

    pixels = to_tensor(center_crop(square, 224))
    assert pixels.shape == (3, 224, 224)
    assert torch.equal(pixels[0], pixels[2])
    rows, columns = torch.tensor(case["row_column"]).T
    # the golden values are float32 written with nine digits, so equality is to the bit
    assert torch.equal(pixels[0, rows, columns], torch.tensor(case["value"]))
    assert pixels.mean().item() == pytest.approx(case["mean"], abs=1e-6)
    assert pixels.double().std(correction=0).item() == pytest.approx(case["std"], abs=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "behavior", "expected"),
    [
        (1200, 700, "corrected", (256, 149, 0, 53)),
        (700, 1200, "corrected", (149, 256, 53, 0)),
        (1200, 701, "corrected", (256, 150, 0, 53)),  # 149.55
        (1200, 701, "published", (256, 149, 0, 53)),
        (103, 103, "corrected", (256, 256, 0, 0)),
        (103, 103, "published", (256, 255, 0, 0)),
        (161, 161, "published", (256, 255, 0, 0)),
        (1024, 1024, "published", (256, 256, 0, 0)),
        (2, 3000, "corrected", (1, 256, 127, 0)),
    ],
)
def test_fit_places_the_image(height, width, behavior, expected):
    g = Geometry.fit(height, width, 256, behavior=behavior)
    assert (g.new_height, g.new_width, g.top, g.left) == expected


def test_corrected_never_shrinks_a_square_and_published_does_for_481_sizes():
    short = [n for n in range(100, 4001) if Geometry.fit(n, n, 256, behavior="published").new_width == 255]
    assert len(short) == 481
    assert all(Geometry.fit(n, n, 256).new_width == 256 for n in short)


def test_fit_refuses_nonsense():
    with pytest.raises(ValueError, match="at least 1"):
        Geometry.fit(0, 10, 256)
    with pytest.raises(ValueError, match="unknown"):
        Geometry.fit(10, 10, 256, behavior="correct")
    with pytest.raises(ValueError, match="too thin"):
        Geometry.fit(2, 3000, 256, behavior="published")


@behaviors
def test_apply_pads_with_zeros_only_outside_the_content(behavior):
    g = Geometry.fit(30, 17, 16, behavior=behavior)
    square = g.apply(np.full((30, 17), 255, np.uint8))
    assert square.shape == (16, 16)
    inside = np.zeros((16, 16), bool)
    inside[g.top : g.top + g.new_height, g.left : g.left + g.new_width] = True
    assert (square == np.where(inside, 255, 0)).all()
    with pytest.raises(ValueError, match="this geometry is of"):
        g.apply(np.zeros((17, 30), np.uint8))
    with pytest.raises(ValueError, match="gray uint8"):
        g.apply(np.zeros((30, 17), np.float32))


def test_rounding_of_the_area_interpolation():
    """Halves round up in 2 x 2 blocks and to even in other whole blocks; part blocks and enlarging round in float."""

    def apply(rows, size):
        return Geometry.fit(*np.shape(rows), size).apply(np.array(rows, np.uint8)).tolist()

    assert apply([[0, 1], [0, 1]], 1) == [[1]]
    assert apply([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]], 1) == [[0]]
    rows = [[0, 50, 100], [20, 70, 255], [3, 90, 180]]
    assert apply(rows, 2) == [[23, 120], [34, 164]]
    assert apply(rows, 4) == [[0, 33, 67, 100], [13, 47, 110, 203], [14, 56, 128, 230], [3, 61, 120, 180]]


@given(side, side, target, st.sampled_from(["corrected", "published"]), st.data())
@settings(max_examples=150, deadline=None)
def test_points_return_and_boxes_have_the_corners_of_their_points(height, width, size, behavior, data):
    if behavior == "published" and int(min(height, width) * (size / max(height, width))) < 1:
        return
    g = Geometry.fit(height, width, size, behavior=behavior)
    crop = data.draw(st.one_of(st.none(), st.integers(1, size)))
    points = np.array([[0, 0], [width, height], [width / 2, height / 3], [-5, height + 7]])
    back = g.points_to_original(g.points_from_original(points, crop=crop), crop=crop)
    assert np.abs(back - points).max() < 1e-9 * max(height, width, size) * max(1, max(height, width) / size)
    boxes = np.array([[0, 0, width, height], [width / 5, height / 7, width / 3, 1]])
    placed = g.box_from_original(boxes, crop=crop)
    for box, (x, y, wide, high) in zip(boxes, placed, strict=True):
        ends = g.points_from_original([box[:2], box[:2] + box[2:]], crop=crop)
        np.testing.assert_allclose([[x, y], [x + wide, y + high]], ends, atol=1e-9 * size)


@given(side, side, target)
@settings(max_examples=100, deadline=None)
@example(103, 103, 256)
def test_corners_of_the_file_land_on_corners_of_the_content(height, width, size):
    g = Geometry.fit(height, width, size)
    corners = g.points_from_original([[0, 0], [width, height]])
    # exact up to one rounding of a division and a product
    assert np.abs(corners[0] - [g.left, g.top]).max() == 0
    assert np.abs(corners[1] - [g.left + g.new_width, g.top + g.new_height]).max() <= 1e-12 * size
    assert 0 <= size - g.new_height - 2 * g.top <= 1
    assert 0 <= size - g.new_width - 2 * g.left <= 1
    assert max(g.new_height, g.new_width) == size


def test_crop_shifts_points_by_the_crop_corner():
    g = Geometry.fit(512, 512, 256)
    assert crop_box(256, 224) == (16, 16)
    assert np.allclose(g.points_from_original([32, 64], crop=224), [0, 16])
    assert np.allclose(g.points_to_original([0, 16], crop=224), [32, 64])
    assert np.allclose(g.box_from_original([32, 64, 100, 10], crop=224), [0, 16, 50, 5])


def test_crop_box_agrees_with_torchvision():
    from torchvision.transforms.functional import center_crop as reference

    for size, crop in [(256, 224), (7, 4), (9, 4), (8, 5), (11, 8), (5, 5), (128, 112)]:
        image = torch.arange(size * size).view(size, size)
        assert torch.equal(torch.from_numpy(center_crop(image.numpy(), crop)), reference(image[None], [crop, crop])[0])


def test_crop_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        crop_box(128, 129)
    with pytest.raises(ValueError, match="square"):
        center_crop(np.zeros((4, 5)), 3)


def test_map_marks_unseen_pixels_and_keeps_a_constant():
    g = Geometry.fit(100, 200, 64)  # content 32 x 64, rows 16..48
    seen = g.map_to_original(np.full((4, 4), 2.5), crop=48)  # columns and rows 8..56 of the square
    assert seen.shape == (100, 200)
    assert seen.dtype == np.float32
    columns = (np.arange(200) + 0.5) * 64 / 200
    outside = (columns < 8) | (columns >= 56)
    assert np.isnan(seen[:, outside]).all()
    assert (seen[:, ~outside] == 2.5).all()
    assert not np.isnan(g.map_to_original(np.ones((64, 64)))).any()


def test_map_of_a_linear_ramp_is_that_ramp_between_outer_cell_centres():
    g = Geometry.fit(90, 90, 60)
    cells = np.arange(6) + 0.5  # centres in units of cells; a cell is 10 pixels of the square, 15 of the original
    full = g.map_to_original(np.tile(cells, (6, 1)))
    x = (np.arange(90) + 0.5) / 15
    expected = np.clip(x, 0.5, 5.5)
    assert np.abs(full - expected).max() < 1e-6
    assert np.abs(g.map_to_original(np.tile(cells[:, None], (1, 6))).T - expected).max() < 1e-6


def test_map_puts_a_cell_where_its_pixels_are():
    """An attention peak in cell (r, c) of a crop peaks on the original pixels that this cell was computed from."""
    g = Geometry.fit(333, 251, 64)
    for row, column in [(0, 3), (3, 1), (6, 6)]:
        grid = np.zeros((7, 7))
        grid[row, column] = 1
        peak_y, peak_x = np.unravel_index(np.nanargmax(g.map_to_original(grid, crop=56)), (333, 251))
        found = g.points_from_original([peak_x + 0.5, peak_y + 0.5], crop=56) / 8
        assert (np.floor(found) == [column, row]).all()


def test_map_refuses_a_stack():
    with pytest.raises(ValueError, match="two dimensions"):
        Geometry.fit(8, 8, 8).map_to_original(np.zeros((2, 3, 3)))


@given(st.integers(20, 150), st.integers(20, 150), st.integers(16, 200))
@settings(max_examples=60, deadline=None)
def test_mask_round_trip_loses_at_most_the_rim(height, width, size):
    g = Geometry.fit(height, width, size)
    y, x = np.mgrid[0:height, 0:width]
    mask = (y >= height // 4) & (y < height - height // 5) & (x >= width // 3)
    back = g.mask_to_original(g.mask_from_original(mask))
    rim = int(np.ceil(max(height / g.new_height, width / g.new_width))) + 1
    inner = np.zeros_like(mask)
    inner[height // 4 + rim : height - height // 5 - rim, width // 3 + rim :] = True
    outer = np.zeros_like(mask)
    outer[max(0, height // 4 - rim) : height - height // 5 + rim, max(0, width // 3 - rim) :] = True
    assert not (inner & ~back).any()
    assert not (back & ~outer).any()


def test_mask_of_everything_fills_the_content_and_nothing_else():
    g = Geometry.fit(31, 57, 40)
    mask = g.mask_from_original(np.ones((31, 57), bool))
    assert mask.sum() == g.new_height * g.new_width
    assert g.mask_to_original(mask).all()
    assert not g.mask_from_original(np.zeros((31, 57), bool)).any()


def test_a_tiny_mask_does_not_vanish():
    g = Geometry.fit(2000, 2000, 64)
    mask = np.zeros((2000, 2000), bool)
    mask[1000, 500] = True
    assert np.argwhere(g.mask_from_original(mask)).tolist() == [[32, 16]]
    assert np.argwhere(g.mask_from_original(mask, crop=56)).tolist() == [[28, 12]]
    mask[:] = False
    mask[0, 0] = True  # lies outside the crop: not seen, so empty
    assert not g.mask_from_original(mask, crop=56).any()
