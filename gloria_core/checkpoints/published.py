"""Whole pretrained models in the formats that the papers' repositories published: `load_pretrained(path)`.

What a file is, is told by the names of its tensors; every format has a file of its own in `layouts`. Nothing inside a
file is executed (`untrusted.read_state`).
"""

import importlib
import pkgutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gloria_core.checkpoints import layouts, native
from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.checkpoints.layouts.base import Layout, Stored
from gloria_core.checkpoints.model import ConfigError, VisionLanguageModel
from gloria_core.checkpoints.untrusted import CONTAINER, lookup, read_state
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.key_maps import JOINED, Named
from gloria_core.models.weights import WeightsError, compare

# What a file may hold; the last is a U-Net of segmentation-models-pytorch.
PublishedModel = VisionLanguageModel | ImageEncoder | ImageClassifier | nn.Module


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of a file: names in the file's spelling, except `missing`, which is the model's."""

    matched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model came from the file, and nothing was left over unexplained."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched", f"{len(self.ignored)} ignored (no place in the model)"]
        for name in ("missing", "unexpected", "mismatched"):
            values = getattr(self, name)
            shown = f": {', '.join(values[:4])}{', ...' if len(values) > 4 else ''}" if values else ""
            parts.append(f"{len(values)} {name}{shown}")
        return "; ".join(parts)


def load_pretrained(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, allow_partial: bool = False
) -> PublishedModel:
    """A published model in evaluation mode (some released loaders forget that).

    Returns, by what the file holds:
    - image and text encoder with their objective: a `VisionLanguageModel`;
    - an image encoder alone (PRIOR's `prior_resnet50.pt`; files of torchvision, timm and transformers): an
      `ImageEncoder`, its input channels as in the file;
    - an encoder with a head (fine-tuned by GLoRIA, gloria-Extended, CXR-CLIP, MGCA): an `ImageClassifier`;
    - a U-Net (GLoRIA, gloria-Extended): that of segmentation-models-pytorch;
    - a checkpoint of our own: what `gloria_core.load` gives.
    Each has `.load_report` (what became of each tensor), `.origin` (the layout) and `.behavior` ("published", or that
    of our own checkpoint).

    `tokenizer`: the one that a text encoder was trained with (`load_tokenizer`); without it the model takes token ids
    only. A checkpoint of our own has one already.
    Raises WeightsError for a file that is truncated, holds code, is of no known layout, or does not fit exactly;
    `allow_partial` turns the last into a warning, and what is missing keeps random values.
    """
    path = Path(path)
    tensors, stored = read_state(path)
    if lookup(stored, f"{CONTAINER}.format", default=None) == native.FORMAT:
        return _own(path, tokenizer, tensors)
    layout = _layout(path, tensors, stored)
    try:
        translation = layout.translate(tensors, stored)
        if tokenizer is not None and not translation.reads_texts:
            raise ConfigError("it has no text encoder, so a tokenizer is of no use to it")
        with torch.random.fork_rng(devices=[]):  # random values that are overwritten leave no trace
            model = translation.network(tokenizer) if translation.reads_texts else translation.network()
    except KeyError as error:
        raise WeightsError(f"{path} looks like {layout.name}, but has no tensor {error}") from error
    except ValueError as error:  # an architecture that is not supported
        raise WeightsError(f"{path}: {error}") from error
    report = _fill(model, translation.tensors, translation.ignored, path=path, allow_partial=allow_partial)
    if not report.complete:
        warnings.warn(f"{path} was loaded in part: {report}", stacklevel=2)
    model.load_report, model.origin, model.behavior = report, translation.origin, "published"
    return model.eval()


def _fill(model: nn.Module, named: Named, ignored: list[str], *, path: Path, allow_partial: bool) -> LoadReport:
    """Load the tensors. Raises WeightsError where they do not fit the model exactly, unless `allow_partial`."""
    tensors = {ours: value.float() if value.is_floating_point() else value for ours, (_, value) in named.items()}
    missing, unexpected, mismatched = compare(model, tensors)
    unfit = {*unexpected, *(name.partition(" ")[0] for name in mismatched)}
    fitting = {name: value for name, value in tensors.items() if name not in unfit}
    report = LoadReport(
        matched=tuple(theirs for name in fitting for theirs in named[name][0].split(JOINED)),
        ignored=tuple(ignored),
        missing=tuple(missing),
        unexpected=tuple(named[name][0] for name in unexpected),
        mismatched=tuple(mismatched),
    )
    if not report.complete and not allow_partial:
        raise WeightsError(f"{path} does not fit the model: {report}. allow_partial=True loads what fits")
    model.load_state_dict(fitting, strict=False)
    return report


def _own(path: Path, tokenizer: PreTrainedTokenizerBase | None, tensors: Mapping[str, Tensor]) -> VisionLanguageModel:
    model = native.load(path, map_location="cpu")
    if tokenizer is not None:
        if model.tokenizer is not None:
            raise WeightsError(f"{path} is a checkpoint of gloria_core and has its tokenizer; give none")
        model.tokenizer = tokenizer
    model.load_report, model.origin = LoadReport(matched=tuple(tensors)), native.FORMAT
    model.behavior = model.config.behavior
    return model


def _layout(path: Path, tensors: Mapping[str, Tensor], stored: Stored) -> Layout:
    """The one layout that recognises the file. Raises WeightsError for none or several."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    names = [f"{layouts.__name__}.{info.name}" for info in pkgutil.iter_modules(layouts.__path__)]
    known = [layout for name in names for layout in getattr(importlib.import_module(name), "LAYOUTS", ())]
    fitting = [layout for layout in known if layout.recognise(shapes, stored)]
    if len(fitting) != 1:
        raise WeightsError(
            f"{path}: {'more than one layout fits' if fitting else 'no known layout fits; known'}: "
            f"{', '.join(layout.name for layout in fitting or known)}. "
            f"Its first tensors: {', '.join(list(tensors)[:5])}"
        )
    return fitting[0]
