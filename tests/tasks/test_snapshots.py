"""Training snapshots: phrases chosen by label, one file an epoch, and the figure of them."""

import numpy as np
import pytest

from gloria_core.tasks.maps import original_maps
from gloria_core.tasks.phrases import phrases_from_masks
from gloria_core.tasks.snapshots import MapSnapshots, one_phrase_per_label
from gloria_core.viz.attention import snapshot_strip


@pytest.fixture
def phrases(frame):
    return one_phrase_per_label(phrases_from_masks(frame), ["Lung Opacity", "Edema", "Pleural Effusion"], 3)


def test_one_phrase_per_label_in_the_order_of_the_labels(frame, phrases):
    assert [phrase.label for phrase in phrases] == ["Lung Opacity", "Pleural Effusion"]
    assert len({phrase.row for phrase in phrases}) == 2
    assert len(one_phrase_per_label(phrases_from_masks(frame), ["Lung Opacity", "Pleural Effusion"], 1)) == 1
    assert one_phrase_per_label([], ["Edema"], 3) == []


def test_snapshots_are_the_maps_of_their_epochs(model, frame, cache, phrases, tmp_path):
    snapshots = MapSnapshots(tmp_path / "maps", frame, cache, phrases, every=2)
    for epoch in (1, 2, 3, 4):
        snapshots(epoch, model)
    assert list(snapshots.load()) == [2, 4]
    again = MapSnapshots(tmp_path / "maps", frame, cache, phrases, every=2)  # a resumed run
    again(6, model)
    assert list(again.load()) == [2, 4, 6]
    wanted = original_maps(model, frame, cache, phrases, kinds=("cosine",))
    for values, expected in zip(snapshots.load()[2], wanted, strict=True):
        np.testing.assert_allclose(values, expected["cosine"], rtol=1e-6)


def test_nothing_is_saved_without_phrases_or_maps(model, frame, cache, phrases, tmp_path):
    for snapshots in (
        MapSnapshots(tmp_path / "a", frame, cache, []),
        MapSnapshots(tmp_path / "b", frame, cache, phrases, kind="no such map"),
    ):
        snapshots(1, model)
        assert snapshots.load() == {}
    with pytest.raises(ValueError, match="at least 1"):
        MapSnapshots(tmp_path, frame, cache, phrases, every=0)


def test_strip_has_one_scale_and_one_panel_each():
    image, maps = np.zeros((8, 8), np.uint8), [[np.full((8, 8), 0.1)], [np.full((8, 8), -0.4)]]
    figure = snapshot_strip([image], [1, 3], maps, titles=["Edema: “oedema”"], outlines=[np.eye(8) > 0])
    pictures = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    assert [picture.get_clim() for picture in pictures] == [(-0.4, 0.4)] * 2
    assert [axis.get_title() for axis in figure.axes][:2] == ["epoch 1", "epoch 3"]
    with pytest.raises(ValueError, match="one map an image"):
        snapshot_strip([image], [1], maps, titles=["a"])
