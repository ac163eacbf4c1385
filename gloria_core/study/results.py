"""All tasks at a glance: one number a task and method, and whether it stands apart from a baseline.

From the numbers of finished runs to a paper's table. Reads metrics.csv and run.json only, never a notebook.

    rows = collect("quickstart")                  one row a number, with the run that it comes from
    summary(rows)                                 mean, spread over seeds, number of seeds
    wide(summary(rows), index=["objective"], columns=["target"])
    paper_table(rows, published(), "GLoRIA ICCV 2021 linear probe")

Means are computed here, when they are looked at, and stored nowhere else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gloria_core.study.parameters import unknown
from gloria_core.study.paths import RUNS, repository_root
from gloria_core.study.record import COLUMNS

NUMBERS = ("label_fraction", "seed", "value", "ci_low", "ci_high", "n")
CASE = ("dataset", "task", "split", "target", "metric", "objective", "label_fraction")
"""What makes two numbers comparable, so that only seeds differ."""
UNIT_METRICS = ("cnr", "miou", "pointing_game")
"""Metrics that papers print as they are; all others are printed in percent."""
PUBLISHED_COLUMNS = (
    "source_table", "task", "dataset", "metric", "method", "label_fraction", "value", "status", "quoted_via", "note",
)  # fmt: skip


class TableError(ValueError):
    """Numbers that cannot be put into a table: a folder, a column or a source table that is not there."""


def collect(study: str, *, results_root: str | Path | None = None) -> pd.DataFrame:
    """All numbers of the runs of `study` that succeeded, columns `COLUMNS` of `gloria_core.study.record`.

    Only runs of the current plan (plan.json) with `status: ok` for the current code and data count. The others are
    listed in `attrs["skipped"]`, a list of {"run_id", "reason"}: show it, an absent number is news.
    `results_root` is the folder of the studies, default results/runs. Raises `TableError`.
    """
    folder = (Path(results_root) if results_root else repository_root() / RUNS) / study
    if not (folder / "plan.json").is_file():
        raise TableError(f"{folder} has no plan.json: run the study first (make study STUDY={study})")
    runs = json.loads((folder / "plan.json").read_text(encoding="utf-8"))["runs"]
    tables, skipped = [], []
    for run in runs:
        try:
            tables.append(_metrics(folder / run["run_id"], run["fingerprint"]))
        except TableError as error:
            skipped.append({"run_id": run["run_id"], "reason": str(error)})
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(COLUMNS))
    rows.attrs["skipped"] = skipped
    return rows


def _metrics(folder: Path, fingerprint: str) -> pd.DataFrame:
    """The rows of one run. Raises `TableError` with the reason why they do not count."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TableError("no run.json: not run, still running, or killed") from None
    if record.get("status") != "ok":
        raise TableError(f"status {record.get('status')!r}")
    if record.get("fingerprint") != fingerprint:
        raise TableError("stale: made by other code cells or other data than the plan's")
    try:
        # only an empty cell is a missing value: a finding may be called "None"
        text = pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise TableError(f"metrics.csv cannot be read: {error}") from None
    if tuple(text.columns) != COLUMNS:
        raise TableError(f"metrics.csv has columns {list(text.columns)}")
    try:
        # record.py writes NaN, an undefined value, as "nan"
        return text.assign(**{name: pd.to_numeric(text[name].replace(["", "nan"], None)) for name in NUMBERS})
    except ValueError as error:
        raise TableError(f"metrics.csv: {error}") from None


def costs(study: str, *, results_root: str | Path | None = None) -> pd.DataFrame:
    """One row a finished run, by run_id: notebook, device, wall_seconds, peak_memory_mb, commit, dirty."""
    folder = (Path(results_root) if results_root else repository_root() / RUNS) / study
    names = ["notebook", "device", "wall_seconds", "peak_memory_mb", "commit", "dirty"]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/run.json"))]
    table = pd.DataFrame([{"run_id": record["run_id"], **record} for record in records if record["status"] == "ok"])
    return table.reindex(columns=["run_id", *names]).set_index("run_id")


def confounds(dataset: str, *, folder: str | Path | None = None) -> str:
    """Every paragraph of the dataset's card (data_manifests/<dataset>.md) that begins with **Confounds, as Markdown.

    Raises `TableError` where there is no card, or none of its paragraphs does.
    """
    path = (Path(folder) if folder else repository_root() / "data_manifests") / f"{dataset}.md"
    if not path.is_file():
        raise TableError(f"{path} is missing: write a card for the dataset, with its confounds")
    parts = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    found = [part.strip() for part in parts if part.lstrip().startswith("**Confounds")]
    if not found:
        raise TableError(f"{path} says nothing of confounds: begin a paragraph with **Confounds.**")
    return "\n\n".join(found)


def summary(rows: pd.DataFrame, *, by: Sequence[str] = CASE) -> pd.DataFrame:
    """Mean and sample standard deviation over what is not in `by`, which should be seeds only.

    Columns: `by`, then mean, sd (blank for one seed), seeds (how many have a value), n (the smallest number of
    cases), ci_low and ci_high (only for one seed: intervals are not averaged). Raises `TableError` when one seed has
    two numbers of one case, i.e. when `by` is too coarse.
    """
    _need(rows, [*by, "seed", "value"])
    twice = rows[rows.duplicated([*by, "seed"], keep=False)]
    if len(twice):
        first = twice.iloc[0][[*by, "seed"]].to_dict()
        raise TableError(f"{len(twice)} numbers share a case and a seed, e.g. {first}; add what differs to `by`")
    groups = rows.groupby(list(by), dropna=False, sort=False)
    table = groups.agg(
        mean=("value", "mean"), sd=("value", "std"), seeds=("value", "count"), n=("n", "min"),
        ci_low=("ci_low", "first"), ci_high=("ci_high", "first"), _rows=("value", "size"),
    ).reset_index()  # fmt: skip
    table.loc[table["_rows"] > 1, ["ci_low", "ci_high"]] = float("nan")
    return table.drop(columns="_rows")


def wide(
    table: pd.DataFrame, *, index: Sequence[str], columns: Sequence[str], digits: int = 3, scale: float = 1.0
) -> pd.DataFrame:
    """A table to print: "0.912 ± 0.004" over seeds, "0.912 (0.880-0.940)" with an interval, "-" for no number.

    `table` comes from `summary`. Order of rows and columns is that of first appearance. Raises `TableError` when two
    numbers would share a cell.
    """
    _need(table, [*index, *columns, "mean"])
    keys = [*index, *columns]
    if table.duplicated(keys).any():
        differing = [name for name in CASE if name in table and name not in keys and table[name].nunique() > 1]
        raise TableError(f"several numbers in one cell; choose one of, or add to the table: {', '.join(differing)}")
    text = table[keys].assign(cell=[_cell(row, digits, scale) for row in table.to_dict("records")])
    grid = text.set_index(keys)["cell"].unstack(list(columns), sort=False)
    return grid.fillna("-")


def published(path: str | Path | None = None) -> pd.DataFrame:
    """The published numbers, by default those of data_manifests/published_numbers.csv. Raises `TableError`."""
    path = Path(path) if path else repository_root() / "data_manifests" / "published_numbers.csv"
    try:
        table = pd.read_csv(path, keep_default_na=False, dtype=str)
    except OSError as error:
        raise TableError(f"no published numbers: {error}") from None
    _need(table, PUBLISHED_COLUMNS)
    return table.assign(**{name: pd.to_numeric(table[name].replace("", None)) for name in ("label_fraction", "value")})


def paper_table(rows: pd.DataFrame, published_rows: pd.DataFrame, source_table: str) -> pd.DataFrame:
    """A published table with our numbers of the same task and metric under it, in the paper's unit.

    Columns: who ("published" or "ours"), method, dataset, metric, label_fraction, value, sd, seeds, n, mark, source,
    note. `mark` is the published number's *read* or *recalled*, ours are *measured*; `source` is the table (and
    through whom it is quoted) or our split. Datasets stay as they are: what was measured on another dataset stands
    beside, not inside. Ours are the rows of target `macro` where there are any. Raises `TableError`.
    """
    theirs = published_rows[published_rows["source_table"] == source_table]
    if theirs.empty:
        raise TableError(unknown("table", source_table, sorted(set(published_rows["source_table"])), where="the list"))
    via = [f"{source_table}, quoted by {name}" if name else source_table for name in theirs["quoted_via"]]
    theirs = theirs.assign(who="published", mark=theirs["status"], source=via)
    wanted = rows.merge(theirs[["task", "metric"]].drop_duplicates())
    macro = wanted[wanted["target"] == "macro"]
    ours = summary(macro if len(macro) else wanted)
    factor = ours["metric"].map(lambda name: 1.0 if name in UNIT_METRICS else 100.0)
    ours = ours.assign(
        who="ours", method=ours["objective"], value=ours["mean"] * factor, sd=ours["sd"] * factor, mark="measured",
        source="split " + ours["split"].astype(str) + ", target " + ours["target"].astype(str), note="",
    )  # fmt: skip
    order = [
        "who",
        "method",
        "dataset",
        "metric",
        "label_fraction",
        "value",
        "sd",
        "seeds",
        "n",
        "mark",
        "source",
        "note",
    ]
    return pd.concat([theirs, ours], ignore_index=True).reindex(columns=order)


def to_markdown(table: pd.DataFrame, *, digits: int = 3) -> str:
    """A pipe table for README or a notebook; the index is printed when it has a name."""
    if any(name is not None for name in table.index.names):
        table = table.reset_index()
    names = [" ".join(map(str, name)).strip() if isinstance(name, tuple) else str(name) for name in table.columns]
    body = [[_text(value, digits) for value in row] for row in table.itertuples(index=False, name=None)]
    lines = [names, ["---"] * len(names), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cell(row: dict[str, float], digits: int, scale: float) -> str:
    if pd.isna(row["mean"]):
        return "-"
    text = f"{row['mean'] * scale:.{digits}f}"
    if row.get("seeds", 1) > 1:
        return f"{text} ± {row['sd'] * scale:.{digits}f}"
    if not pd.isna(row.get("ci_low", float("nan"))):
        return f"{text} ({row['ci_low'] * scale:.{digits}f}-{row['ci_high'] * scale:.{digits}f})"
    return text


def _text(value: object, digits: int) -> str:
    if value is None or value != value:
        return ""
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _need(table: pd.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise TableError(f"the table has no column {missing[0]!r}; it has {', '.join(map(str, table.columns))}")


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
