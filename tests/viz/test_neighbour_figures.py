"""Figures of retrieval and of zero-shot answers: what is drawn is what was given."""

import numpy as np
import pandas as pd
import pytest

from gloria_core.viz.retrieval import Shown, neighbours, precision_bars, recall_curves
from gloria_core.viz.zero_shot import answer_figure, wording_spread

IMAGE = np.arange(64, dtype=np.uint8).reshape(8, 8)


def texts_of(figure):
    found = [figure._suptitle.get_text()] if figure._suptitle else []
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), *(text.get_text() for text in axis.texts)]
        found += [label.get_text() for label in axis.get_yticklabels()]
    return found


def test_right_answers_are_ticked_and_counted():
    answers = [[Shown("one", score=0.9, right=True), Shown("two", score=0.5, right=False)]]
    figure = neighbours([Shown("asked", image=IMAGE)], answers, title="T")
    texts = texts_of(figure)
    assert texts[0] == "T (n = 1 queries, 2 texts each, 1 of 2 right)"
    assert "1.  0.90  ✓ right" in texts and "2.  0.50  ✗" in texts and "query" in texts and "asked" in texts
    widths = [axis.spines["left"].get_linewidth() for axis in figure.axes]
    assert widths[1] > widths[2]
    figure.canvas.draw()


def test_images_and_unknown_answers():
    figure = neighbours([Shown("asked")], [[Shown("x", image=IMAGE), Shown("y", image=IMAGE)]])
    assert "2 images each)" in texts_of(figure)[0] and len(figure.axes[1].images) == 1
    long = neighbours([Shown("word " * 200)], [[Shown("x")]])
    assert max(text.count("\n") for text in texts_of(long)) < 9 and any(text.endswith("…") for text in texts_of(long))


@pytest.mark.parametrize(("queries", "answers"), [([], []), ([Shown("a")], []), ([Shown("a")] * 2, [[Shown("b")], []])])
def test_unequal_rows_are_refused(queries, answers):
    with pytest.raises(ValueError, match="at least one query"):
        neighbours(queries, answers)


def test_recall_curves_draw_chance_beside():
    figure = recall_curves({"image_to_text": ([0.1, 0.5], [0.01, 0.1])}, [1, 10], n=7)
    lines = figure.axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "--"]
    np.testing.assert_allclose(lines[1].get_ydata(), [0.01, 0.1])
    assert "n = 7" in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="at least one curve"):
        recall_curves({}, [1], n=1)


def test_precision_bars_name_a_class_without_queries():
    rows = pd.DataFrame(
        [("A", "precision_at_5", 0.5, 0.4, 0.6, 9, 0.1), ("B", "precision_at_5", np.nan, np.nan, np.nan, 0, 0.2)],
        columns=["target", "metric", "value", "ci_low", "ci_high", "n", "chance"],
    )
    figure = precision_bars(rows)
    texts = texts_of(figure)
    assert "no query" in texts and "A (n = 9)" in texts
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5, 0.0]
    figure.canvas.draw()
    with pytest.raises(ValueError, match="one row per class"):
        precision_bars(pd.concat([rows, rows]))


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
    with pytest.raises(ValueError, match="no prompt"):
        wording_spread(wording.tail(1))


def answer_table(**columns):
    base = {"score": [0.5, 0.1], "percentile": [0.97, np.nan], "probability": [0.6, np.nan], "prevalence": [0.2, 0.1]}
    return pd.DataFrame(base | {"stands_out": [True, False]} | columns, index=["Edema", "Fracture"])


def test_answer_figure_with_and_without_a_map():
    values = np.where(np.arange(8) < 2, np.nan, 0.5) * np.ones((8, 8))
    figure = answer_figure(IMAGE, answer_table(), values=values, finding="Edema")
    assert len(figure.axes[1].images) == 2 and figure.axes[1].images[1].get_clim() == (-0.5, 0.5)
    texts = texts_of(figure)
    assert "60 % (20 %)" in texts and "too few to calibrate" in texts
    figure.canvas.draw()
    alone = answer_figure(IMAGE, answer_table()[["score"]])
    assert "image (the objective has no map)" in texts_of(alone) and "0.50" in texts_of(alone)
    with pytest.raises(ValueError, match="pixels"):
        answer_figure(IMAGE, answer_table(), values=values[:4])
