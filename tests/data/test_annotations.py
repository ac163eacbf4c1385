"""Annotations of an image: pieces of a finding put together, and only those of the image that is asked for."""

import json

import numpy as np
import pytest
from PIL import Image

from gloria_core.data.annotations import read_annotations
from gloria_core.data.images import ImageError
from gloria_core.data.manifest import ManifestError

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
    drawn = read_annotations(row, root)
    assert drawn.image.shape == (HEIGHT, WIDTH) and (drawn.image == 7).all()
    assert set(drawn.masks) == {"Effusion", "Edema"}
    assert (drawn.masks["Effusion"] == (PIECES["one"] | PIECES["two"])).all()
    assert (drawn.masks["Edema"] == PIECES["other"]).all()
    assert all(mask.dtype == bool for mask in drawn.masks.values())


def test_boxes_are_grouped_by_label_in_their_order(root, row):
    assert read_annotations(row, root).boxes == {"Mass": [(1, 2, 3, 4), (5, 6, 7, 1)], "Edema": [(0, 0, 2, 2)]}


def test_another_image_of_the_study_has_its_own(root, row):
    drawn = read_annotations(row, root, number=1)
    assert (drawn.image == 9).all()
    assert list(drawn.masks) == ["Effusion"] and (drawn.masks["Effusion"] == PIECES["beside"]).all()
    assert drawn.boxes == {"Mass": [(9, 9, 1, 1)]}
    assert read_annotations(row, str(root), number=1).boxes == drawn.boxes


def test_no_annotations(root, row):
    drawn = read_annotations(row | {"masks": "", "boxes": ""}, root)
    assert drawn.masks == {} and drawn.boxes == {}


def test_a_mask_of_another_size_or_that_is_gone_names_the_study(root, row):
    Image.fromarray(np.zeros((HEIGHT, WIDTH + 1), np.uint8)).save(root / "two.png")
    with pytest.raises(
        ManifestError, match=r"study 's7', column 'masks': two\.png has 12 x 21 pixels, its image 12 x 20"
    ):
        read_annotations(row, root)
    read_annotations(row, root, number=1)  # that mask is not drawn on this image
    (root / "two.png").unlink()
    with pytest.raises(ManifestError, match=r"study 's7', column 'masks'.*two\.png"):
        read_annotations(row, root)


def test_an_image_that_is_gone(root, row):
    (root / "lateral.png").unlink()
    with pytest.raises(ImageError, match=r"lateral\.png"):
        read_annotations(row, root, number=1)
