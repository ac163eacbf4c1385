"""What a notebook writes about itself: numbers, figures and tables in the folder of its run.

    run = start_run(out, notebook="07_zero_shot", parameters=dict(objective=objective, dataset=dataset, seed=seed))
    run.metrics(rows, task="zero_shot")
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
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gloria_core.data.files import atomic_write, content_hash
from gloria_core.study.paths import RUNS, repository_root

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Task = Literal[
    "data", "pretraining", "zero_shot", "classification", "grounding", "segmentation", "detection", "retrieval"
]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# Columns that are filled from the parameters of the notebook where a number does not have its own.
FROM_PARAMETERS = ("objective", "dataset", "label_fraction", "seed")


class RecordError(ValueError):
    """A number, figure or table that would not be understood later."""


class NotApplicable(Exception):  # noqa: N818  (no error: the data is as it is)
    """The notebook makes no sense for this data; the message is one sentence: what is missing, and what to do instead.

    The runner gives such a run the status "not applicable". By hand one sees the sentence and no traceback.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"Not applicable: {self}"]  # IPython shows these lines in place of the traceback


class MetricRow(BaseModel):
    """One number. The fields are the columns of metrics.csv, in order; scripts outside read them: do not rename.

    A value that does not exist (AUROC with one class) is NaN, and then `n` says how many cases there were.
    """

    model_config = ConfigDict(extra="forbid")
    run_id: str
    notebook: str
    objective: str | None
    dataset: str | None
    task: Task
    label_fraction: Annotated[Finite, Field(gt=0, le=1)] | None
    seed: int | None
    split: Literal["train", "valid", "test", "all"] = "test"
    target: str = Field(pattern=r"^\S(.*\S)?$")
    metric: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    value: float = Field(strict=True)
    ci_low: Finite | None = None
    ci_high: Finite | None = None
    n: int | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if math.isinf(self.value) or (math.isnan(self.value) and self.n is None):
            raise ValueError(f"the value is {self.value}; it must be finite, or NaN with the number of cases n")
        if (self.ci_low is None) != (self.ci_high is None):
            raise ValueError("an interval needs both ci_low and ci_high")
        if self.ci_low is not None and self.ci_low > self.ci_high:
            raise ValueError(f"the interval is upside down: {self.ci_low} > {self.ci_high}")
        return self

    def case(self) -> dict[str, Any]:
        """What the number is of; a run has one number for each case."""
        return self.model_dump(exclude={"value", "ci_low", "ci_high", "n"})


# Columns of metrics.csv, in order.
COLUMNS = tuple(MetricRow.model_fields)


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
    rows: list[MetricRow] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    def metric(self, **number: Any) -> None:
        """Record one number by the names of `COLUMNS`: `task`, `target`, `metric`, `value`, and what else is known.

        `label_fraction` and `seed` come from the parameters of the notebook unless given. The same number twice raises
        in a study; in a notebook opened by hand the newer replaces the older. Raises `RecordError`.
        """
        self._add(number)

    def metrics(self, rows: pd.DataFrame, *, task: str = "", **columns: Any) -> pd.DataFrame:
        """Record a table of metrics, one number a row, and return what was recorded, to be shown.

        Its columns are found by their names in `COLUMNS`; others are for the eye and left out. `task` and `columns`
        replace a column or add it: one value for all rows, or one for each. Raises `RecordError`.
        """
        rows = rows.assign(**columns, **({"task": task} if task else {}))
        rows = rows[[name for name in COLUMNS if name in rows]]
        for row in rows.to_dict("records"):
            # a table leaves a cell empty with NaN, except in the column `value`, where NaN has a meaning
            self._add({key: None if key != "value" and value != value else value for key, value in row.items()})
        return rows

    def _add(self, given: dict[str, Any]) -> None:
        row = {name: self.parameters.get(name) for name in FROM_PARAMETERS}
        row |= {
            key: value.item() if hasattr(value, "item") else value for key, value in given.items() if value is not None
        }
        try:
            number = MetricRow(**row | {"run_id": self.run_id, "notebook": self.notebook})
        except ValidationError as error:
            what = "/".join(str(row.get(name)) for name in ("task", "target", "metric"))
            faults = [f"{fault['msg']} ({', '.join(map(str, fault['loc']))})" for fault in error.errors()]
            raise RecordError(f"{what}: {'; '.join(faults)}, in {row}") from None
        same = [old for old in self.rows if old.case() == number.case()]
        if same and not self.interactive:
            raise RecordError(
                f"{number.metric} of {number.target!r} ({number.task}, {number.split}) is recorded twice: "
                f"{same[0].value} and {number.value}; give what differs, e.g. label_fraction or seed"
            )
        self.rows = [old for old in self.rows if old not in same] + [number]

    def figure(self, figure: Figure, name: str) -> Figure:
        """Save `figures/<name>.png` and return the figure, so that the last line of a cell shows it once."""
        import matplotlib.pyplot as plt

        picture = io.BytesIO()
        # no software version inside: the same picture is the same file
        figure.savefig(picture, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
        atomic_write(self.folder / "figures" / f"{_file_name(name)}.png", picture.getvalue())
        plt.close(figure)  # else the notebook would show it a second time at the end of the cell
        return figure

    def table(self, table: pd.DataFrame, name: str) -> pd.DataFrame:
        """Save `tables/<name>.csv` (with the index when it has a name) and return the table, to be shown."""
        named = any(level is not None for level in table.index.names)
        atomic_write(self.folder / "tables" / f"{_file_name(name)}.csv", table.to_csv(index=named))
        return table

    def finish(self) -> Path:
        """Write metrics.csv, and notes.json with device, peak memory (MiB) and seconds. Call it last."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in self.rows)
        seconds = round(time.time() - self.started, 2)
        notes = {"device": device_in_use(), "peak_memory_mb": peak_memory_mb(), "seconds": seconds}
        atomic_write(self.folder / "notes.json", json.dumps(notes, indent=1) + "\n")
        atomic_write(self.folder / "metrics.csv", text.getvalue())
        return self.folder / "metrics.csv"


def start_run(out: str | Path, *, notebook: str, parameters: Mapping[str, Any]) -> Run:
    """Open the folder `out` of this run; `out=""` (a notebook opened by hand) is results/runs/interactive/<notebook>.

    By hand, other parameters than the notebook's defaults have a folder of their own: its name ends in their hash.
    `parameters` fill the columns `FROM_PARAMETERS` of every number, where they have them. Raises `ParameterError`
    where the notebook was given a parameter of another type than its file says.
    """
    interactive, changed = str(out) == "", _changed_parameters(notebook)
    name = _file_name(notebook) + (f"-{content_hash(changed, digits=8)}" if changed else "")
    folder = repository_root() / RUNS / "interactive" / name if interactive else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    run_id = "interactive" if interactive else folder.resolve().name
    return Run(folder, run_id, _file_name(notebook), dict(parameters), interactive)


def _changed_parameters(notebook: str) -> dict[str, Any]:
    """In a kernel, the parameters of the notebook that are not its defaults; {} elsewhere.

    They are checked: `papermill -p` and people give what the runner refuses.
    """
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    path = repository_root() / "notebooks" / f"{notebook}.ipynb"
    if shell is None or not path.is_file():
        return {}
    from gloria_core.study import parameters  # slow to import

    known = parameters.read(path)
    values = known.check({name: shell.user_ns[name] for name in known.types if name in shell.user_ns})
    return {name: value for name, value in values.items() if value != known.defaults[name]}


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


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise RecordError(f"{name!r} must be a plain file name without folder and suffix: letters, digits, - and _")
    return name
