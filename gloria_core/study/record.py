"""What a notebook writes about itself: numbers, figures and tables in the folder of its run.

    run = start_run(out, notebook="07_zero_shot", parameters=dict(objective=objective, dataset=dataset, seed=seed))
    run.metric(task="zero_shot", target="macro", metric="auroc", value=0.93, ci_low=0.91, ci_high=0.95, n=600)
    run.figure(fig, "scores")
    run.finish()

`metrics.csv` holds one number a row. Means and spreads over seeds are computed by notebook 09, never stored.
The proof of success, `run.json`, is not written here: the runner writes it after the whole notebook has ended.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gloria_core.study.paths import RUNS, repository_root, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLUMNS = (
    "run_id", "notebook", "objective", "dataset", "task", "label_fraction", "seed", "split", "target", "metric",
    "value", "ci_low", "ci_high", "n",
)  # fmt: skip
"""Columns of metrics.csv, in order. Scripts outside read them: do not rename."""

TASKS = (
    "data", "pretraining", "zero_shot", "classification", "grounding", "segmentation", "detection", "retrieval",
)  # fmt: skip
SPLITS = ("train", "valid", "test", "all")

_NUMBERS = {"value": float, "ci_low": float, "ci_high": float, "n": int, "label_fraction": float, "seed": int}
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")
_METRIC = re.compile(r"[a-z][a-z0-9_]*")


class RecordError(ValueError):
    """A number, figure or table that would not be understood later."""


@dataclass
class Run:
    """One run of one notebook. Made by `start_run`.

    `folder` is where everything of this run goes; `rows` are the numbers recorded so far.
    """

    folder: Path
    run_id: str
    notebook: str
    parameters: Mapping[str, Any]
    interactive: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    def metric(
        self,
        *,
        task: str,
        target: str,
        metric: str,
        value: float,
        ci_low: float | None = None,
        ci_high: float | None = None,
        n: int | None = None,
        split: str = "test",
        label_fraction: float | None = None,
        seed: int | None = None,
    ) -> None:
        """Records one number; `label_fraction` and `seed` come from the parameters of the notebook unless given.

        A value that does not exist (AUROC with one class) is NaN, and then `n` must say how many cases there were.
        The same number twice raises in a study; while one plays in a notebook, the newer replaces the older.
        Raises `RecordError`.
        """
        interval = {"ci_low": ci_low, "ci_high": ci_high, "n": n}
        protocol = {"task": task, "target": target, "split": split, "label_fraction": label_fraction, "seed": seed}
        self._add({**protocol, "metric": metric, "value": value, **interval})

    def metrics(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Records a whole table: one number a row, columns by the names of `COLUMNS`. Returns it, to be shown.

        Here `objective` and `dataset` may differ from the notebook's parameters.
        Raises `RecordError` for a column that metrics.csv does not have.
        """
        unknown = [name for name in rows.columns if name not in COLUMNS[2:]]
        if unknown:
            raise RecordError(f"no column {unknown[0]!r} in metrics.csv; it has {', '.join(COLUMNS[2:])}")
        for row in rows.to_dict("records"):
            # a table leaves a cell empty with NaN, except in the column `value`, where NaN has a meaning
            self._add({key: None if key != "value" and value != value else value for key, value in row.items()})
        return rows

    def _add(self, given: dict[str, Any]) -> None:
        row = dict.fromkeys(COLUMNS) | {"split": "test"}
        row |= {name: self.parameters.get(name) for name in ("objective", "dataset", "label_fraction", "seed")}
        row |= {key: value for key, value in given.items() if value is not None}
        row |= {"run_id": self.run_id, "notebook": self.notebook}
        _check(row)
        for name, kind in _NUMBERS.items():  # numpy and torch scalars become plain numbers
            row[name] = None if row[name] is None else kind(row[name])
        same = [old for old in self.rows if _key(old) == _key(row)]
        if same and not self.interactive:
            raise RecordError(
                f"{row['metric']} of {row['target']!r} ({row['task']}, {row['split']}) is recorded twice: "
                f"{same[0]['value']} and {row['value']}; give what differs, e.g. label_fraction or seed"
            )
        self.rows = [old for old in self.rows if _key(old) != _key(row)] + [row]

    def figure(self, figure: Figure, name: str) -> Figure:
        """Saves `figures/<name>.png` and returns the figure, so that the last line of a cell shows it once."""
        import matplotlib.pyplot as plt

        path = self.folder / "figures" / f"{_checked_name(name)}.png"
        picture = io.BytesIO()
        # no software version inside: the same picture is the same file
        figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        write_atomically(path, picture.getvalue())
        plt.close(figure)  # else the notebook would show it a second time at the end of the cell
        return figure

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Saves `tables/<name>.csv` (with the index when it has a name) and returns the table, to be shown."""
        named = any(level is not None for level in table.index.names)
        write_atomically(self.folder / "tables" / f"{_checked_name(name)}.csv", table.to_csv(index=named))
        return table

    def finish(self) -> Path:
        """Writes metrics.csv, and notes.json with device, peak memory (MiB) and seconds. Call it last."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in self.rows)
        notes = {
            "device": device_in_use(),
            "peak_memory_mb": peak_memory_mb(),
            "seconds": round(time.time() - self.started, 2),
        }
        write_atomically(self.folder / "notes.json", json.dumps(notes, indent=1) + "\n")
        write_atomically(self.folder / "metrics.csv", text.getvalue())
        return self.folder / "metrics.csv"


def start_run(out: str | Path, *, notebook: str, parameters: Mapping[str, Any]) -> Run:
    """Opens the folder `out` of this run; `out=""` (a notebook opened by hand) is results/runs/interactive/<notebook>.

    `parameters` fill the columns objective, dataset, label_fraction and seed of every number, where they have them.
    Raises `RecordError` when these four are not plain values.
    """
    interactive = str(out) == ""
    folder = repository_root() / RUNS / "interactive" / _checked_name(notebook) if interactive else Path(out)
    for name in ("objective", "dataset", "label_fraction", "seed"):
        if isinstance(parameters.get(name), list | tuple | dict):
            raise RecordError(f"parameter {name!r} is {parameters[name]!r}: give one value, and others row by row")
    folder.mkdir(parents=True, exist_ok=True)
    run_id = "interactive" if interactive else folder.resolve().name
    return Run(folder, run_id, _checked_name(notebook), dict(parameters), interactive)


def peak_memory_mb() -> float:
    """Largest resident memory of this process or of one of its ended children so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    status = Path("/proc/self/status")
    if status.exists():  # after fork and exec, ru_maxrss still remembers the parent; VmHWM does not
        own = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text()).group(1))
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return round(max(own, children) / 2**20, 1)


def device_in_use() -> str:
    """`cuda: <name of the card>` when this process has used one, else `cpu`."""
    torch = sys.modules.get("torch")  # never imported here: a notebook that did not need it used the processor
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"cuda: {torch.cuda.get_device_name()}"
    return "cpu"


def _check(row: Mapping[str, Any]) -> None:
    what = f"{row['task']}/{row['target']}/{row['metric']}"
    if row["task"] not in TASKS:
        raise RecordError(f"unknown task {row['task']!r}; it is one of {', '.join(TASKS)}")
    if row["split"] not in SPLITS:
        raise RecordError(f"{what}: unknown split {row['split']!r}; it is one of {', '.join(SPLITS)}")
    if not isinstance(row["metric"], str) or not _METRIC.fullmatch(row["metric"]):
        raise RecordError(f"{what}: a metric is named in small letters, digits and underscores, e.g. recall_at_5")
    if not isinstance(row["target"], str) or not row["target"].strip() or "\n" in row["target"]:
        raise RecordError(f"{what}: the target must be one line of text, e.g. 'macro' or 'Edema'")
    for name in _NUMBERS:
        number = row[name]
        if number is None and name != "value":
            continue
        if isinstance(number, str | bool) or not hasattr(number, "__float__") or math.isinf(float(number)):
            raise RecordError(f"{what}: {name} is {number!r}; it must be a finite number")
        if _NUMBERS[name] is int and not float(number).is_integer():
            raise RecordError(f"{what}: {name} is {number!r}; it must be a whole number")
    if math.isnan(float(row["value"])) and row["n"] is None:
        raise RecordError(f"{what}: the value is NaN; then n must say how many cases it was asked of")
    if (row["ci_low"] is None) != (row["ci_high"] is None):
        raise RecordError(f"{what}: an interval needs both ci_low and ci_high")
    if row["ci_low"] is not None and row["ci_low"] > row["ci_high"]:
        raise RecordError(f"{what}: the interval is upside down: {row['ci_low']} > {row['ci_high']}")
    if row["label_fraction"] is not None and not 0 < row["label_fraction"] <= 1:
        raise RecordError(f"{what}: label_fraction is {row['label_fraction']}; it lies in (0, 1], e.g. 0.01")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in COLUMNS if name not in ("value", "ci_low", "ci_high", "n"))


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RecordError(f"{name!r} must be a plain file name without folder and suffix: letters, digits, - and _")
    return name
