"""From the numbers of finished runs to a paper's table. Reads metrics.csv and run.json only, never a notebook.

    rows = collect("quickstart")                  one row a number, with the run that it comes from
    summary(rows)                                 mean, spread over seeds, number of seeds
    wide(summary(rows), index=["objective"], columns=["target"])
    paper_table(rows, published(), "GLoRIA ICCV 2021 linear probe")
    wide(summary(headlines(rows)), index=["task", "metric"], columns=["objective"])

Means are computed here, when they are looked at, and stored nowhere else.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from gloria_core.study.parameters import unknown
from gloria_core.study.paths import RUNS, read_json, repository_root
from gloria_core.study.record import COLUMNS
from gloria_core.viz.tables import COUNTS, grid, with_interval

NUMBERS = ["label_fraction", "seed", "value", "ci_low", "ci_high", "n"]
# What makes two numbers comparable, so that only seeds differ.
CASE = ("dataset", "task", "split", "target", "metric", "objective", "label_fraction")
# Metrics that papers print as they are; all others are printed in percent.
UNIT_METRICS = ("cnr", "miou", "pointing_game")
# The one or two numbers by which a task is known.
HEADLINES = pd.DataFrame(
    [
        ("07_zero_shot", "zero_shot", "auroc", "macro"),
        ("04_finetune_classification", "classification", "auroc", "macro"),
        ("04_finetune_classification", "classification", "finetuned_auroc", "macro"),
        ("05_segmentation", "segmentation", "dice_positives", "macro"),
        ("06_detection", "detection", "map_40_75", "macro"),
        ("08_retrieval", "retrieval", "recall_at_10", "image_to_text"),
        ("08_retrieval", "retrieval", "precision_at_10", "macro"),
        ("03_attention_maps", "grounding", "cnr_cosine", "macro"),
        ("03_attention_maps", "grounding", "pointing_game_cosine", "macro"),
    ],
    columns=["notebook", "task", "metric", "target"],
).assign(split="test")


class TableError(ValueError):
    """Numbers that cannot be put into a table: a folder, a column or a source table that is not there."""


def collect(study: str, *, results_root: str | Path | None = None) -> pd.DataFrame:
    """All numbers of the runs of `study` that succeeded, columns `COLUMNS` of `gloria_core.study.record`.

    Only runs of the current plan (plan.json) with `status: ok` for the current code and data count. The others are
    listed in `attrs["skipped"]`, a list of {"run_id", "reason"}: show it, so that nobody takes them for measured.
    `results_root` is the folder of the studies, default results/runs. Raises `TableError`.
    """
    folder = _study_folder(study, results_root)
    plan = read_json(folder / "plan.json")
    if not plan:
        raise TableError(f"{folder} has no plan.json: run the study first (make study STUDY={study})")
    tables, skipped = [pd.DataFrame(columns=list(COLUMNS))], []
    for run in plan["runs"]:
        try:
            tables.append(_metrics(folder / run["run_id"], run["fingerprint"]))
        except TableError as error:
            skipped.append({"run_id": run["run_id"], "reason": str(error)})
    # a run without numbers would turn the columns of numbers into columns of objects
    rows = pd.concat([table for table in tables if len(table)] or tables, ignore_index=True)
    rows.attrs["skipped"] = skipped
    return rows


def _study_folder(study: str, results_root: str | Path | None) -> Path:
    return (Path(results_root) if results_root else repository_root() / RUNS) / study


def _metrics(folder: Path, fingerprint: str) -> pd.DataFrame:
    """The rows of one run. Raises `TableError` with the reason why they do not count."""
    record = read_json(folder / "run.json")
    if not record:
        raise TableError("no run.json: not run, still running, or killed")
    if record.get("fingerprint") != fingerprint:
        raise TableError("stale: made by other code cells or other data than the plan's")
    if record.get("status") != "ok":
        reason = f": {record['error']['value']}" if record.get("status") == "not applicable" else ""
        raise TableError(f"{record.get('status')}{reason}")
    try:
        # only an empty cell is a missing value: a finding may be called "None"
        text = pd.read_csv(folder / "metrics.csv", dtype=str, keep_default_na=False)
        if tuple(text.columns) != COLUMNS:
            raise ValueError(f"columns are {list(text.columns)}")
        # an undefined value is written as "nan"
        return text.assign(**text[NUMBERS].replace(["", "nan"], None).apply(pd.to_numeric))
    except (OSError, ValueError) as error:
        raise TableError(f"metrics.csv cannot be read: {error}") from None


def costs(study: str, *, results_root: str | Path | None = None) -> pd.DataFrame:
    """One row a finished run, by run_id: notebook, device, wall_seconds, peak_memory_mb, commit, dirty."""
    records = [read_json(path) for path in sorted(_study_folder(study, results_root).glob("*/run.json"))]
    names = ["run_id", "notebook", "device", "wall_seconds", "peak_memory_mb", "commit", "dirty"]
    finished = [record for record in records if record.get("status") == "ok"]
    return pd.DataFrame(finished, columns=names).set_index("run_id")


def confounds(dataset: str) -> str:
    """Every paragraph of the dataset's card (data_manifests/<dataset>.md) that begins with **Confounds, as Markdown.

    A sentence that says so where there is no card, or none of its paragraphs does.
    """
    path = repository_root() / "data_manifests" / f"{dataset}.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    named = re.findall(r"^\*\*Confounds.*?(?=\n\s*\n|\s*\Z)", text, re.DOTALL | re.MULTILINE)
    missing = f"Its card data_manifests/{dataset}.md says nothing of confounds." if text else "It has no card."
    return "\n\n".join(named) or missing


def with_counts(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with the positives of their target and the patients of their split, as notebook 01 counted them.

    Blank where it did not: for a macro, and for a part of a test split.
    """
    keys, table = ["dataset", "split", "target"], rows
    for name, by in (("positives", keys), ("patients", keys[:2])):
        counted = rows[(rows["task"] == "data") & (rows["metric"] == name)].drop_duplicates(by)
        table = table.merge(counted[[*by, "value"]].rename(columns={"value": name}), on=by, how="left")
    return table


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over the seeds of each `CASE`.

    Columns: those of `CASE`, then mean, sd (blank for one seed), seeds (how many have a value), the smallest n,
    positives and patients, ci_low and ci_high (only for one seed: intervals are not averaged), and a note where there
    is no value.
    Raises `TableError` when one seed has two numbers of one case.
    """
    repeated = rows[rows.duplicated([*CASE, "seed"], keep=False)]
    if len(repeated):
        first = repeated.iloc[0][[*CASE, "seed"]].to_dict()
        raise TableError(f"{len(repeated)} numbers share a case and a seed, e.g. {first}; choose one of them")
    groups = rows.groupby(list(CASE), dropna=False, sort=False)
    table = groups["value"].agg(mean="mean", sd="std", seeds="count")
    table = table.join(groups[[name for name in COUNTS if name in rows]].min())
    bounds = groups[["ci_low", "ci_high"]].first().where(groups.size() == 1)
    table = table.join(bounds).reset_index()
    return table.assign(note=[_undefined(row) for row in table.to_dict("records")])


def _undefined(row: Mapping[str, float]) -> str:
    """Why a row of `summary` has no mean, or ""."""
    if not pd.isna(row["mean"]):
        return ""
    n, positives = row["n"], row.get("positives")
    counted = {0: "no positive", n: "positives only"}.get(positives, "not defined, see the note in its run")
    return f"{row['metric']}: {counted if n else 'nothing to score'}"


def wide(
    table: pd.DataFrame, *, index: Sequence[str], columns: Sequence[str], digits: int = 3, scale: float = 1.0
) -> pd.DataFrame:
    """A table to print: "0.912 ± 0.004" over seeds, "0.912 (0.880-0.940)" or "0.912 (-)" for one, "-" for no number.

    `table` comes from `summary`. Order of rows and columns is that of first appearance; the last columns are what each
    line counts, and why a number is not defined. Raises `TableError` when two numbers would share a cell.
    """
    keys = [*index, *columns]
    if table.duplicated(keys).any():
        differing = [name for name in CASE if name in table and name not in keys and table[name].nunique() > 1]
        raise TableError(f"several numbers in one cell; choose one of, or add to the table: {', '.join(differing)}")

    def cell(row: dict[str, float]) -> str:
        if row["seeds"] > 1:
            return f"{row['mean'] * scale:.{digits}f} ± {row['sd'] * scale:.{digits}f}"
        return with_interval(row | {"value": row["mean"]}, digits, scale)

    return grid(table.assign(cell=[cell(row) for row in table.to_dict("records")]), index, columns)


def published() -> pd.DataFrame:
    """The published numbers of data_manifests/published_numbers.csv."""
    path = repository_root() / "data_manifests" / "published_numbers.csv"
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    return table.assign(**table[["label_fraction", "value"]].replace("", None).apply(pd.to_numeric))


def paper_table(rows: pd.DataFrame, published_rows: pd.DataFrame, source_table: str) -> pd.DataFrame:
    """A published table with our numbers of the same task and metric under it, in the paper's unit.

    Columns: who ("published" or "ours"), method, dataset, metric, label_fraction, value, sd, seeds, n, mark, source,
    note. `mark` is the published number's *read* or *recalled*, ours are *measured*; `source` is the table (and
    through whom it is quoted) or our split. The dataset column says which numbers are of the same dataset. Ours are
    the rows of target `macro` where there are any. Raises `TableError`.
    """
    theirs = published_rows[published_rows["source_table"] == source_table]
    if theirs.empty:
        raise TableError(unknown("table", source_table, sorted(set(published_rows["source_table"])), where="the list"))
    via = [f"{source_table}, quoted by {name}" if name else source_table for name in theirs["quoted_via"]]
    theirs = theirs.assign(who="published", mark=theirs["status"], source=via)
    wanted = rows.merge(theirs[["task", "metric"]].drop_duplicates())
    macro = wanted[wanted["target"] == "macro"]
    ours = summary(macro if len(macro) else wanted)
    factor = ours["metric"].isin(UNIT_METRICS).map({True: 1.0, False: 100.0})
    source = "split " + ours["split"].astype(str) + ", target " + ours["target"].astype(str)
    ours = ours.assign(who="ours", method=ours["objective"], mark="measured", source=source, note="")
    ours = ours.assign(value=ours["mean"] * factor, sd=ours["sd"] * factor)
    protocol, numbers = ["who", "method", "dataset", "metric", "label_fraction"], ["value", "sd", "seeds", "n"]
    columns = [*protocol, *numbers, "mark", "source", "note"]
    return pd.concat([theirs, ours], ignore_index=True).reindex(columns=columns)


def headlines(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of `HEADLINES`, in that order. What no run has is left out.

    A part of a test split that is judged apart from a confound is a dataset of its own ("nih not meta_source=A").
    """
    return HEADLINES.merge(rows)


def separated(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method compared with the untrained model, `random`, at the smallest label fraction and the first seed.

    Columns: dataset, task, metric, label_fraction, objective, n, value, ci_low, ci_high, the last three of the baseline
    as random, random_low and random_high; apart: if the lower end of the method's 95 % interval lies above the upper
    end of the baseline's, blank where one of them has no interval. Two intervals that overlap may still differ
    significantly; two that do not certainly do.
    """
    case = ["dataset", "task", "metric"]
    chosen = headlines(rows).dropna(subset=["value"])
    # the smallest fraction of each case, then the first seed of each method; a blank one is the only one
    for name, group in (("label_fraction", case), ("seed", [*case, "objective"])):
        smallest = chosen.groupby(group)[name].transform("min")
        chosen = chosen[(chosen[name] == smallest) | smallest.isna()]
    numbers, is_baseline = ["value", "ci_low", "ci_high"], chosen["objective"] == "random"
    other = chosen[is_baseline].drop_duplicates(case)[[*case, *numbers]]
    other.columns = [*case, "random", "random_low", "random_high"]
    table = chosen[~is_baseline].merge(other, on=case)[
        [*case, "label_fraction", "objective", "n", *numbers, *other.columns[3:]]
    ]
    apart = (table["ci_low"] > table["random_high"]).astype("boolean")
    return table.assign(apart=apart.mask(table[["ci_low", "random_high"]].isna().any(axis=1)))
