"""Tables as they are shown: what does not apply is "-", and a line says what it counts."""

import numpy as np
import pandas as pd

from gloria_core.viz.tables import grid, metric_table, shown, with_interval

NAN = float("nan")


def test_numbers_counts_and_what_does_not_apply():
    table = pd.DataFrame(
        {"value": [0.12345, NAN], "n": [12.0, NAN], "rank": [3, 4], "one": [1.0, 0.0], "why": ["", "few"]},
        index=pd.Index([0.01, NAN], name="fraction"),
    ).assign(right=[True, False], mixed=[None, 0.5])
    text = shown(table)
    assert text.index.tolist() == ["0.01", "-"] and text.index.name == "fraction"
    assert text.iloc[0].tolist() == ["0.123", "12", "3", "1.000", "-", "True", "-"]
    assert text.iloc[1].tolist() == ["-", "-", "4", "0.000", "few", "False", "0.500"]
    assert "NaN" not in shown(table).to_html() and table["value"].isna().any()  # the table itself stays
    pair = shown(table.set_index("why", append=True)["value"])
    assert pair.index.tolist() == [("0.01", "-"), ("-", "few")] and pair.index.names == ["fraction", "why"]
    assert shown(pd.Series([NAN], name="x")).to_numpy().tolist() == [["-"]]


def test_an_interval_that_is_not_there_is_a_dash():
    row = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75}
    assert with_interval(row, 2) == "0.50 (0.25-0.75)" and with_interval(row, 0, 100) == "50 (25-75)"
    assert with_interval(row | {"ci_low": NAN, "ci_high": NAN}) == "0.500 (-)"
    assert with_interval(dict.fromkeys(row, NAN)) == "-"
    assert with_interval({"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}) == "1.000 (-)"  # no width is not certainty


def test_lines_of_metric_rows_carry_counts_and_notes():
    rows = pd.DataFrame({"target": ["b", "b", "a"], "metric": ["f1", "auroc", "auroc"], "value": [0.5, NAN, 1.0]})
    rows = rows.assign(ci_low=NAN, ci_high=NAN, n=[9, 10, 10], positives=[2, 2, 5], patients=[4, 4, NAN])
    rows["note"] = ["mean over 1", "mean over 1; only negative studies", ""]
    text = metric_table(rows)
    assert list(text.columns) == ["f1", "auroc", "n", "positives", "patients", "note"]
    assert text.loc["b"].tolist() == ["0.500 (-)", "-", "9 to 10", "2", "4", "mean over 1; only negative studies"]
    assert text.loc["a"].tolist() == ["-", "1.000 (-)", "10", "5", "-", "-"]
    wide = grid(rows.assign(cell="x", objective="o"), ["target"], ["metric", "objective"])
    assert wide.columns.nlevels == 2 and wide.loc["b", ("n", "")] == "9 to 10"


def test_long_notes_and_many_lines_are_shown_whole():
    note = "no interval: 1 of 5 needed patients of a class; " * 4 + "end"
    table = shown(pd.DataFrame({f"column {number}": [note] * 80 for number in range(25)}))
    for text in (repr(table), table._repr_html_()):
        assert text.count(note) == 80 * 25 and "..." not in text


def test_one_number_a_line_has_its_chance_and_no_empty_column():
    rows = pd.DataFrame({"metric": ["a", "b"], "value": [0.5, NAN], "ci_low": NAN, "ci_high": NAN, "n": [9, 0]})
    rows = rows.assign(chance=[0.25, NAN], note="")
    text = metric_table(rows, index=["metric"], columns=[])
    assert text.to_dict("list") == {"value": ["0.500 (-)", "-"], "chance": ["0.250", "-"], "n": ["9", "0"]}


def test_an_empty_table_stays_one():
    assert metric_table(pd.DataFrame(columns=["target", "metric", "value", "ci_low", "ci_high", "n"])).empty
    empty = shown(pd.DataFrame({"a": np.array([], float)}))
    assert empty.empty and repr(empty) == "no line to show" and "no line to show" in empty._repr_html_()
