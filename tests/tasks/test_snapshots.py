"""Training snapshots: phrases chosen by label, one file an epoch, and the figure of them."""

import numpy as np
import pytest

from gloria_core.tasks.maps import original_maps
from gloria_core.tasks.phrases import phrases_from_masks
from gloria_core.tasks.snapshots import MapSnapshots, one_phrase_per_label
from gloria_core.viz.attention import snapshot_figure


@pytest.fixture
def phrases(frame):
    return one_phrase_per_label(phrases_from_masks(frame), ["Lung Opacity", "Edema", "Pleural Effusion"], 3)


def test_one_phrase_per_label_in_the_order_of_the_labels(frame, phrases):
    assert [phrase.label for phrase in phrases] == ["Lung Opacity", "Pleural Effusion"]
    assert len({phrase.row for phrase in phrases}) == 2
    assert len(one_phrase_per_label(phrases_from_masks(frame), ["Lung Opacity", "Pleural Effusion"], 1)) == 1
    assert one_phrase_per_label([], ["Edema"], 3) == []


def test_snapshots_are_the_maps_of_their_epochs(model, frame, cache, root, phrases, tmp_path):
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
    drawn = [axis.images[1].get_array() for axis in snapshot_figure(snapshots, root).axes if len(axis.images) == 2]
    assert [values.shape for values in drawn] == [values.shape for values in snapshots.load()[2] for _ in (2, 4, 6)]


def test_nothing_is_saved_without_phrases_or_maps(model, frame, cache, phrases, tmp_path):
    for snapshots in (
        MapSnapshots(tmp_path / "a", frame, cache, []),
        MapSnapshots(tmp_path / "b", frame, cache, phrases, kind="no such map"),
    ):
        snapshots(1, model)
        assert snapshots.load() == {}
    with pytest.raises(ValueError, match="at least 1"):
        MapSnapshots(tmp_path, frame, cache, phrases, every=0)
