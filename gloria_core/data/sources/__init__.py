"""One small file per public dataset; each has a function `prepare(root, *, ...) -> manifest frame`.

`prepare("nih", root, options)` calls that of `gloria_core.data.sources.nih` and checks its options by their types. A
new dataset is one new module here and one card in `data_manifests/`; nothing else is edited. Long lists of an owner's
words are in `vocabularies.json`.
"""

import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import validate_call

from gloria_core.data.files import did_you_mean
from gloria_core.data.raw_folder import RawFolder


def vocabulary(dataset: str, name: str) -> Any:
    """A list or table of the owner's own words from `vocabularies.json`, such as the findings of each label."""
    return json.loads((resources.files(__name__) / "vocabularies.json").read_text(encoding="utf-8"))[dataset][name]


def available() -> list[str]:
    """Names that `prepare` takes: the modules of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def options_of(dataset: str) -> tuple[str, ...]:
    """Names of the options that the source of `dataset` takes. Raises ValueError for a dataset without a module."""
    if dataset not in available():
        hint = did_you_mean(dataset, available())
        raise ValueError(f"Unknown dataset {dataset!r}.{hint} Available: {', '.join(available())}")
    function = importlib.import_module(f"{__name__}.{dataset}").prepare
    return tuple(inspect.signature(function).parameters)[1:]


def check_folder(dataset: str, root: str | Path, options: Mapping[str, object]) -> None:
    """Raise ManifestError where `root` is no folder, or lacks a table that the module of `dataset` names in NEEDS."""
    folder = RawFolder(root, dataset)
    # an option `table` names another
    if dataset in available() and "table" not in options:
        folder.require(getattr(importlib.import_module(f"{__name__}.{dataset}"), "NEEDS", {}))


def prepare(dataset: str, root: str | Path, options: Mapping[str, object] | None = None) -> pd.DataFrame:
    """Turn the raw folder `root` of `dataset` into one checked manifest frame.

    Raises ManifestError naming file, row, column and remedy; ValueError for a dataset without a module here and for a
    value that an option cannot have, TypeError for an option that the source does not have.
    """
    known = options_of(dataset)
    for option in options or {}:
        if option not in known:
            raise TypeError(f"dataset {dataset!r} has no option {option!r}; it has: {', '.join(known)}")
    function = importlib.import_module(f"{__name__}.{dataset}").prepare
    return validate_call(function)(Path(root), **(options or {}))
