"""Whole pretrained models in the formats that the papers' repositories published: `load_pretrained(path)`.

What a file is, is told by the names of its tensors; every format has a file of its own in `layouts`. Nothing inside a
file is executed (`foreign.read_state`).
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gloria_core.checkpoints import layouts, native
from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.checkpoints.native import CheckpointError
from gloria_core.checkpoints.untrusted import CONTAINER, LoadReport, fill_reported, lookup, read_state
from gloria_core.models.image_encoder import ImageEncoder

__all__ = ["LoadReport", "PublishedModel", "load_pretrained", "read_state"]

PublishedModel = VisionLanguageModel | ImageEncoder | ImageClassifier | nn.Module
"""What a file may hold; the last is a U-Net of segmentation-models-pytorch."""


def load_pretrained(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, allow_partial: bool = False
) -> PublishedModel:
    """A published model in evaluation mode (some released loaders forget that).

    Returns, by what the file holds:
    - image and text encoder with their objective: a `VisionLanguageModel`;
    - an image encoder alone (PRIOR's `prior_resnet50.pt`; files of torchvision, timm and transformers): an
      `ImageEncoder`, its input channels as in the file;
    - an encoder with a linear head (fine-tuned by GLoRIA, gloria-Extended, CXR-CLIP): an `ImageClassifier`;
    - a U-Net (GLoRIA, gloria-Extended): that of segmentation-models-pytorch;
    - a checkpoint of our own: what `gloria_core.load` gives.
    Each has `.load_report` (what became of each tensor), `.origin` (the layout) and `.behavior` ("published", or that
    of our own checkpoint).

    `tokenizer`: the one that a text encoder was trained with (`load_tokenizer`); without it the model takes token ids
    only. A checkpoint of our own has one already.
    Raises CheckpointError for a file that is truncated, holds code, is of no known layout, or does not fit exactly;
    `allow_partial` turns the last into a warning, and what is missing keeps random values.
    """
    path = Path(path)
    tensors, stored = read_state(path)
    if lookup(stored, f"{CONTAINER}.format", default=None) == native.FORMAT:
        return _own(path, tokenizer, tensors)
    layout = _layout(path, tensors, stored)
    try:
        translation = layout.translate(tensors, stored)
        with torch.random.fork_rng(devices=[]):  # random values that are overwritten leave no trace
            model = translation.build(tokenizer)
    except KeyError as error:
        raise CheckpointError(f"{path} looks like {layout.NAME}, but has no tensor {error}") from error
    except ValueError as error:  # ConfigError, or an encoder that refuses what the file asks for
        raise CheckpointError(f"{path}: {error}") from error
    report = fill_reported(model, translation.tensors, translation.ignored, path=path, allow_partial=allow_partial)
    if not report.complete:
        warnings.warn(f"{path} was loaded in part: {report}", stacklevel=2)
    model.load_report, model.origin, model.behavior = report, layout.NAME, "published"
    return model.eval()


def _own(path: Path, tokenizer: PreTrainedTokenizerBase | None, tensors: Mapping[str, Tensor]) -> VisionLanguageModel:
    model = native.load(path)
    if tokenizer is not None:
        if model.tokenizer is not None:
            raise CheckpointError(f"{path} is a checkpoint of gloria_core and has its tokenizer; give none")
        model.tokenizer = tokenizer
    model.load_report, model.origin = LoadReport(matched=tuple(tensors)), native.FORMAT
    model.behavior = model.config.behavior
    return model


def _layout(path: Path, tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> ModuleType:
    """The one layout that recognises the file. Raises CheckpointError for none or several."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    known = _layouts()
    found = [layout for layout in known if layout.recognise(shapes, stored)]
    if len(found) != 1:
        names = ", ".join(layout.NAME for layout in found or known)
        raise CheckpointError(
            f"{path}: {'more than one layout fits: ' if found else 'no known layout fits; known: '}{names}. "
            f"Its first tensors: {', '.join(list(tensors)[:5])}"
        )
    return found[0]


def _layouts() -> list[ModuleType]:
    """Every module of `layouts` that is one."""
    modules = (
        importlib.import_module(f"{layouts.__name__}.{found.name}") for found in pkgutil.iter_modules(layouts.__path__)
    )
    return [module for module in modules if hasattr(module, "recognise")]
