import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from gloria_core.viz.attention import TRUTH
from gloria_core.viz.segmentation import PREDICTION, dice_by_fraction, fit_curves, overlays


def case(truth, prediction, name="s1 Edema, Dice 0.50"):
    return np.full(truth.shape, 90, np.uint8), truth, prediction, name


@pytest.fixture
def masks():
    truth, prediction = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    truth[4:10, 5:15] = True
    prediction[:6, 20:] = True  # touches two borders
    return truth, prediction


def outlines(axis):
    """Colour -> all points of its lines."""
    return {
        tuple(item.get_edgecolor()[0]): np.concatenate([path.vertices for path in item.get_paths()])
        for item in axis.collections
    }


def test_outlines_run_along_the_masks(masks):
    figure = overlays({"best": [case(*masks)]})
    (axis,) = figure.axes
    found = outlines(axis)
    assert set(found) == {to_rgba(TRUTH), to_rgba(PREDICTION)}
    x, y = found[to_rgba(TRUTH)].T
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((4.5, 14.5, 3.5, 9.5))
    x, y = found[to_rgba(PREDICTION)].T
    assert x.min() == pytest.approx(19.5) and y.max() == pytest.approx(5.5)
    assert x.max() <= 29.5 and y.min() >= -0.5  # not outside the image
    assert axis.get_title() == "s1 Edema, Dice 0.50"


def test_truth_is_solid_and_prediction_dashed(masks):
    (axis,) = overlays({"best": [case(*masks)]}).axes
    dashes = {tuple(item.get_edgecolor()[0]): item.get_linestyle()[0][1] for item in axis.collections}
    assert dashes[to_rgba(TRUTH)] is None and dashes[to_rgba(PREDICTION)]


def test_an_empty_mask_has_no_outline_and_an_empty_group_no_row(masks):
    truth, _ = masks
    figure = overlays({"best": [case(truth, 0 * truth)], "median": [], "worst": [case(truth, truth)] * 2})
    assert len(figure.axes) == 4  # two rows of two, one of them blank
    assert [len(axis.collections) for axis in figure.axes] == [1, 0, 2, 2]
    assert [figure.axes[0].get_ylabel(), figure.axes[2].get_ylabel()] == ["best", "worst"]
    assert "n = 3" in figure.get_suptitle()
    assert not plt.get_fignums()


def test_nothing_to_show_or_other_pixels_raise(masks):
    truth, prediction = masks
    with pytest.raises(ValueError, match="at least one case"):
        overlays({"best": []})
    with pytest.raises(ValueError, match=r"a mask of \(20, 29\) pixels on an image of \(20, 30\)"):
        overlays({"best": [(np.zeros((20, 30), np.uint8), truth[:, 1:], prediction, "")]})


def test_curves_mark_the_best_step():
    history = pd.DataFrame({"step": [10, 20, 30], "train_loss": [3.0, 2.0, 1.0], "valid_dice": [0.2, 0.5, 0.4]})
    figure = fit_curves({"1 %": history, "10 %": history})
    loss, score = figure.axes
    assert [line.get_label() for line in loss.lines] == ["1 %", "10 %"]
    assert score.collections[0].get_offsets()[0].tolist() == [20, 0.5]
    with pytest.raises(ValueError, match="at least one history"):
        fit_curves({})


def test_fractions_with_intervals_and_baselines():
    rows = [
        ("macro", metric, value + 0.1 * seed, value - 0.1, value + 0.3, 100, fraction, seed)
        for metric, value in (("dice_pooled", 0.4), ("dice_pooled_prior", 0.1))
        for fraction in (0.01, 1.0)
        for seed in (0, 1)
    ]
    columns = ["target", "metric", "value", "ci_low", "ci_high", "n", "label_fraction", "seed"]
    table = pd.DataFrame(rows, columns=columns)
    figure = dice_by_fraction(table, metrics={"dice_pooled": {"dice_pooled_prior": "mean mask"}}, objective="gloria")
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    assert lines["gloria"].get_ydata().tolist() == pytest.approx([0.45, 0.45])
    assert lines["mean mask"].get_ydata().tolist() == pytest.approx([0.15, 0.15])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1 %", "100 %"]
    assert "n = 100 test images, 2 subsets" in figure.get_suptitle()
    table.loc[0, ["value", "ci_low", "ci_high"]] = np.nan  # a macro that is not defined is not drawn
    dice_by_fraction(table, metrics={"dice_pooled": {}})
    with pytest.raises(ValueError, match="no row of metric 'dice_all'"):
        dice_by_fraction(table, metrics={"dice_all": {}})
