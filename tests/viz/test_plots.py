"""The shared figures: what is drawn is what was given, at its place, in its colour."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from gloria_core.viz import plots
from gloria_core.viz.plots import Mark, annotated_images, image_grid

IMAGE = np.full((20, 30), 90, np.uint8)


def rectangle(top, left, height, width):
    mask = np.zeros(IMAGE.shape, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def legend(figure):
    """Label -> colour of its handle."""
    (found,) = figure.legends
    texts = [text.get_text() for text in found.get_texts()]
    return {text: to_rgb(handle.get_color()) for text, handle in zip(texts, found.get_lines(), strict=True)}


def frames(axis):
    """(x, y, width, height) and colour of each box of an image."""
    return [(*patch.get_bbox().bounds, to_rgb(patch.get_edgecolor())) for patch in axis.patches]


def texts_of(figure):
    figure.draw_without_rendering()
    return [t.get_text() for axis in figure.axes for t in [axis.title, *axis.texts, *axis.get_yticklabels()]]


def metric_rows(objectives=("gloria", "random"), targets=("Edema", "macro"), **more):
    rows = [
        {"objective": o, "target": t, "metric": "auroc", "value": 0.9 - 0.3 * i, "ci_low": 0.85 - 0.3 * i}
        | {"ci_high": 0.95 - 0.3 * i, "n": 120}
        | more
        for i, o in enumerate(objectives)
        for t in targets
    ]
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------------------ images


def test_grid_shows_every_image_and_hides_empty_places():
    images = [np.full((8, 8), i, dtype=np.uint8) for i in range(6)]
    figure = image_grid([*images[:3], None, *images[3:]], [f"study {i}" for i in range(7)], title="Six")
    shown = [axis for axis in figure.axes if axis.images]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in shown] == list(range(6))
    assert [axis.get_title() for axis in shown] == [f"study {i}" for i in (0, 1, 2, 4, 5, 6)]
    assert shown[0].images[0].get_clim() == (0, 255)  # a dark image stays dark
    assert figure.get_suptitle() == "Six (n = 6)" and len(figure.axes) == 10 and not figure.legends
    with pytest.raises(ValueError, match="2 titles"):
        image_grid(images, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        image_grid([None])


def test_masks_and_boxes_lie_where_they_were_annotated():
    figure = annotated_images([(IMAGE, {"Edema": rectangle(4, 5, 6, 10)}, {"Mass": [(2, 3, 7, 8)]}, "s1")])
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
    filled = annotated_images([(IMAGE, {"Edema": rectangle(0, 0, 2, 2)}, {}, "")], fill=0.7)
    assert filled.axes[0].images[1].get_array()[0, 0, 3] == pytest.approx(0.7)


def test_outline_of_a_mask_at_the_border_stays_on_the_image():
    (axis,) = image_grid([IMAGE], marks=[[Mark("truth", mask=rectangle(0, 20, 6, 10))]]).axes
    x, y = np.concatenate([path.vertices for path in axis.collections[0].get_paths()]).T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((19.5, 29.5, -0.5, 5.5))
    assert axis.get_xlim() == (-0.5, 29.5) and axis.get_ylim() == (19.5, -0.5)


def test_a_label_has_one_colour_in_all_images():
    cases = [
        (IMAGE, {"Edema": rectangle(0, 0, 4, 4), "Mass": rectangle(9, 9, 4, 4)}, {}, "a"),
        (IMAGE, {"Mass": rectangle(1, 1, 4, 4)}, {"Mass": [(1, 1, 4, 4)], "Effusion": [(9, 9, 3, 3)]}, "b"),
    ]
    figure = annotated_images(cases)
    colours = legend(figure)
    assert list(colours) == ["Edema", "Effusion", "Mass"] and len(set(colours.values())) == 3
    first, second = figure.axes
    assert [to_rgb(item.get_edgecolor()[0]) for item in first.collections] == [colours["Edema"], colours["Mass"]]
    assert [to_rgb(item.get_edgecolor()[0]) for item in second.collections] == [colours["Mass"]]
    assert [frame[-1] for frame in frames(second)] == [colours["Mass"], colours["Effusion"]]
    assert tuple(second.images[1].get_array()[1, 1, :3]) == pytest.approx(colours["Mass"])


@pytest.mark.parametrize("n", [1, 9, 10, 14])
def test_labels_differ_from_each_other_and_from_gray(n):
    boxes = {f"Finding number {k}": [(k, k, 2, 2)] for k in range(n)}
    colours = list(legend(annotated_images([(IMAGE, {}, boxes, "")])).values())
    assert len(set(colours)) == n
    assert min(max(colour) - min(colour) for colour in colours) > 0.05


@pytest.mark.parametrize(("cases", "more"), [(1, 0), (1, 10), (5, 0)])
def test_the_legend_stays_inside_the_figure_and_leaves_room(cases, more):
    names = ["Atelectasis", "Consolidation", "Enlarged Cardiomediastinum", *(f"Mass {k}" for k in range(more))]
    figure = annotated_images([(IMAGE, {}, {name: [(1, 1, 3, 3)] for name in names}, "s")] * cases)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, _ = canvas.get_width_height()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0
    picture = figure.axes[0].get_window_extent()
    assert box.y1 <= picture.y0 and picture.width >= 2 * figure.dpi  # a long legend does not eat the image


def test_a_mask_of_other_pixels_is_refused():
    with pytest.raises(ValueError, match=r"a mask of \(20, 29\) pixels on an image of \(20, 30\)"):
        annotated_images([(IMAGE, {"Edema": rectangle(0, 0, 2, 2)[:, 1:]}, {}, "")])


# ----------------------------------------------------------------------------------------------- metrics' intervals


def test_bars_of_auroc_start_at_chance():
    figure = plots.metric_bars(metric_rows())
    axis = figure.axes[0]
    bars = [bar for container in axis.containers for bar in container if hasattr(bar, "get_width")]
    assert {bar.get_x() for bar in bars} == {0.5}
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.4, 0.4, 0.1, 0.1])
    texts = texts_of(figure)
    assert "Edema (n = 120)" in texts and "0.90" in texts and "0.60" in texts
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in axis.lines]
    assert bars[0].get_facecolor()[:3] == pytest.approx(plots.colour_of("gloria"))
    below = metric_rows(objectives=("gloria",)).assign(value=0.1, ci_low=0.05, ci_high=0.2)
    assert plots.metric_bars(below).axes[0].get_xlim()[0] < 0.05  # bad values stay in view


def test_bars_of_several_metrics_with_ticks_at_chance():
    rows = pd.concat([metric_rows(("",), metric=f"precision_at_{k}", chance=0.2, n_boxes=7) for k in (1, 5)])
    figure = plots.metric_bars(rows, by="metric", metric="precision", count="n_boxes")
    axis = figure.axes[0]
    ticks = [point for collection in axis.collections for point in np.ma.getdata(collection.get_offsets())]
    assert sum(np.isclose(point[0], 0.2) for point in ticks) == 4 and "Edema (n boxes = 7)" in texts_of(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["precision at 1", "precision at 5"]


def test_what_does_not_apply_is_a_dash_and_doubles_are_refused():
    rows = metric_rows()
    rows.loc[0, ["value", "ci_low", "ci_high"]] = np.nan
    rows.loc[1, ["ci_low", "ci_high"]] = np.nan
    assert texts_of(plots.metric_bars(rows)).count("-") == 1
    assert texts_of(plots.metric_bars(rows)).count("0.90 (-)") == 1  # a number without an interval says so
    with pytest.raises(ValueError, match="one row per target"):
        plots.metric_bars(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="at least one"):
        plots.metric_bars(rows, metric="auprc")


@pytest.mark.parametrize("rows", [metric_rows().drop(columns="objective"), metric_rows().assign(objective="")])
def test_bars_of_one_model_need_no_name_and_no_legend(rows):
    figure = plots.metric_bars(rows.drop_duplicates(["target", "metric"]))
    assert not figure.legends
    assert texts_of(figure).count("0.90") == 2


def test_intervals_end_at_a_point_beside_them():
    rows = pd.DataFrame({"value": [0.5, 0.5], "ci_low": [0.52, np.nan], "ci_high": [0.6, np.nan]})
    np.testing.assert_allclose(plots.intervals(rows), [[0.0, np.nan], [0.1, np.nan]])


def test_label_efficiency_is_the_mean_over_seeds_with_range_and_intervals():
    rows = pd.DataFrame(
        {"objective": "gloria", "target": "macro", "metric": "auroc", "n": 90}
        | {"label_fraction": [0.01, 0.01, 1.0], "seed": [0, 1, 0], "value": [0.6, 0.8, 0.9]}
    ).assign(ci_low=lambda table: table["value"] - 0.05, ci_high=lambda table: table["value"] + 0.05)
    figure = plots.label_efficiency(rows)
    axis = figure.axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0.01, 0.7], [1.0, 0.9]])
    band, bars = axis.collections
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.6) and axis.get_xscale() == "log"
    np.testing.assert_allclose([line[:, 1] for line in bars.get_segments()], [[0.55, 0.65], [0.75, 0.85], [0.85, 0.95]])
    figure.draw_without_rendering()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1 %", "100 %"]
    assert figure.get_suptitle() == "Linear probe (n = 90 test studies, 2 seeds)"
    both = plots.label_efficiency(pd.concat([rows, rows.assign(objective="random")]))
    assert len(both.axes[0].collections) == 2  # the ranges only: the intervals of two objectives would hide each other
    with pytest.raises(ValueError, match="'Edema'"):
        plots.label_efficiency(rows, target="Edema")


def test_label_efficiency_draws_baselines_of_both_kinds():
    rows = [
        ("macro", metric, value + 0.1 * seed, value - 0.1, value + 0.3, 100, fraction, seed)
        for metric, value in (("dice_pooled", 0.4), ("dice_pooled_prior", 0.1))
        for fraction in (0.01, 1.0)
        for seed in (0, 1)
    ]
    columns = ["target", "metric", "value", "ci_low", "ci_high", "n", "label_fraction", "seed"]
    table = pd.DataFrame(rows, columns=columns)
    figure = plots.label_efficiency(table, {"dice_pooled": {"mean mask": "dice_pooled_prior", "empty": 0.05}})
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["mean"] == pytest.approx([0.45, 0.45]) and lines["mean mask"] == pytest.approx([0.15, 0.15])
    assert lines["empty (0.05)"] == [0.05, 0.05]
    table.loc[0, ["value", "ci_low", "ci_high"]] = np.nan  # a macro that is not defined is not drawn
    plots.label_efficiency(table, {"dice_pooled": {}})
    with pytest.raises(ValueError, match="no row of metric 'dice_all'"):
        plots.label_efficiency(table, {"dice_all": {}})


def test_objectives_keep_their_colours_and_unknown_ones_get_none_of_theirs():
    known = ["gloria", "convirt", "mgca", "prior", "cxr_clip", "imagenet", "random"]
    assert len({plots.colour_of(name) for name in known}) == len(known)
    assert plots.colour_of("mine") not in {plots.colour_of(name) for name in known}


# ---------------------------------------------------------------------------------------------- training and data


def test_loss_history_has_one_axis_a_term_and_marks_the_best_epoch():
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "learning_rate": 0.1, "train_total": [3, 2, 1], "train_local": [2, 1, 0]}
    )
    history["valid_total"] = [3.0, 1.5, 2.0]
    figure = plots.loss_history(history, title="gloria")
    used = [axis for axis in figure.axes if axis.lines]
    assert [axis.get_title() for axis in used] == ["total", "local"]
    np.testing.assert_array_equal(used[0].lines[1].get_ydata(), [3.0, 1.5, 2.0])
    assert [ring.get_offsets().tolist() for ring in used[0].collections] == [[[2, 2]], [[2, 1.5]]]
    assert "n = 3 epochs" in figure.get_suptitle()
    with pytest.raises(ValueError, match="train_<term>"):
        plots.loss_history(pd.DataFrame({"epoch": [1]}))
    assert plots.loss_history(history.drop(columns="valid_total")).axes[0].lines


def test_prevalence_bars_are_the_shares():
    frame = pd.DataFrame({"Edema": [1, 1, -1, np.nan], "Fracture": [0, 0, 0, 0]})
    figure = plots.label_prevalence(frame, ["Edema", "Fracture"])
    widths = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]
    np.testing.assert_allclose(widths, [[0.5, 0], [0.25, 0], [0, 1], [0.25, 0]])
    texts = texts_of(figure)
    assert "2 positive" in texts and "0 positive" in texts and "Labels (n = 4 studies)" in texts


def test_report_lengths_count_words_and_empty_sections():
    frame = pd.DataFrame({"findings": ["a b c", "a b c", "a"], "impression": ["", " ", ""]})
    figure = plots.report_lengths(frame)
    assert figure.axes[0].get_title() == "findings: 3 with text, 0 empty\ndashed: median 3 words"
    assert figure.axes[1].get_title() == "impression: 0 with text, 3 empty"
    assert sorted(bar.get_height() for bar in figure.axes[0].patches if bar.get_height()) == [1, 2]
    assert figure.get_suptitle().endswith("(n = 3 studies)")
