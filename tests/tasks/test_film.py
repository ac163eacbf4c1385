"""Pictures of training: chosen by name, saved one epoch a file, and without effect on the training."""

import numpy as np
import pytest

from gloria_core.tasks.maps import original_maps
from gloria_core.tasks.phrases import phrases_from_masks
from gloria_core.tasks.snapshots import MapFilm, panel
from gloria_core.viz.attention import film_strip


@pytest.fixture
def phrases(frame):
    return panel(phrases_from_masks(frame), ["Lung Opacity", "Edema", "Pleural Effusion"], 3)


def test_panel_is_one_study_a_label_in_the_order_asked_for(frame, phrases):
    assert [phrase.label for phrase in phrases] == ["Lung Opacity", "Pleural Effusion"]
    assert len({phrase.row for phrase in phrases}) == 2
    assert len(panel(phrases_from_masks(frame), ["Lung Opacity", "Pleural Effusion"], 1)) == 1
    assert panel([], ["Edema"], 3) == []


def test_frames_are_the_maps_of_their_epochs(model, frame, cache, phrases, tmp_path):
    film = MapFilm(tmp_path / "film", frame, cache, phrases, every=2)
    for epoch in (1, 2, 3, 4):
        film(epoch, model)
    assert [found.epoch for found in film.frames()] == [2, 4]
    again = MapFilm(tmp_path / "film", frame, cache, phrases, every=2)  # a resumed run
    again(6, model)
    assert [found.epoch for found in again.frames()] == [2, 4, 6]
    wanted = original_maps(model, frame, cache, phrases, kinds=("cosine",), precision="float32")
    for values, expected in zip(film.frames()[0].maps, wanted, strict=True):
        np.testing.assert_allclose(values, expected["cosine"], rtol=1e-6)


def test_nothing_to_film(model, frame, cache, phrases, tmp_path):
    for film in (
        MapFilm(tmp_path / "a", frame, cache, []),
        MapFilm(tmp_path / "b", frame, cache, phrases, kind="no such map"),
    ):
        film(1, model)
        assert film.frames() == []
    with pytest.raises(ValueError, match="at least 1"):
        MapFilm(tmp_path, frame, cache, phrases, every=0)


def test_strip_has_one_scale_and_one_panel_each():
    image, maps = np.zeros((8, 8), np.uint8), [[np.full((8, 8), 0.1)], [np.full((8, 8), -0.4)]]
    figure = film_strip([image], [1, 3], maps, titles=["Edema: “oedema”"], outlines=[np.eye(8) > 0])
    pictures = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    assert [picture.get_clim() for picture in pictures] == [(-0.4, 0.4)] * 2
    assert [axis.get_title() for axis in figure.axes][:2] == ["epoch 1", "epoch 3"]
    with pytest.raises(ValueError, match="one map an image"):
        film_strip([image], [1], maps, titles=["a"])
