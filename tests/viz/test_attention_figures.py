"""Maps over radiographs: colours, signs, outlines, and the controls beside them."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from gloria_core.tasks.phrases import Phrase
from gloria_core.viz.attention import (
    TRUTH,
    attention_row,
    control_bars,
    phrase_figure,
    snapshot_figure,
    word_figure,
)

IMAGE = np.zeros((40, 30), dtype=np.uint8)


def _maps():
    values = np.linspace(0.0, 1.0, 40 * 30).reshape(40, 30)
    outside = values.copy()
    outside[:5] = np.nan
    return {"attention": outside, "cosine": values - 0.25, "word_softmax": None}


def _map_axes(figure):
    return [axis for axis in figure.axes if len(axis.images) == 2]


def test_image_alone_then_every_map_with_its_bar():
    figure = attention_row(IMAGE, _maps(), title="small effusion", scores={"attention": "CNR 0.35"})
    assert len(figure.axes) == 3 + 3  # images and their bars
    assert [axis.get_title().strip() for axis in figure.axes[:3]] == ["image", "attention\nCNR 0.35", "cosine"]
    assert figure.get_suptitle() == "small effusion (n = 1 image, 2 maps)"
    labels = [axis.get_xlabel() for axis in figure.axes[3:]]
    assert "lowest to highest" in labels[1] and "cosine\n(0 in the middle" in labels[2]


def test_signed_maps_are_centred_and_unseen_pixels_are_transparent():
    attention, cosine = _map_axes(attention_row(IMAGE, _maps(), title="x"))
    assert cosine.images[1].get_clim() == pytest.approx((-0.75, 0.75))
    low, high = attention.images[1].get_clim()
    assert low == pytest.approx(np.nanmin(_maps()["attention"])) and high == 1.0
    overlay = attention.images[1]
    assert overlay.get_array().mask[:5].all() and not overlay.get_array().mask[5:].any()
    rgba = overlay.cmap(overlay.norm(overlay.get_array()))
    assert (rgba[:5, :, 3] == 0).all() and (rgba[5:, :, 3] > 0).all()


def test_rounding_errors_of_a_flat_map_get_no_colours():
    flat = np.full(IMAGE.shape, 0.25)
    flat[3:9, 4:7] += 1e-7
    figure = attention_row(IMAGE, {"word_softmax": flat}, title="x")
    low, high = _map_axes(figure)[0].images[1].get_clim()
    assert low == pytest.approx(0.125) and high == pytest.approx(0.375)
    assert "the same everywhere" in figure.axes[-1].get_xlabel()
    flat[3:9, 4:7] += 1e-3
    shown = _map_axes(attention_row(IMAGE, {"word_softmax": flat}, title="x"))[0].images[1].get_clim()
    assert shown == pytest.approx((0.25, 0.251), abs=1e-6)


def test_kind_comes_from_the_last_word_of_a_name_or_is_given():
    values = np.linspace(0.1, 1.0, 40 * 30).reshape(40, 30)
    named, given = (
        _map_axes(attention_row(IMAGE, maps, title="x", kind=kind))[0].images[1].get_clim()
        for maps, kind in (({"gloria\ncosine": values}, ""), ({"effusion": values}, "cosine"))
    )
    assert named == given == (-1.0, 1.0)


def test_outline_is_drawn_around_the_right_pixels():
    mask = np.zeros(IMAGE.shape, dtype=bool)
    mask[10:20, 0:8] = True
    figure = attention_row(IMAGE, _maps(), title="x", outlines=[mask])
    for axis in figure.axes[:3]:
        (contour,) = [c for c in axis.collections if c.get_paths()]
        vertices = np.concatenate([path.vertices for path in contour.get_paths()])
        np.testing.assert_allclose(vertices.min(axis=0), [-0.5, 9.5])  # closed at the border of the image
        np.testing.assert_allclose(vertices.max(axis=0), [7.5, 19.5])
        assert axis.get_xlim() == (-0.5, 29.5) and axis.get_ylim() == (39.5, -0.5)


def test_outline_appears_on_the_rendered_picture():
    mask = np.zeros(IMAGE.shape, dtype=bool)
    mask[10:20, 10:20] = True
    figure = attention_row(IMAGE, {}, title="x", outlines=[mask])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    x, y = figure.axes[0].transData.transform((15, 9.5))
    column, row = round(x), round(picture.shape[0] - y)
    near = picture[row - 3 : row + 4, column]
    assert np.abs(near - to_rgb(TRUTH)).sum(axis=1).min() < 0.15
    inside = picture[round(picture.shape[0] - figure.axes[0].transData.transform((15, 15))[1]), column]
    assert inside.max() < 0.1


def test_boxes_use_the_pixel_corners():
    figure = attention_row(IMAGE, _maps(), title="x", boxes=[(3, 4, 10, 20)])
    (box,) = figure.axes[1].patches
    assert (box.get_x(), box.get_y(), box.get_width(), box.get_height()) == (2.5, 3.5, 10, 20)


def test_a_map_that_saw_nothing_says_so():
    figure = attention_row(IMAGE, {"cosine": np.full(IMAGE.shape, np.nan)}, title="x")
    assert figure.axes[1].texts[0].get_text().startswith("outside")


def test_other_pixels_are_refused():
    with pytest.raises(ValueError, match=r"map 'cosine' has \(4, 4\) pixels"):
        attention_row(IMAGE, {"cosine": np.zeros((4, 4))}, title="x")
    with pytest.raises(ValueError, match="a mask of"):
        attention_row(IMAGE, {}, title="x", outlines=[np.zeros((4, 4), dtype=bool)])


def test_control_bars_show_values_in_order():
    rows = pd.DataFrame(
        [
            {
                "kind": kind,
                "control": control,
                "target": "macro",
                "score": metric,
            }
            | {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": 50, "chance": 0.08}
            for kind, control, value in (("cosine", "", 1.2), ("cosine", "inverted", -1.2), ("prior", "uniform", 0.0))
            for metric in ("cnr", "pointing_game")
        ]
    )
    figure = control_bars(rows)
    cnr, pointing = figure.axes
    assert [bar.get_width() for bar in cnr.patches] == [1.2, -1.2, 0.0]
    assert [t.get_text() for t in cnr.get_yticklabels()] == ["cosine", "cosine: inverted", "prior: uniform"]
    assert [0.0, 0.0] in [list(line.get_xdata()) for line in cnr.lines]
    assert [0.08, 0.08] in [list(line.get_xdata()) for line in pointing.lines]
    assert "n = 50 phrases" in figure.get_suptitle()
    with pytest.raises(ValueError, match="one target"):
        control_bars(pd.concat([rows, rows.assign(target="Edema")]))


@pytest.fixture
def made(monkeypatch, tmp_path):
    """Data of one study of IMAGE whose map of a phrase has the value of its first character's place."""

    def original_maps(model, frame, cache, phrases, *, kinds=("attention", "cosine")):
        return [{kind: np.full(IMAGE.shape, float(phrase.spans[0][0])) for kind in kinds} for phrase in phrases]

    monkeypatch.setattr("gloria_core.viz.attention.original_maps", original_maps)
    monkeypatch.setattr("gloria_core.viz.attention.read_gray", lambda path: IMAGE)
    monkeypatch.setattr(
        "gloria_core.viz.attention.region", lambda phrase, geometry, root: np.eye(*IMAGE.shape, dtype=bool)
    )
    return SimpleNamespace(cache=SimpleNamespace(geometry=lambda path: None), root=tmp_path)


PHRASE = Phrase(0, "Edema", "impression", "Mild edema, 2 cm.", ((5, 10),), "a.png", masks=("m.png",))
FRAME = pd.DataFrame({"study_id": ["s7"]})


def test_phrase_figure_has_every_map_with_its_scores(made):
    rows = {"kind": ["attention", "cosine", "cosine"], "control": ["", "", "inverted"]}
    scores = pd.DataFrame(rows | {"cnr": [0.1, 0.25, -0.25], "pointing_game": [0.0, 1.0, 0.0]})
    figure = phrase_figure(None, made, FRAME, PHRASE, scores=scores)
    titles = [axis.get_title().strip() for axis in _map_axes(figure)]
    assert titles == ["attention\nCNR 0.10, hit 0", "cosine\nCNR 0.25, hit 1"]
    assert "s7, Edema: “edema”" in figure.get_suptitle()


def test_word_figure_has_one_map_a_word_and_none_of_numbers(made):
    figure = word_figure(None, made, FRAME, PHRASE)
    assert [axis.get_title().strip() for axis in _map_axes(figure)] == ["Mild", "edema", "cm"]
    assert [axis.images[1].get_array().max() for axis in _map_axes(figure)] == [0, 5, 14]


def snapshots_of(made, *maps):
    """Snapshots of two phrases after epochs 1, 4 ...: maps[e][i] is that of phrase i."""
    saved = {1 + 3 * number: list(values) for number, values in enumerate(maps)}
    return SimpleNamespace(phrases=[PHRASE] * 2, load=lambda: saved, cache=made.cache, folder=made.root)


def test_snapshots_share_one_scale_and_an_unseen_map_is_left_blank(made):
    values, unseen = np.full(IMAGE.shape, -0.5), np.full(IMAGE.shape, np.nan)
    figure = snapshot_figure(snapshots_of(made, (values / 2, unseen), (values, unseen)), made.root)
    axes = _map_axes(figure)
    assert [axis.images[1].get_clim() for axis in axes[:2]] == [(-0.5, 0.5)] * 2
    assert [axis.get_title() for axis in axes] == ["epoch 1", "epoch 4", "", ""]
    assert axes[0].get_ylabel() == axes[2].get_ylabel() == "Edema: “edema”"
    figure.draw_without_rendering()
    blank = snapshot_figure(snapshots_of(made, (unseen, unseen)), made.root)
    assert np.isfinite(_map_axes(blank)[0].images[1].get_clim()).all()
    with pytest.raises(ValueError, match="holds no snapshot"):
        snapshot_figure(snapshots_of(made), made.root)
