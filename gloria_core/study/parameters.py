"""The parameters of a notebook: read by papermill and checked by pydantic, before any kernel starts.

papermill only warns about a misspelt parameter and runs on with the default, perhaps for a day. The cell tagged
`parameters` has one line for each, in which nothing is computed:

    epochs: int = 12  # the loss is flat after ten on the phantom
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from papermill.translators import PythonTranslator
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from gloria_core.data.files import did_you_mean

TYPES = {kind.__name__: kind for kind in (str, int, float, bool)}
TYPES |= {f"list[{name}]": list[kind] for name, kind in TYPES.items()} | {"dict": dict[str, Any]}


class ParameterError(ValueError):
    """A parameters cell that cannot be read, or a value that does not fit it."""


def unknown(what: str, key: Any, known: Iterable[str], *, where: str) -> str:
    """The message for a name that does not exist: what was meant, perhaps, and what there is."""
    known = list(known)
    hint = did_you_mean(key, known, cutoff=0.5)
    return f"unknown {what} {key!r} for {where}.{hint} It has: {', '.join(known) or 'none'}"


@dataclass(frozen=True)
class Parameters:
    """The parameters of one notebook: name, type (a key of `TYPES`) and default of each, in their order."""

    notebook: str
    types: dict[str, str]
    defaults: dict[str, Any]

    def check(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters: the defaults, replaced by what is given.

        An int is taken for a float, a bool never for an int. Raises `ParameterError` for an unknown name (with the
        nearest one that exists) and for a wrong type.
        """
        fields = TypedDict("fields", {name: TYPES[kind] for name, kind in self.types.items()}, total=False)
        fields.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
        try:
            return TypeAdapter(fields).validate_python(self.defaults | dict(given))
        except ValidationError as error:
            name = error.errors()[0]["loc"][0]
            if name not in self.types:
                raise ParameterError(unknown("parameter", name, self.types, where=self.notebook)) from None
            value, hint = given.get(name), ""
            if isinstance(value, str):
                hint = f"; `papermill -p` may give it as text, then write -y '{name}: {value or self.defaults[name]}'"
            raise ParameterError(
                f"{self.notebook}: parameter {name!r} is {self.types[name]}, not {value!r}; its default is "
                f"{self.defaults[name]!r}{hint}"
            ) from None


def read(notebook: str | Path) -> Parameters:
    """The parameters of a notebook file.

    Raises `ParameterError`, naming the notebook, for one that has no cell tagged `parameters` or several, and for a
    line of it that is not `name: type = literal  # reason`.
    """
    notebook = Path(notebook)
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook.name} is no Jupyter notebook ({error})") from error
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(
            f"{notebook.name} has {len(tagged)} code cells tagged 'parameters'; it needs exactly one "
            "(JupyterLab: select the cell, property inspector, add tag 'parameters')"
        )
    types, defaults = {}, {}
    for item in PythonTranslator.inspect({"source": tagged[0]}):
        try:
            types[item.name], defaults[item.name] = item.inferred_type_name, ast.literal_eval(item.default)
        except (ValueError, SyntaxError):
            types[item.name] = ""
    written = re.findall(r"^(\w+)\s*[:=]", tagged[0], re.MULTILINE)
    for name in written:
        # papermill reads lines with a pattern of its own and loses those with a second `=` or a `|`
        if types.get(name) not in TYPES or written.count(name) > 1:
            raise ParameterError(
                f"{notebook.stem}, parameters cell: {name!r} cannot be read; write `name: type = literal  # reason` "
                f"once, without another `=`, with one of the types {', '.join(TYPES)}"
            )
    parameters = Parameters(notebook.stem, types, defaults)
    parameters.check({})
    return parameters
