import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gloria_core.viz import plots


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def _texts(figure):
    figure.draw_without_rendering()
    return [t.get_text() for axis in figure.axes for t in [axis.title, *axis.texts, *axis.get_yticklabels()]]


def _rows(objectives=("gloria", "random"), targets=("Edema", "macro")):
    rows = [
        {"objective": o, "target": t, "metric": "auroc", "value": 0.9 - 0.3 * i, "ci_low": 0.85 - 0.3 * i}
        | {"ci_high": 0.95 - 0.3 * i, "n": 120}
        for i, o in enumerate(objectives)
        for t in targets
    ]
    return pd.DataFrame(rows)


def test_contact_sheet_shows_every_image_and_hides_empty_places():
    images = [np.full((8, 8), i, dtype=np.uint8) for i in range(7)]
    figure = plots.contact_sheet(images, [f"study {i}" for i in range(7)], title="Seven")
    shown = [axis for axis in figure.axes if axis.images]
    assert [int(axis.images[0].get_array()[0, 0]) for axis in shown] == list(range(7))
    assert [axis.get_title() for axis in shown] == [f"study {i}" for i in range(7)]
    assert shown[0].images[0].get_clim() == (0, 255)  # a dark image stays dark
    assert figure.get_suptitle() == "Seven (n = 7)" and len(figure.axes) == 10
    with pytest.raises(ValueError, match="2 titles for 7"):
        plots.contact_sheet(images, ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        plots.contact_sheet([])


def test_prevalence_bars_are_the_shares():
    frame = pd.DataFrame({"Edema": [1, 1, -1, np.nan], "Fracture": [0, 0, 0, 0]})
    figure = plots.label_prevalence(frame, ["Edema", "Fracture"])
    widths = [[bar.get_width() for bar in container] for container in figure.axes[0].containers]
    np.testing.assert_allclose(widths, [[0.5, 0], [0.25, 0], [0, 1], [0.25, 0]])
    texts = _texts(figure)
    assert "2 positive" in texts and "0 positive" in texts and "Labels (n = 4 studies)" in texts


def test_report_lengths_count_words_and_empty_sections():
    frame = pd.DataFrame({"findings": ["a b c", "a b c", "a"], "impression": ["", " ", ""]})
    figure = plots.report_lengths(frame)
    assert figure.axes[0].get_title() == "findings: 3 with text, 0 empty\ndashed: median 3 words"
    assert figure.axes[1].get_title() == "impression: 0 with text, 3 empty"
    assert sorted(bar.get_height() for bar in figure.axes[0].patches if bar.get_height()) == [1, 2]
    assert figure.get_suptitle().endswith("(n = 3 studies)")


def test_loss_history_has_one_axis_a_term_and_marks_the_best_epoch():
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "learning_rate": 0.1, "train_total": [3, 2, 1], "train_local": [2, 1, 0]}
    )
    history["valid_total"] = [3.0, 1.5, 2.0]
    figure = plots.loss_history(history, title="gloria")
    used = [axis for axis in figure.axes if axis.lines]
    assert [axis.get_title() for axis in used] == ["total", "local"]
    np.testing.assert_array_equal(used[0].lines[1].get_ydata(), [3.0, 1.5, 2.0])
    assert used[0].lines[-1].get_xdata() == [2, 2]
    assert "n = 3 epochs" in figure.get_suptitle()
    with pytest.raises(ValueError, match="train_<term>"):
        plots.loss_history(pd.DataFrame({"epoch": [1]}))
    assert plots.loss_history(history.drop(columns="valid_total")).axes[0].lines


def test_auroc_bars_start_at_chance():
    figure = plots.auroc_bars(_rows())
    axis = figure.axes[0]
    bars = [bar for container in axis.containers for bar in container if hasattr(bar, "get_width")]
    assert {bar.get_x() for bar in bars} == {0.5}
    np.testing.assert_allclose([bar.get_width() for bar in bars], [0.4, 0.4, 0.1, 0.1])
    texts = _texts(figure)
    assert "Edema (n = 120)" in texts and "0.90" in texts and "0.60" in texts
    assert [0.5, 0.5] in [list(line.get_xdata()) for line in axis.lines]
    assert bars[0].get_facecolor()[:3] == pytest.approx(plots.colour_of("gloria"))


def test_auroc_bars_say_what_is_not_defined_and_refuse_doubles():
    rows = _rows()
    rows.loc[0, ["value", "ci_low", "ci_high"]] = np.nan
    assert "not defined" in _texts(plots.auroc_bars(rows))
    with pytest.raises(ValueError, match="one row per target"):
        plots.auroc_bars(pd.concat([rows, rows]))
    with pytest.raises(ValueError, match="at least one"):
        plots.auroc_bars(rows, metric="auprc")


def test_bad_values_below_chance_stay_in_view():
    rows = _rows(objectives=("gloria",)).assign(value=0.1, ci_low=0.05, ci_high=0.2)
    assert plots.auroc_bars(rows).axes[0].get_xlim()[0] < 0.05


def test_label_efficiency_is_the_mean_over_seeds_with_their_range():
    rows = pd.DataFrame(
        {"objective": "gloria", "target": "macro", "metric": "auroc", "n": 90}
        | {"label_fraction": [0.01, 0.01, 1.0], "seed": [0, 1, 0], "value": [0.6, 0.8, 0.9]}
    )
    figure = plots.label_efficiency(rows)
    axis = figure.axes[0]
    np.testing.assert_allclose(axis.lines[0].get_xydata(), [[0.01, 0.7], [1.0, 0.9]])
    band = axis.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.6) and axis.get_xscale() == "log"
    figure.draw_without_rendering()
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1 %", "100 %"]
    assert axis.get_title() == "Linear probe (n = 90 test studies, 2 seeds)"
    with pytest.raises(ValueError, match="'Edema'"):
        plots.label_efficiency(rows, target="Edema")


def test_prompt_similarity_writes_every_cell_and_centres_its_colours():
    values = pd.DataFrame([[0.4, 0.9], [0.5, 0.6]], index=["no edema", "edema"], columns=["Edema", "Fracture"])
    figure = plots.prompt_similarity(values, centre=0.5, unit="AUROC")
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.texts] == ["0.40", "0.90", "0.50", "0.60"]
    assert axis.images[0].get_clim() == pytest.approx((0.1, 0.9))
    assert "n = 2 prompts" in axis.get_title()


def test_objectives_keep_their_colours_and_unknown_ones_get_none_of_theirs():
    known = ["gloria", "convirt", "mgca", "prior", "cxr_clip", "imagenet", "random"]
    assert len({plots.colour_of(name) for name in known}) == len(known)
    assert plots.colour_of("mine") not in {plots.colour_of(name) for name in known}


def test_an_interval_beside_its_point_draws_a_bar_to_the_point():
    np.testing.assert_allclose(plots.reaches(np.array([0.5]), np.array([0.52]), np.array([0.6])), [[0.0], [0.1]])
    rows = _rows()
    rows.loc[0, ["ci_low", "ci_high"]] = [0.91, 0.95]  # the point is 0.9
    plots.auroc_bars(rows).draw_without_rendering()
