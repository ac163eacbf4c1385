"""The parameters of a notebook, read from its text: no kernel, no import of what the notebook imports.

papermill only warns about a misspelt parameter and runs on with the default, perhaps for a day. So the cell tagged
`parameters` is parsed here first. It has one line for each:

    epochs: int = 12  # the loss is flat after ten on the phantom

Nothing is computed in it: papermill and this module must read the same value without running it.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCALARS = {"str": str, "int": int, "float": float, "bool": bool}
TYPES = (*_SCALARS, *(f"list[{name}]" for name in _SCALARS), "dict")


class ParameterError(ValueError):
    """A parameters cell that cannot be read, or a value that does not fit it."""


@dataclass(frozen=True)
class Parameter:
    """One line of the cell: `name: type = default  # reason`. `type` is one of `TYPES`."""

    name: str
    type: str
    default: Any
    reason: str


def read(notebook: str | Path) -> dict[str, Parameter]:
    """The parameters of a notebook file, in their order.

    Raises `ParameterError`, naming notebook and line, for a notebook that has no cell tagged `parameters` or several,
    and for a line that is not `name: type = literal  # reason`.
    """
    notebook = Path(notebook)
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook.name} is no Jupyter notebook ({error})") from error
    tagged = [
        cell
        for cell in cells
        if cell.get("cell_type") == "code" and "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(tagged) != 1:
        raise ParameterError(
            f"{notebook.name} has {len(tagged)} code cells tagged 'parameters'; it needs exactly one "
            "(JupyterLab: select the cell, property inspector, add tag 'parameters')"
        )
    return parse("".join(tagged[0]["source"]), name=notebook.stem)


def parse(source: str, *, name: str) -> dict[str, Parameter]:
    """The parameters in the source of a cell; `name` is the notebook's, for messages. Raises `ParameterError`."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{name}, parameters cell, line {error.lineno}: {error.msg}") from error
    reasons = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found: dict[str, Parameter] = {}
    lines: set[int] = set()
    for statement in statements:
        try:
            parameter = _parameter(statement, reasons.get(statement.lineno, ""))
            if parameter.name in found:
                raise ParameterError(f"{parameter.name!r} is there twice")
            if statement.lineno in lines:
                raise ParameterError("two parameters on one line")
        except ParameterError as error:
            raise ParameterError(f"{name}, parameters cell, line {statement.lineno}: {error}") from None
        found[parameter.name] = parameter
        lines.add(statement.lineno)
    return found


def _parameter(statement: ast.stmt, reason: str) -> Parameter:
    if isinstance(statement, ast.Assign):
        raise ParameterError(f"{ast.unparse(statement)!r} has no type; write `name: type = literal  # reason`")
    simple = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    if not simple or statement.value is None:
        raise ParameterError(f"{ast.unparse(statement)!r} is not `name: type = literal  # reason`")
    name, kind = statement.target.id, ast.unparse(statement.annotation)
    if kind not in TYPES:
        raise ParameterError(f"{name!r} has type {kind}; it must be one of {', '.join(TYPES)}")
    if statement.end_lineno != statement.lineno:
        raise ParameterError(f"{name!r} must fit on one line")
    try:
        default = ast.literal_eval(statement.value)
    except ValueError:
        raise ParameterError(f"{name!r} is computed: {ast.unparse(statement.value)}; write the value itself") from None
    if not reason:
        raise ParameterError(f"{name!r} has no reason; end the line with `# why this value`")
    if re.search(r"[=|]", reason):
        # papermill reads the line with a pattern of its own, loses it at these signs, and warns of an unknown parameter
        raise ParameterError(f"the reason of {name!r} has a `=` or `|`, which papermill cannot read; say it in words")
    return Parameter(name, kind, fit(name, kind, default), reason)


def check(notebook: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of the notebook: its defaults, replaced by what is given.

    An int is taken for a float, a bool never for an int. Raises `ParameterError` for an unknown name (with the
    nearest one that exists) and for a wrong type (with both types).
    """
    known = read(notebook)
    name = Path(notebook).stem
    for key in given:
        if key not in known:
            raise ParameterError(unknown("parameter", key, known, where=name))
    values = {key: parameter.default for key, parameter in known.items()}
    for key, value in given.items():
        try:
            values[key] = fit(key, known[key].type, value)
        except ParameterError as error:
            raise ParameterError(f"{name}: {error}; its default is {known[key].default!r}") from None
    return values


def fit(name: str, kind: str, value: Any) -> Any:
    """`value` as a parameter of type `kind`: floats are made floats. Raises `ParameterError` naming both types."""
    if kind.startswith("list["):
        inner = kind[len("list[") : -1]
        if isinstance(value, list) and all(_fits(inner, item) for item in value):
            return [float(item) for item in value] if inner == "float" else list(value)
    elif kind == "dict" and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    elif _fits(kind, value):
        return float(value) if kind == "float" else value
    raise ParameterError(f"parameter {name!r} is {kind}, but {value!r} is {_type_name(value)}")


def unknown(what: str, key: Any, known: Iterable[str], *, where: str) -> str:
    """The message for a name that does not exist: what was meant, perhaps, and what there is."""
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"; nearest: {near[0]!r}" if near else ""
    return f"unknown {what} {key!r} for {where}{hint}; it has: {', '.join(known) or 'none'}"


def _fits(kind: str, value: Any) -> bool:
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, int | float) if kind == "float" else isinstance(value, _SCALARS.get(kind, ()))


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return f"list[{', '.join(sorted({type(item).__name__ for item in value}))}]"
    return type(value).__name__
