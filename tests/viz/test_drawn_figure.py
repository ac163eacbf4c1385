"""Drawn findings: where they are drawn, one colour a label in all pictures, and a legend that can be read."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from gloria_core.viz.annotations import drawn_findings

IMAGE = np.full((20, 30), 90, np.uint8)


def rectangle(top, left, height, width):
    mask = np.zeros(IMAGE.shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def legend(figure):
    """Label -> colour of its handle."""
    (found,) = figure.legends
    texts = [text.get_text() for text in found.get_texts()]
    return {text: to_rgb(handle.get_edgecolor()) for text, handle in zip(texts, found.get_patches(), strict=True)}


def frames(axis):
    """(x, y, width, height) and colour of each box of a picture."""
    return [(*patch.get_bbox().bounds, to_rgb(patch.get_edgecolor())) for patch in axis.patches]


def test_masks_and_boxes_lie_where_they_were_drawn():
    figure = drawn_findings([(IMAGE, {"Edema": rectangle(4, 5, 6, 10)}, {"Mass": [(2, 3, 7, 8)]}, "s1")])
    (axis,) = figure.axes
    x, y = np.concatenate([path.vertices for path in axis.collections[0].get_paths()]).T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((4.5, 14.5, 3.5, 9.5))
    picture, cover = (shown.get_array() for shown in axis.images)
    assert (picture == IMAGE).all()
    assert ((cover[..., 3] > 0) == rectangle(4, 5, 6, 10)).all() and cover.max() <= 1
    # pixel (2, 3) is a square around its centre, so the frame begins half a pixel before it
    ((left, top, width, height, colour),) = frames(axis)
    assert (left, top, width, height) == (1.5, 2.5, 7, 8)
    assert colour == pytest.approx(legend(figure)["Mass"]) and axis.get_title() == "s1"
    assert not plt.get_fignums()


def test_alpha_is_how_much_of_the_image_is_covered():
    figure = drawn_findings([(IMAGE, {"Edema": rectangle(0, 0, 2, 2)}, {}, "")], alpha=0.7)
    assert figure.axes[0].images[1].get_array()[0, 0, 3] == pytest.approx(0.7)


def test_a_label_has_one_colour_in_all_pictures():
    cases = [
        (IMAGE, {"Edema": rectangle(0, 0, 4, 4), "Mass": rectangle(9, 9, 4, 4)}, {}, "a"),
        (IMAGE, {"Mass": rectangle(1, 1, 4, 4)}, {"Mass": [(1, 1, 4, 4)], "Effusion": [(9, 9, 3, 3)]}, "b"),
    ]
    figure = drawn_findings(cases)
    colours = legend(figure)
    assert list(colours) == ["Edema", "Effusion", "Mass"] and len(set(colours.values())) == 3
    first, second = figure.axes
    assert [to_rgb(item.get_edgecolor()[0]) for item in first.collections] == [colours["Edema"], colours["Mass"]]
    assert [to_rgb(item.get_edgecolor()[0]) for item in second.collections] == [colours["Mass"]]
    assert [frame[-1] for frame in frames(second)] == [colours["Mass"], colours["Effusion"]]
    assert tuple(second.images[1].get_array()[1, 1, :3]) == pytest.approx(colours["Mass"])
    assert "n = 2" in figure.get_suptitle()


@pytest.mark.parametrize("n", [1, 9, 10, 14])
def test_labels_differ_from_each_other_and_from_gray(n):
    names = [f"Finding number {k}" for k in range(n)]
    colours = list(
        legend(drawn_findings([(IMAGE, {}, {name: [(k, k, 2, 2)] for k, name in enumerate(names)}, "")])).values()
    )
    assert len(set(colours)) == n
    assert min(max(colour) - min(colour) for colour in colours) > 0.05


@pytest.mark.parametrize(("cases", "more"), [(1, 0), (1, 10), (5, 0)])
def test_the_legend_stays_inside_the_figure_and_leaves_room(cases, more):
    names = ["Atelectasis", "Consolidation", "Enlarged Cardiomediastinum", *(f"Mass {k}" for k in range(more))]
    boxes = {name: [(1, 1, 3, 3)] for name in names}
    figure = drawn_findings([(IMAGE, {}, boxes, "s")] * cases)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, _ = canvas.get_width_height()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0
    picture = figure.axes[0].get_window_extent()
    assert box.y1 <= picture.y0 and picture.width >= 2 * figure.dpi  # a long legend does not eat the picture


def test_pictures_stand_in_rows_and_nothing_drawn_has_no_legend():
    figure = drawn_findings(
        [(IMAGE, {"Edema": rectangle(0, 0, 1, 1) & False}, {}, str(k)) for k in range(5)], columns=3
    )
    assert [axis.get_title() for axis in figure.axes] == ["0", "1", "2", "3", "4", ""]
    assert not any(axis.axison for axis in figure.axes) and not any(axis.collections for axis in figure.axes)
    assert drawn_findings([(IMAGE, {}, {}, "")]).legends == []


def test_no_case_or_a_mask_of_other_pixels():
    with pytest.raises(ValueError, match="at least one case"):
        drawn_findings([])
    with pytest.raises(ValueError, match=r"a mask of \(20, 29\) pixels on an image of \(20, 30\)"):
        drawn_findings([(IMAGE, {"Edema": rectangle(0, 0, 2, 2)[:, 1:]}, {}, "")])
