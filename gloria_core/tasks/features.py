"""Frozen features: each image and each text encoded once, for linear probes, zero-shot scores, retrieval and maps.

Everything runs in eval mode, without gradients, on the device where the model is; afterwards each module has its own
mode again. Features are float32 whatever precision they were computed in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gloria_core.data.geometry import center_crop
from gloria_core.data.images import to_tensor
from gloria_core.data.reports import clean_report
from gloria_core.data.tokenizer import tokenize
from gloria_core.training.precision import Precision, choose_precision
from gloria_core.types import ImageFeatures, TextBatch, TextFeatures

T = TypeVar("T", ImageFeatures, TextFeatures, TextBatch)


@dataclass(frozen=True)
class Features:
    """Frozen features of n studies, one frontal image each, in the order of the frame.

    `paths`: of the encoded images.
    Shape: `pooled` (n, Dg) the encoder's global feature, for probes; `embedding` (n, D) the objective's global
    embedding, not normalised, for retrieval. Both float32.
    """

    paths: tuple[str, ...]
    pooled: np.ndarray
    embedding: np.ndarray


@dataclass(frozen=True)
class EncodedTexts:
    """N texts: as tokenised (`batch`, on the CPU), as encoded (`features`, float32), and `embedding` (N, D)."""

    texts: tuple[str, ...]
    batch: TextBatch
    features: TextFeatures
    embedding: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def frontal_image(row: Mapping[str, Any]) -> tuple[int, str]:
    """Number and path of a study's first image that is not lateral, as in training; its first image if all are."""
    paths = str(row["images"]).split(";")
    views = str(row["views"]).split(";") if isinstance(row.get("views"), str) and row["views"] else [""] * len(paths)
    frontals = [i for i, (_, view) in enumerate(zip(paths, views, strict=True)) if view.strip().upper() != "LATERAL"]
    number = frontals[0] if frontals else 0
    return number, paths[number].strip()


@contextmanager
def inference(model: nn.Module, precision: Precision) -> Iterator[torch.device]:
    """Eval mode, no gradients, autocast; gives the device of the model and restores every module's mode."""
    where = next(model.parameters()).device
    dtype = getattr(torch, choose_precision(where, precision))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
            yield where
    finally:
        for module, mode in modes:
            module.training = mode


def image_batches(
    model: nn.Module, frame: pd.DataFrame, cache, *, batch_size: int = 64, precision: Precision = "auto"
) -> Iterator[tuple[slice, ImageFeatures]]:
    """Encode the frontal image of each study; yields (rows of the frame, float32 features on the model's device).

    `cache[path]` is the (S, S) uint8 image, of which the model sees the centre crop.
    Raises ValueError naming the study where a feature is not finite.
    """
    config, paths = model.config, _frontal_paths(frame)
    for first in range(0, len(paths), batch_size):
        rows = slice(first, min(first + batch_size, len(paths)))
        stack = np.stack([center_crop(np.asarray(cache[path]), config.crop) for path in paths[rows]])
        # entered once for each batch: a caller that stops early leaves neither eval mode nor autocast behind
        with inference(model, precision) as where:
            pixels = to_tensor(stack, channels=config.channels, norm=config.norm).to(where)
            features = in_float32(model.encode_images(pixels))
        finite = features.pooled.isfinite().all(dim=1) & features.regions.isfinite().flatten(1).all(dim=1)
        if not bool(finite.all()):
            study = frame["study_id"].iloc[first + int((~finite).nonzero()[0])]
            raise ValueError(f"study {study}: the image encoder returned NaN or infinite features")
        yield rows, features


def _frontal_paths(frame: pd.DataFrame) -> tuple[str, ...]:
    return tuple(frontal_image(row)[1] for row in frame[["images", "views"]].to_dict("records"))


def image_features(
    model: nn.Module, frame: pd.DataFrame, cache, *, batch_size: int = 64, precision: Precision = "auto"
) -> Features:
    """Features of every study of the frame (arguments as `image_batches`)."""
    if frame.empty:
        raise ValueError("no studies to encode: the frame is empty")
    pooled, embedding = [], []
    for _, images in image_batches(model, frame, cache, batch_size=batch_size, precision=precision):
        with inference(model, "float32"):
            embedding.append(model.objective.embed_images(images).float().cpu())
        pooled.append(images.pooled.cpu())
    return Features(_frontal_paths(frame), torch.cat(pooled).numpy(), torch.cat(embedding).numpy())


def text_features(
    model: nn.Module,
    texts: Sequence[str],
    *,
    batch_size: int = 128,
    precision: Precision = "auto",
    clean: bool | None = None,
) -> EncodedTexts:
    """Tokenise and encode N texts, in their order, with the model's own tokenizer.

    `clean` first applies `clean_report`, as the released code does to reports and prompts; None does so for
    behavior="published". A text of which that leaves nothing ("Edema") is read as it is. Spans of words are then those
    of the cleaned text.
    Raises ValueError for no texts or a model without tokenizer, ReportError for a text without a word.
    """
    texts = tuple(texts)
    if not texts:
        raise ValueError("no texts to encode")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; load its checkpoint with the vocabulary it was trained with")
    if model.config.behavior == "published" if clean is None else clean:
        texts = tuple(clean_report(text) or text for text in texts)
    batch = tokenize(model.tokenizer, texts, max_tokens=model.config.max_tokens, names=[f"text {t!r}" for t in texts])
    parts, embedding = [], []
    for first in range(0, len(texts), batch_size):
        with inference(model, precision) as where:
            part = in_float32(model.encode_texts(select(batch, slice(first, first + batch_size)).to(where)))
        with inference(model, "float32"):
            embedding.append(model.objective.embed_texts(part).float().cpu())
        parts.append(part)
    return EncodedTexts(texts, batch, _concatenated(parts), torch.cat(embedding).numpy())


def select(features: T, rows: slice | Sequence[int]) -> T:
    """The chosen images or texts, in that order, repeated where a row is named twice; of a batch the tensors only."""
    return _with_tensors(features, lambda tensor: tensor[rows])


def in_float32(features: T) -> T:
    """Floating tensors as float32; masks and ids stay as they are."""
    return _with_tensors(features, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _with_tensors(item: T, change: Callable[[Tensor], Tensor]) -> T:
    values = {field.name: getattr(item, field.name) for field in fields(item)}
    return replace(item, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def _concatenated(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Concatenate along texts; shorter texts are padded with zero, False, or number -1."""
    columns = {}
    for field in fields(TextFeatures):
        rows = [row for part in parts if (tensor := getattr(part, field.name)) is not None for row in tensor]
        if rows:  # `sentence` has one vector a text and needs no padding
            padding = TextFeatures.PADDING.get(field.name, 0)
            columns[field.name] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    return TextFeatures(**columns)
