import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gloria_core.tasks.classification.decisions import reliability
from gloria_core.viz import classification as decisions

TARGETS = pd.DataFrame({"a": [0, 0, 1, 1], "b": [1, 1, 1, np.nan]})
SCORES = pd.DataFrame({"a": [0.1, 0.6, 0.4, 0.9], "b": [0.5, 0.6, 0.7, 0.8]})


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    yield
    assert not plt.get_fignums()


def test_roc_goes_through_the_counted_points():
    figure = decisions.roc_curves(TARGETS, SCORES, ["a", "b"])
    curve = figure.axes[0].lines[0].get_xydata().tolist()
    assert [0.0, 0.5] in curve and [0.5, 1.0] in curve  # 0.9 first, then 0.6 (wrong), then 0.4
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["a (2 of 4)", "b: one class only"]


def test_confusion_counts():
    figure = decisions.confusion(TARGETS, SCORES, {"a": 0.6, "b": np.nan}, ["a", "b"])
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1", "1", "1"]
    assert figure.axes[1].texts[0].get_text() == "no threshold"


def test_reliability_points():
    figure = decisions.reliability_plot({"a": reliability(TARGETS["a"], SCORES["a"])})
    points = figure.axes[0].collections[0].get_offsets().tolist()
    assert points == [[0.1, 0], [0.4, 1], [0.6, 0], [0.9, 1]]
    with pytest.raises(ValueError, match="at least one"):
        decisions.reliability_plot({})
