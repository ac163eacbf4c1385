"""Tables as they are shown: rounded, counts without decimals, and "-" where something does not apply.

A number without an interval reads "0.912 (-)": its metric has none, there are too few patients for one
(`tasks.metrics.MIN_PATIENTS` and `MIN_PER_CLASS`), or every resample gives the same number, as where nothing was found
in any image: an interval of no width would claim certainty. The note of its line says which.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_integer_dtype, is_numeric_dtype

# Columns of metric rows that count something: what was scored, and what was learned from.
COUNTS = ("n", "positives", "patients", "n_boxes", "n_train", "train_positives")


class TextTable(pd.DataFrame):
    """A table of texts that is shown whole, its notes too; one without a line says so."""

    def __repr__(self) -> str:
        return self.to_string() if len(self) else "no line to show"

    def _repr_html_(self) -> str:
        limits = ("display.max_colwidth", "display.max_columns", "display.max_rows")
        with pd.option_context(*(part for name in limits for part in (name, None))):
            return super()._repr_html_() if len(self) else f"<p>{self!r}</p>"


def shown(table: pd.DataFrame | pd.Series, digits: int = 3) -> TextTable:
    """The table as text, to be the value of a cell: whole numbers as such, others with `digits` digits."""
    table = table.to_frame() if isinstance(table, pd.Series) else table
    columns = {place: _texts(table.iloc[:, place], digits) for place in range(table.shape[1])}
    index = table.index.to_frame().apply(_texts, digits=None)
    index = pd.MultiIndex.from_frame(index) if table.index.nlevels > 1 else pd.Index(index.iloc[:, 0])
    text = pd.DataFrame(columns, table.index, dtype=object).set_axis(table.columns, axis=1)
    return TextTable(text.set_axis(index.set_names(table.index.names)))


def _texts(column: pd.Series, digits: int | None) -> pd.Series:
    numbers = column if is_numeric_dtype(column) and not is_bool_dtype(column) else pd.Series(dtype=float)
    whole = is_integer_dtype(numbers) or ((numbers.dropna() % 1 == 0).all() and numbers.abs().max() > 1)
    form = "g" if digits is None else ".0f" if whole else f".{digits}f"

    def text(value: object) -> str:
        if value == "" or pd.isna(value):
            return "-"
        return format(value, form) if isinstance(value, float) or len(numbers) else str(value)

    return column.astype(object).map(text)


def with_interval(row: Mapping[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """ "0.912 (0.880-0.940)" of value, ci_low and ci_high; "0.912 (-)" without an interval, "-" without a value."""
    value, low, high = (f"{row[name] * scale:.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    unknown = pd.isna(row["ci_low"]) or row["ci_low"] == row["ci_high"]
    return "-" if value == "nan" else f"{value} (-)" if unknown else f"{value} ({low}-{high})"


def metric_table(
    rows: pd.DataFrame, *, index: Sequence[str] = ("target",), columns: Sequence[str] = ("metric",), digits: int = 3
) -> TextTable:
    """Metric rows by `with_interval`, then what each line counts, and its notes; see `grid`.

    Without `columns` one number a line, and its chance where the rows have it.
    """
    rows = rows.assign(cell=[with_interval(row, digits) for row in rows.to_dict("records")])
    if columns:
        return grid(rows, index, columns)
    table = rows.set_index(list(index))[["cell", *_said(rows, ("chance", *COUNTS, "note"))]]
    return shown(table.rename(columns={"cell": "value"}), digits)


def grid(rows: pd.DataFrame, index: Sequence[str], columns: Sequence[str]) -> TextTable:
    """The texts of the column `cell` by `index` and `columns`, "-" where there is none, and columns of the whole line.

    These are the `COUNTS` and the `note` that the rows have. Numbers of one line that count different samples show
    the smallest and the largest count ("88 to 90"). Order is that of first appearance.
    """
    index, keys = list(index), [*index, *columns]
    rows = rows.assign(**{name: _texts(rows[name], None) for name in keys})
    table = rows.set_index(keys)["cell"].unstack(list(columns), sort=False).fillna("-")
    lines = rows.groupby(index, sort=False)
    for name in _said(rows.drop(columns=keys), (*COUNTS, "note")):
        column = lines[name].agg(_joined if name == "note" else _span)
        table[(name, *[""] * (len(columns) - 1)) if len(columns) > 1 else name] = column
    return shown(table)


def _said(rows: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Those of the names that are columns with something in them."""
    return [name for name in names if name in rows and (rows[name].notna() & (rows[name] != "")).any()]


def _span(counts: pd.Series) -> str:
    low, high = counts.min(), counts.max()
    return "-" if pd.isna(low) else f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _joined(notes: pd.Series) -> str:
    parts = (part for note in notes if isinstance(note, str) for part in note.split("; ") if part)
    return "; ".join(dict.fromkeys(parts)) or "-"
