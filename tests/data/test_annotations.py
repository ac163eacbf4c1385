"""Annotations: run-length codes, and the masks and boxes of an image put together by label."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data.annotations import (
    SIIM_SIDE,
    RleError,
    decode_rle,
    encode_rle,
    read_annotations,
    table_of_masks,
)
from gloria_core.data.images import ImageError
from gloria_core.data.manifest import ManifestError

MASK = np.array([[0, 1, 0], [1, 1, 0], [1, 0, 1]], bool)  # columns: 0 1 1, 1 1 0, 0 0 1


def published_siim(text, height, width):
    """The decoder that came with the SIIM-ACR data, and is in GLoRIA's and MGCA's code."""
    mask, current = np.zeros(width * height), 0
    numbers = np.array([int(x) for x in text.split()])
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        current += start
        mask[current : current + length] = 255
        current += length
    return mask.reshape(width, height).T > 0


def test_by_hand():
    assert encode_rle(MASK) == "1 4 3 1"
    assert (decode_rle("1 4 3 1", 3, 3) == MASK).all()
    assert (decode_rle("0 2 0 1", 2, 2) == [[1, 1], [1, 0]]).all()  # touching runs are one region


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_round_trip_of_any_shape(share):
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 7), (7, 1), (5, 9), (40, 23)):
        mask = rng.random((height, width)) < share
        found = decode_rle(encode_rle(mask), height, width)
        assert found.dtype == bool and (found == mask).all()


def test_siim_is_what_the_owners_decoder_gives():
    rng = np.random.default_rng(1)
    mask = rng.random((17, 29)) < 0.3
    text = encode_rle(mask)
    assert (published_siim(text, 17, 29) == mask).all()
    assert (decode_rle(f" {text}", 17, 29) == published_siim(text, 17, 29)).all()


@pytest.mark.parametrize("empty", ["-1", " -1", "", float("nan"), -1, None])
def test_every_way_to_write_an_empty_mask(empty):
    assert not decode_rle(empty, 4, 5).any()
    assert encode_rle(np.zeros((4, 5))) == "-1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1 2 3", "no pairs"),
        ("1 x", "whole numbers"),
        ("1 2.5", "whole numbers"),
        (7.5, "whole numbers"),
        ("0 100", "ends at pixel 100.*gaps and lengths"),
        ("-1 2", "out of order"),
        ("1 0", "length 0"),
    ],
)
def test_what_is_no_mask_says_why(text, says):
    with pytest.raises(RleError, match=says):
        decode_rle(text, 3, 3)


def test_masks_as_the_table_of_a_contest():
    table = table_of_masks({"a": MASK, "b": np.zeros((2, 2), bool)})
    assert table.to_dict("list") == {"ImageId": ["a", "b"], "EncodedPixels": ["1 4 3 1", "-1"]}


def test_the_owners_siim_table():
    package = importlib.util.find_spec("torchxrayvision")
    path = Path(package.origin).parent / "data" / "siim-pneumothorax-train-rle.csv.gz" if package else Path("none")
    if not path.is_file():
        pytest.skip("torchxrayvision, which ships the SIIM table, is not installed")
    table = pd.read_csv(path)
    empty = table[" EncodedPixels"].str.strip() == "-1"
    for text in table[empty][" EncodedPixels"].head(20):
        assert not decode_rle(text, SIIM_SIDE, SIIM_SIDE).any()
    for text in table[~empty][" EncodedPixels"].head(40):
        mask = decode_rle(text, SIIM_SIDE, SIIM_SIDE)
        assert mask.any() and (mask == published_siim(text, SIIM_SIDE, SIIM_SIDE)).all()


HEIGHT, WIDTH = 12, 20


def rectangle(top, left, height=3, width=4):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top : top + height, left : left + width] = True
    return mask


PIECES = {"one": rectangle(0, 0), "two": rectangle(2, 2), "other": rectangle(8, 10), "beside": rectangle(5, 5)}


@pytest.fixture
def root(tmp_path):
    Image.fromarray(np.full((HEIGHT, WIDTH), 7, np.uint8)).save(tmp_path / "frontal.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 9, np.uint8)).save(tmp_path / "lateral.png")
    for name, mask in PIECES.items():
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def row():
    masks = [("Effusion", 0, "one"), ("Edema", 0, "other"), ("Effusion", 0, "two"), ("Effusion", 1, "beside")]
    boxes = [
        ("Mass", 0, [1, 2, 3, 4]),
        ("Edema", 0, [0, 0, 2, 2]),
        ("Mass", 1, [9, 9, 1, 1]),
        ("Mass", 0, [5, 6, 7, 1]),
    ]
    return {
        "study_id": "s7",
        "images": "frontal.png;lateral.png",
        "masks": json.dumps([{"label": label, "image": n, "path": f"{name}.png"} for label, n, name in masks]),
        "boxes": json.dumps([{"label": label, "image": n, "xywh": xywh} for label, n, xywh in boxes]),
    }


def test_masks_of_a_label_are_united_and_labels_kept_apart(root, row):
    annotations = read_annotations(row, root)
    assert annotations.image.shape == (HEIGHT, WIDTH) and (annotations.image == 7).all()
    assert set(annotations.masks) == {"Effusion", "Edema"}
    assert (annotations.masks["Effusion"] == (PIECES["one"] | PIECES["two"])).all()
    assert (annotations.masks["Edema"] == PIECES["other"]).all()
    assert all(mask.dtype == bool for mask in annotations.masks.values())


def test_boxes_are_grouped_by_label_in_their_order(root, row):
    assert read_annotations(row, root).boxes == {"Mass": [(1, 2, 3, 4), (5, 6, 7, 1)], "Edema": [(0, 0, 2, 2)]}


def test_another_image_of_the_study_has_its_own(root, row):
    annotations = read_annotations(row, root, number=1)
    assert (annotations.image == 9).all()
    assert list(annotations.masks) == ["Effusion"] and (annotations.masks["Effusion"] == PIECES["beside"]).all()
    assert annotations.boxes == {"Mass": [(9, 9, 1, 1)]}
    assert read_annotations(row, str(root), number=1).boxes == annotations.boxes


def test_no_annotations(root, row):
    annotations = read_annotations(row | {"masks": "", "boxes": ""}, root)
    assert annotations.masks == {} and annotations.boxes == {}


def test_a_mask_of_another_size_or_that_is_gone_names_the_study(root, row):
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), np.uint8)).save(root / "two.png")
    with pytest.raises(
        ManifestError, match=r"study 's7', column 'masks': two\.png has 12 x 21 pixels, its image 12 x 20"
    ):
        read_annotations(row, root)
    read_annotations(row, root, number=1)  # that mask is not of this image
    (root / "two.png").unlink()
    with pytest.raises(ManifestError, match=r"study 's7', column 'masks'.*two\.png"):
        read_annotations(row, root)


def test_an_image_that_is_gone(root, row):
    (root / "lateral.png").unlink()
    with pytest.raises(ImageError, match=r"lateral\.png"):
        read_annotations(row, root, number=1)
