import json

import numpy as np
import pytest
from PIL import Image

from gloria_core.data.cache import ImageCache
from gloria_core.tasks.annotated_images import choose_annotations
from gloria_core.tasks.detection.data import box_data, boxes_of_mask

BOX = {"label": "Lung Opacity", "image": 0, "xywh": [10, 20, 20, 20]}


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


def test_crop_moves_and_clips(frame, cache):
    frame = _with(frame, 0, BOX | {"xywh": [0, 0, 40, 40]}, BOX | {"xywh": [0, 0, 9, 64]})
    data = box_data(frame, cache, crop=48)
    assert data.crop == 48 and data.side == 64
    np.testing.assert_allclose(data.truths[0].boxes, [[0, 0, 32, 32]])  # the crop begins at 8
    images = data.images([0])
    assert images.shape == (1, 64, 64) and not images[0, 48:].any() and not images[0, :, 48:].any()
    left = data.excluded
    assert left["study_id"].tolist() == ["s0"] and "8%" in left["reason"].iloc[0]
    kept = box_data(frame, cache, crop=48, min_visibility=0.0)
    assert len(kept.truths[0]) == 2 and kept.excluded.empty


def test_studies_without_boxes_are_negatives(frame, cache):
    data = box_data(_with(frame, 3), cache)
    assert len(data.truths[3]) == 0 and data.truths[3].boxes.shape == (0, 4)
    assert data.counts([2, 3]).tolist() == [1] and data.counts([]).tolist() == [0]


def test_positive_labels_without_boxes_can_be_left_out(frame, cache):
    bare = _with(frame, 3)  # Lung Opacity is 1 in odd studies
    data = box_data(bare, cache, unboxed="exclude")
    assert "s3" not in data.frame["study_id"].tolist() and len(data) == 7 == len(data.paths) == len(data.truths)
    assert data.excluded["study_id"].tolist() == ["s3"]
    negative = _with(frame, 2)  # 0 in even ones
    assert len(box_data(negative, cache, unboxed="exclude")) == 8


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
    with pytest.raises(ValueError, match="unboxed"):
        box_data(frame, cache, unboxed="ignore")


def test_cached_images_are_not_changed(frame, cache):
    assert isinstance(cache, ImageCache)
    before = cache["images/0.png"].copy()
    box_data(frame, cache).images([0])[...] = 0
    np.testing.assert_array_equal(cache["images/0.png"], before)
