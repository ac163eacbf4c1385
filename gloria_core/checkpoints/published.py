"""Whole pretrained models in the formats that the papers' repositories published: `load_pretrained(path)`.

What a file is, is told by the names of its tensors; every format has a file of its own in `layouts`. Nothing inside a
file is executed (`foreign.read_state`).
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from pathlib import Path
from types import ModuleType

from transformers import PreTrainedTokenizerBase

from gloria_core.checkpoints import layouts
from gloria_core.checkpoints.foreign import LoadReport, fill_reported, read_state
from gloria_core.checkpoints.model import VisionLanguageModel, assemble
from gloria_core.checkpoints.native import CheckpointError

__all__ = ["LoadReport", "load_pretrained", "read_state"]


def load_pretrained(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, allow_partial: bool = False
) -> VisionLanguageModel:
    """A published model, with `behavior="published"`, in evaluation mode (some released loaders forget the latter).

    `tokenizer`: the one that it was trained with (`load_tokenizer`); without it the model takes token ids only.
    `model.load_report` says what became of each tensor, `model.origin` which layout the file has.
    Raises CheckpointError for a file that is truncated, holds code, is of no known layout, or does not fit exactly;
    `allow_partial` turns the last into a warning, and what is missing keeps random values.
    """
    path = Path(path)
    tensors, stored = read_state(path)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    known = _layouts()
    found = [layout for layout in known if layout.recognise(shapes, stored)]
    if len(found) != 1:
        names = ", ".join(layout.NAME for layout in found or known)
        raise CheckpointError(
            f"{path}: {'more than one layout fits: ' if found else 'no known layout fits; known: '}{names}. "
            f"Its first tensors: {', '.join(list(tensors)[:5])}"
        )
    try:
        translation = found[0].translate(tensors, stored)
        model = assemble(translation.config, translation.text, tokenizer)
    except KeyError as error:
        raise CheckpointError(f"{path} looks like {found[0].NAME}, but has no tensor {error}") from error
    except ValueError as error:  # ConfigError, or an encoder that refuses what the file asks for
        raise CheckpointError(f"{path}: {error}") from error
    report = fill_reported(model, translation.tensors, translation.ignored, path=path, allow_partial=allow_partial)
    if not report.complete:
        warnings.warn(f"{path} was loaded in part: {report}", stacklevel=2)
    model.load_report, model.origin = report, found[0].NAME
    return model.eval()


def _layouts() -> list[ModuleType]:
    """Every module of `layouts` that is one."""
    modules = (
        importlib.import_module(f"{layouts.__name__}.{found.name}") for found in pkgutil.iter_modules(layouts.__path__)
    )
    return [module for module in modules if hasattr(module, "recognise")]
