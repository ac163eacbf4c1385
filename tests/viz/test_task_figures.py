"""Figures of single tasks: what is drawn is what was given."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

from gloria_core.tasks.classification.decisions import reliability
from gloria_core.tasks.retrieval import Scores, rank_partners
from gloria_core.tasks.single_image import Answer
from gloria_core.viz import classification
from gloria_core.viz.detection import box_cases, iou_pair
from gloria_core.viz.retrieval import nearest_partners, recall_curves
from gloria_core.viz.segmentation import COLOURS, fit_curves, overlays
from gloria_core.viz.zero_shot import answer_figure, wording_spread

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def texts_of(figure):
    found = [figure.get_suptitle()]
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), *(text.get_text() for text in axis.texts)]
        found += [label.get_text() for label in axis.get_yticklabels()]
    return found


# ---------------------------------------------------------------------------------------------------- classification

TARGETS = pd.DataFrame({"a": [0, 0, 1, 1], "b": [1, 1, 1, np.nan]})
SCORES = pd.DataFrame({"a": [0.1, 0.6, 0.4, 0.9], "b": [0.5, 0.6, 0.7, 0.8]})


def test_roc_goes_through_the_counted_points():
    figure = classification.roc_curves(TARGETS, SCORES, ["a", "b"])
    curves = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert any([0.0, 0.5] in curve and [0.5, 1.0] in curve for curve in curves)  # 0.9 first, then 0.6 (wrong), then 0.4
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["a (2 of 4)", "b: one class only"]


def test_confusion_counts():
    scores = SCORES.assign(a=[0.1, 0.2, 0.4, 0.9])
    figure = classification.confusion(TARGETS, scores, {"a": 0.15, "b": np.nan}, ["a", "b"])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "0", "2"]  # by truth, then by decision
    assert figure.axes[1].texts[0].get_text() == "-"


def test_reliability_points():
    figure = classification.reliability_plot({"a": reliability(TARGETS["a"], SCORES["a"])})
    points = figure.axes[0].collections[0].get_offsets().tolist()
    assert points == [[0.1, 0], [0.4, 1], [0.6, 0], [0.9, 1]]
    with pytest.raises(ValueError, match="at least one"):
        classification.reliability_plot({})


# --------------------------------------------------------------------------------------- segmentation and detection


def test_overlays_outline_truth_and_prediction_in_groups():
    image = np.full((20, 30), 90, np.uint8)
    truth, prediction = np.zeros((2, 20, 30), bool)
    truth[4:10, 5:15] = True
    prediction[:6, 20:] = True
    cases = {"best": [(image, truth, 0 * truth, "s1")], "median": [], "worst": [(image, truth, prediction, "s2")] * 2}
    figure = overlays(cases)
    assert len(figure.axes) == 4  # two rows of two, one of them blank
    assert [len(axis.collections) for axis in figure.axes] == [1, 0, 2, 2]
    assert [figure.axes[0].get_ylabel(), figure.axes[2].get_ylabel()] == ["best", "worst"]
    assert "n = 3" in figure.get_suptitle() and figure.axes[2].get_title() == "s2"
    dashes = {tuple(item.get_edgecolor()[0]): item.get_linestyle()[0][1] for item in figure.axes[2].collections}
    assert dashes[to_rgba(COLOURS["truth"])] is None and dashes[to_rgba(COLOURS["prediction"])]
    with pytest.raises(ValueError, match="at least one"):
        overlays({"best": []})


def test_curves_mark_the_best_step():
    history = pd.DataFrame({"step": [10, 20, 30], "train_loss": [3.0, 2.0, 1.0], "valid_dice": [0.2, 0.5, 0.4]})
    loss, score = fit_curves({"1 %": history, "10 %": history}).axes
    assert [line.get_label() for line in loss.lines] == ["1 %", "10 %"]
    assert score.collections[0].get_offsets()[0].tolist() == [20, 0.5]
    with pytest.raises(ValueError, match="at least one history"):
        fit_curves({})


def test_boxes_below_the_threshold_are_counted_and_not_drawn():
    truth = SimpleNamespace(boxes=np.array([[1, 2, 4, 6]]), labels=np.array([1]), scores=None)
    found = SimpleNamespace(
        boxes=np.array([[1, 2, 5, 6], [0, 0, 2, 2]]), labels=np.array([0, 1]), scores=np.array([0.9, 0.1])
    )
    figure = box_cases({"best": [(IMAGE, truth, found, "s1")]}, ["Mass", "Nodule"])
    solid, dashed = figure.axes[0].patches
    assert solid.get_bbox().bounds == (0.5, 1.5, 3, 4) and dashed.get_bbox().bounds == (0.5, 1.5, 4, 4)
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("solid", "dashed")
    assert figure.axes[0].get_title() == "best: s1\n1 below 0.3" and figure.axes[0].texts[0].get_text() == "0.90"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Mass", "Nodule"]
    with pytest.raises(ValueError, match="at least one"):
        box_cases({}, ["Mass", "Nodule"])


def test_the_intersection_of_two_boxes_is_shaded():
    (axis,) = iou_pair([10, 10, 50, 40], [30, 10, 70, 40], value=1 / 3).axes
    assert axis.patches[-1].get_bbox().bounds == (30, 10, 20, 30) and axis.get_title().endswith("0.33")
    assert len(iou_pair([0, 0, 2, 2], [5, 5, 6, 6], value=0).axes[0].patches) == 2


# --------------------------------------------------------------------------------------------------------- retrieval


SIMILARITY = Scores(
    torch.tensor([[0.7, 0.1, 0.8, 0.2], [0.5, 0.6, 0.5, 0.9], [0.6, 0.9, 0.6, 0.7], [0.1, 0.2, 0.3, 0.9]]), torch.eye(4)
)
REPORTS = ["No effusion.", "Small effusion.", "no  effusion", "Edema."]


def test_recall_curves_draw_chance_beside():
    figure = recall_curves({"image_to_text": rank_partners(SIMILARITY, REPORTS, k=1)})
    recall, chance = figure.axes[0].lines
    assert (recall.get_linestyle(), chance.get_linestyle()) == ("-", "--")
    np.testing.assert_allclose(recall.get_xdata(), [1, 2])
    np.testing.assert_allclose(recall.get_ydata(), [0.5, 0.75])
    np.testing.assert_allclose(chance.get_ydata(), [1 / 3, 2 / 3])
    assert "n = 4" in figure.axes[0].get_title()


@pytest.mark.parametrize(
    ("direction", "right", "query"), [("image_to_text", 1, "own report"), ("text_to_image", 2, "No")]
)
def test_partners_with_the_text_of_the_query_are_right(direction, right, query):
    ranking = rank_partners(SIMILARITY, REPORTS, direction=direction, k=2)
    figure = nearest_partners(ranking, [0], REPORTS, [IMAGE] * 4, direction=direction)
    texts = texts_of(figure)
    assert f"{right} of 2 right" in texts[0] and any(text.startswith(query) for text in texts)
    copy = nearest_partners(ranking, [2], REPORTS, [IMAGE] * 4, direction=direction)
    assert f"{0 if direction == 'image_to_text' else 2} of 2 right" in texts_of(copy)[0]
    shown = [len(axis.images) for axis in figure.axes]
    assert shown == ([1, 0, 0] if direction == "image_to_text" else [0, 1, 1])
    heads = [axis.get_title() for axis in figure.axes]
    assert heads[0] == "query" and heads[1] == f"1.  {ranking.scores[0, 0]:.2f}  ✓ right"
    widths = [axis.spines["right"].get_linewidth() for axis in figure.axes]
    assert widths[1] > widths[0] and (heads[2].endswith("✗")) == (widths[2] < widths[1])
    figure.canvas.draw()


def test_long_texts_are_cut_and_no_study_is_refused():
    ranking = rank_partners(SIMILARITY, REPORTS, k=1)
    texts = ["word " * 200, *REPORTS[1:]]
    shown = texts_of(nearest_partners(ranking, [0], texts, [IMAGE] * 4, direction="image_to_text"))
    assert max(text.count("\n") for text in shown) < 9 and any(text.endswith("…") for text in shown)
    with pytest.raises(ValueError, match="at least one study"):
        nearest_partners(ranking, [], texts, [IMAGE] * 4, direction="image_to_text")


# --------------------------------------------------------------------------------------------------------- zero-shot


def test_wording_spread_begins_with_the_widest():
    wording = pd.DataFrame(
        {
            "label": ["A", "A", "B", "B", "C"],
            "prompt": ["a", "b", "worst", "best", "c"],
            "auroc": [0.6, 0.7, 0.2, 0.9, np.nan],
        }
    )
    figure = wording_spread(wording, together=pd.Series({"A": 0.8, "B": 0.9}))
    texts = texts_of(figure)
    assert texts[-2:] == ["B (2 prompts)", "A (2 prompts)"]
    assert any("0.20: worst" in text and "0.90: best" in text for text in texts)
    assert figure.axes[0].collections[-1].get_offsets().tolist() == [[0.9, 0], [0.8, 1]]
    with pytest.raises(ValueError, match="no prompt"):
        wording_spread(wording.tail(1))


def test_answer_figure_with_and_without_a_map():
    columns = {"score": [0.5, 0.1], "percentile": [0.97, np.nan], "probability": [0.6, np.nan]}
    columns |= {"prevalence": [0.2, 0.1], "stands_out": [True, False]}
    table = pd.DataFrame(columns, index=["Edema", "Fracture"])
    values = np.where(np.arange(8) < 2, np.nan, 0.5) * np.ones((8, 8))
    figure = answer_figure(Answer("", table, IMAGE, {"Edema": values}, "cosine"))
    assert len(figure.axes[1].images) == 2 and figure.axes[1].images[1].get_clim() == (-0.5, 0.5)
    texts = texts_of(figure)
    assert "60 % (20 %)" in texts and "- (too few to calibrate)" in texts
    figure.canvas.draw()
    alone = answer_figure(Answer("", table[["score"]], IMAGE, {}, ""))
    assert "image (the objective has no map)" in texts_of(alone) and "0.50" in texts_of(alone)
