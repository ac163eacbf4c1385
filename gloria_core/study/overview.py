"""All tasks at a glance: one number a task and method, and whether it stands apart from a baseline."""

from __future__ import annotations

import pandas as pd

from gloria_core.study.tables import TableError, summary

HEADLINES = (
    ("07_zero_shot", "zero_shot", "auroc", "macro"),
    ("04_finetune_classification", "classification", "auroc", "macro"),
    ("04_finetune_classification", "classification", "finetuned_auroc", "macro"),
    ("05_segmentation", "segmentation", "dice_positives", "macro"),
    ("06_detection", "detection", "map_40_75", "macro"),
    ("08_retrieval", "retrieval", "recall_at_10", "image_to_text"),
    ("08_retrieval", "retrieval", "precision_at_10", "macro"),
    ("03_attention_maps", "grounding", "cnr_cosine", "macro"),
    ("03_attention_maps", "grounding", "pointing_game_cosine", "macro"),
)
"""Notebook, task, metric and target of the one or two numbers by which a task is known."""


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `HEADLINES` on test splits, in that order. What no run has is left out.

    A part of a test split that is judged apart from a confound is a dataset of its own ("nih not meta_source=A").
    Raises `TableError` where there is none at all.
    """
    parts = []
    for notebook, task, metric, target in HEADLINES:
        found = (rows["notebook"] == notebook) & (rows["task"] == task) & (rows["metric"] == metric)
        parts.append(rows[found & (rows["target"] == target) & (rows["split"] == "test")])
    chosen = pd.concat(parts)
    if chosen.empty:
        raise TableError("no run has a number of any task; run a study with notebooks 03 to 08 first")
    return chosen


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """`summary` of the headlines; label fractions stay apart."""
    return summary(headlines(rows))


def separated(rows: pd.DataFrame, *, baseline: str = "random") -> pd.DataFrame:
    """Every method beside the baseline, at the smallest label fraction and the first seed, with their intervals.

    Columns: dataset, task, metric, label_fraction, objective, value, interval, baseline, baseline_interval; apart: if
    the lower end of the method's 95 % interval lies above the upper end of the baseline's. Two intervals that overlap
    may still differ significantly; two that do not certainly do.
    """
    chosen = headlines(rows).dropna(subset=["value"])
    case = ["dataset", "task", "metric"]
    smallest = chosen.groupby(case)["label_fraction"].transform("min")
    chosen = chosen[(chosen["label_fraction"] == smallest) | smallest.isna()]
    first = chosen.groupby([*case, "objective"])["seed"].transform("min")
    chosen = chosen[(chosen["seed"] == first) | first.isna()]
    of_baseline = chosen[chosen["objective"] == baseline].set_index(case)
    table = []
    for row in chosen[chosen["objective"] != baseline].to_dict("records"):
        key = tuple(row[name] for name in case)
        if key not in of_baseline.index:
            continue
        other = of_baseline.loc[[key]].iloc[0]
        table.append(
            {name: row[name] for name in (*case, "label_fraction", "objective", "value")}
            | {"interval": _interval(row), "baseline": other["value"], "baseline_interval": _interval(other)}
            | {"apart": bool(row["ci_low"] > other["ci_high"])}
        )
    columns = [*case, "label_fraction", "objective", "value", "interval", "baseline", "baseline_interval", "apart"]
    return pd.DataFrame(table, columns=columns)


def _interval(row: pd.Series | dict[str, float]) -> str:
    return f"{row['ci_low']:.3f}-{row['ci_high']:.3f}"
