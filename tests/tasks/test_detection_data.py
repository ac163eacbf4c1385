import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gloria_core.checkpoints.model import ModelConfig
from gloria_core.data.cache import ImageCache
from gloria_core.tasks.annotated_images import choose_annotations
from gloria_core.tasks.detection.data import box_data as read_boxes
from gloria_core.tasks.detection.data import boxes_of_mask

BOX = {"label": "Lung Opacity", "image": 0, "xywh": [10, 20, 20, 20]}


def box_data(frame, cache, **options):
    return read_boxes(SimpleNamespace(config=ModelConfig(crop=56)), frame, cache, **options)


def _with(frame, study, *entries):
    """The frame with other boxes for one study."""
    frame = frame.reset_index(drop=True)
    frame.loc[study, "boxes"] = json.dumps(list(entries)) if entries else ""
    return frame


def test_boxes_go_through_the_geometry(frame, cache):
    data = box_data(frame, cache)
    assert data.labels == ("Lung Opacity",) and len(data) == 8 and data.side == data.crop == 64
    # even studies are 64 x 64 and stay; odd ones are 80 high, 60 wide: times 0.8, and (64 - 48) / 2 = 8 from the left
    np.testing.assert_allclose(data.truths[0].boxes, [[10, 20, 30, 40]])
    np.testing.assert_allclose(data.truths[1].boxes, [[16, 16, 32, 32]])
    assert data.truths[0].boxes.dtype == np.float32 and data.images([1, 0]).shape == (2, 64, 64)
    np.testing.assert_array_equal(data.images([1])[0], cache["images/1.png"])
    # the bright square of the picture lies in the box
    assert data.images([1])[0, 17:31, 17:31].min() > 200


def test_boxes_are_clipped_and_images_padded(frame, cache, tmp_path, root):
    frame = _with(frame, 0, BOX | {"xywh": [-5, 40, 30, 40]})
    np.testing.assert_allclose(box_data(frame, cache).truths[0].boxes, [[0, 40, 25, 64]])
    small = ImageCache.build(frame, root, size=48, folder=tmp_path, workers=1, progress=False)
    data = box_data(frame, small)  # the whole image, whatever the crop of the model
    assert (data.crop, data.side) == (48, 64) and data.pixels([0]).shape == (1, 3, 64, 64)
    images = data.images([0])
    assert images[0, :48, :48].any() and not images[0, 48:].any() and not images[0, :, 48:].any()


def test_studies_without_boxes_are_negatives(frame, cache):
    data = box_data(_with(frame, 3), cache)
    assert len(data.truths[3]) == 0 and data.truths[3].boxes.shape == (0, 4)
    assert data.counts([2, 3]).tolist() == [1] and data.counts([]).tolist() == [0]
    assert data.positives()["Lung Opacity"].tolist() == [True] * 3 + [False] + [True] * 4


def test_only_asked_labels_and_the_frontal_image_count(frame, cache):
    frame = _with(frame, 0, BOX, BOX | {"label": "Pleural Effusion"}, BOX | {"image": 1})
    frame.loc[0, "images"], frame.loc[0, "views"] = "images/0.png;images/1.png", "PA;LATERAL"
    assert len(box_data(frame, cache, labels=["Pleural Effusion"]).truths[0]) == 1
    both = box_data(frame, cache)
    assert both.labels == ("Pleural Effusion", "Lung Opacity")  # the order of the manifest
    assert sorted(both.truths[0].labels.tolist()) == [0, 1]


def test_bad_boxes_name_the_study(frame, cache):
    for box, word in (
        ([10, 10, 0, 5], "degenerate"),
        ([10, 10, 5, -2], "degenerate"),
        ([float("nan"), 1, 2, 3], "degenerate"),
        ([100, 10, 5, 5], "outside"),
        ([-20, 10, 5, 5], "outside"),
    ):
        with pytest.raises(ValueError, match=f"study s2.*{word}"):
            box_data(_with(frame, 2, BOX | {"xywh": box}), cache)


def test_boxes_of_masks(frame, cache, root):
    mask = np.zeros((10, 12), bool)
    mask[1:3, 2:5] = mask[3, 5] = True  # touches at a corner
    mask[7:9, 8:12] = True
    assert boxes_of_mask(mask).tolist() == [[2, 1, 4, 3], [8, 7, 4, 2]]
    assert boxes_of_mask(np.zeros((4, 4))).shape == (0, 4)
    data = box_data(frame, cache, source="masks", root=root)
    assert data.labels == ("Pleural Effusion", "Lung Opacity")
    np.testing.assert_allclose(data.truths[0].boxes, [[10, 20, 30, 40]])
    assert data.truths[0].labels.tolist() == [0] and data.truths[1].labels.tolist() == [1]
    assert len(data.truths[2]) == 0
    empty = frame.assign(boxes="")
    assert choose_annotations(empty, ["boxes", "masks"]).source == "masks"
    with pytest.raises(ValueError, match="no box of any label in 8 studies"):
        box_data(empty, cache)


def test_two_parts_are_two_boxes(frame, tmp_path, root, cache):
    mask = np.zeros((64, 64), np.uint8)
    mask[5:10, 5:10] = mask[30:40, 40:60] = 255
    (tmp_path / "masks").mkdir()
    for study in range(8):
        Image.fromarray(mask if study % 2 == 0 else np.zeros((80, 60), np.uint8)).save(tmp_path / f"masks/{study}.png")
    data = box_data(frame, cache, source="masks", root=tmp_path)
    np.testing.assert_allclose(data.truths[0].boxes, [[5, 5, 10, 10], [40, 30, 60, 40]])


def test_errors(frame, cache):
    with pytest.raises(ValueError, match="no box of Edema"):
        box_data(frame, cache, labels=["Edema"])


def test_cached_images_are_not_changed(frame, cache):
    assert isinstance(cache, ImageCache)
    before = cache["images/0.png"].copy()
    box_data(frame, cache).images([0])[...] = 0
    np.testing.assert_array_equal(cache["images/0.png"], before)
