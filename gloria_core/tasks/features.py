"""Every image once, every text once: the features that all downstream tasks start from.

A frozen encoder with a centre crop gives the same feature every time, so one pass serves linear probes, zero-shot
scores, retrieval and maps. Everything runs in eval mode and without gradients; each module's own mode is restored
afterwards. Features are returned in float32 whatever precision they were computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

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

Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after every batch."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Features:
    """Frozen features of n studies, one frontal image each, in the order of the frame.

    Shape: `pooled` (n, Dg) the encoder's global feature, for probes; `embedding` (n, D) the objective's global
    embedding, not normalised, for retrieval; `regions` (n, h, w, Dr) or None. All float32 on the CPU.
    """

    study_ids: tuple[str, ...]
    pooled: np.ndarray
    embedding: np.ndarray
    regions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.study_ids)

    def images(self, rows: slice | Sequence[int]) -> ImageFeatures:
        """The chosen rows as an objective takes them. Raises ValueError if regions were not kept."""
        if self.regions is None:
            raise ValueError("features have no regions; compute them with image_features(..., regions=True)")
        return ImageFeatures(torch.from_numpy(self.pooled[rows]), torch.from_numpy(self.regions[rows]))


@dataclass(frozen=True)
class EncodedTexts:
    """N texts: as tokenised (`batch`, on the CPU), as encoded (`features`, float32), and `embedding` (N, D)."""

    texts: tuple[str, ...]
    batch: TextBatch
    features: TextFeatures
    embedding: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def frontal_image(row: Mapping[str, Any], *, or_first: bool = False) -> tuple[int, str]:
    """Number and path of a study's first frontal image; the first image where no view is recorded.

    A study that has lateral images only raises ValueError; with `or_first` its first image stands for it.
    """
    paths = str(row["images"]).split(";")
    views = str(row["views"]).split(";") if isinstance(row.get("views"), str) and row["views"] else [""] * len(paths)
    for number, (path, view) in enumerate(zip(paths, views, strict=True)):
        if view.strip().upper() != "LATERAL":
            return number, path.strip()
    if or_first:
        return 0, paths[0].strip()
    raise ValueError(f"study {row['study_id']}: no frontal image among {row['images']!r}")


@contextmanager
def inference(model: nn.Module, device: torch.device | str | None, precision: Precision) -> Iterator[torch.device]:
    """Eval mode, no gradients, autocast; gives the device and restores every module's mode.

    A `device` moves the model there and leaves it there; None keeps it where it is.
    """
    if device is not None:
        model.to(device)
    where = next(model.parameters()).device
    dtype = _DTYPES.get(choose_precision(where, precision))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(where.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            yield where
    finally:
        for module, mode in modes:
            module.training = mode


def image_batches(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    *,
    crop: int | None = None,
    or_first: bool = False,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    progress: Progress | None = None,
) -> Iterator[tuple[slice, ImageFeatures]]:
    """Encode the frontal image of each study; yields (rows of the frame, float32 features on the model's device).

    `or_first`: a study without a frontal image is seen by its first one; without it, it is an error.
    `cache[path]` is the (S, S) uint8 image; the centre `crop` pixels of it are seen (default: the model's own).
    Raises ValueError naming the study where a feature is not finite.
    """
    config = model.config
    paths = [
        frontal_image(row, or_first=or_first)[1] for row in frame[["study_id", "images", "views"]].to_dict("records")
    ]
    crop = config.crop if crop is None else crop
    for first in range(0, len(paths), batch_size):
        rows = slice(first, min(first + batch_size, len(paths)))
        stack = np.stack([center_crop(np.asarray(cache[path]), crop) for path in paths[rows]])
        # the context is entered once a batch, so that a caller who stops half-way leaves no mode or autocast behind
        with inference(model, device, precision) as where:
            pixels = to_tensor(stack, channels=config.channels, norm=config.norm).to(where)
            found = _float(model.encode_images(pixels))
        finite = torch.isfinite(found.pooled).all(dim=1) & torch.isfinite(found.regions).flatten(1).all(dim=1)
        if not bool(finite.all()):
            study = frame["study_id"].iloc[first + int((~finite).nonzero()[0])]
            raise ValueError(f"study {study}: the image encoder returned NaN or infinite features")
        yield rows, found
        if progress is not None:
            progress(rows.stop, len(paths))


def image_features(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    *,
    crop: int | None = None,
    or_first: bool = False,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    regions: bool = False,
    progress: Progress | None = None,
) -> Features:
    """Features of every study of the frame, computed once (arguments as `image_batches`).

    Regions are kept only when asked for: at 19 x 19 x 1024 they take 1.5 MB a study.
    """
    if not len(frame):
        raise ValueError("no studies to encode: the frame is empty")
    blank = blank_texts(model)
    pooled, embedding, kept = [], [], []
    settings = {"crop": crop, "or_first": or_first, "batch_size": batch_size, "device": device, "precision": precision}
    for _, found in image_batches(model, frame, cache, **settings, progress=progress):
        with inference(model, None, "float32") as where:
            embedding.append(model.objective.global_embeddings(found, blank.to(where))[0].float().cpu())
        pooled.append(found.pooled.cpu())
        if regions:
            kept.append(found.regions.cpu())
    ids = tuple(frame["study_id"].astype(str))
    stack = torch.cat(kept).numpy() if regions else None
    return Features(ids, torch.cat(pooled).numpy(), torch.cat(embedding).numpy(), stack)


def text_features(
    model: nn.Module,
    texts: Sequence[str],
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    precision: Precision = "auto",
    clean: bool | None = None,
) -> EncodedTexts:
    """Tokenise and encode N texts with the model's own tokenizer; the order is kept.

    `clean` passes them through `clean_report` first, as the released code does with reports and prompts; None does so
    for behavior="published". Spans of words are then those of the cleaned text.
    Raises ValueError for no texts or a model without tokenizer, ReportError for a text without a word.
    """
    texts = tuple(texts)
    if not texts:
        raise ValueError("no texts to encode")
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; load its checkpoint with the vocabulary it was trained with")
    if model.config.behavior == "published" if clean is None else clean:
        texts = tuple(clean_report(text) for text in texts)
    batch = tokenize(model.tokenizer, texts, max_tokens=model.config.max_tokens, names=[f"text {t!r}" for t in texts])
    parts, embedding = [], []
    for first in range(0, len(texts), batch_size):
        with inference(model, device, precision) as where:
            part = _float(model.encode_texts(_rows(batch, slice(first, first + batch_size)).to(where)))
        with inference(model, None, "float32"):
            embedding.append(model.objective.global_embeddings(blank_images(model, where), part)[1].float().cpu())
        parts.append(part)
    return EncodedTexts(texts, batch, _joined(parts), torch.cat(embedding).numpy())


def select(texts: TextFeatures, rows: slice | Sequence[int]) -> TextFeatures:
    """The chosen texts, in that order, repeated where a row is named twice."""
    rows = rows if isinstance(rows, slice) else torch.as_tensor(rows, device=texts.words.device)
    return _rows(texts, rows)


def _rows(item, rows):
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return type(item)(**{name: None if value is None else value[rows] for name, value in values.items()})


def _float(item):
    """Floating tensors to float32; masks and ids stay."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return type(item)(
        **{k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in values.items()}
    )


def _joined(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Concatenate along texts; shorter parts are padded with what padding is (zero, False, number -1)."""
    columns = {}
    for item in fields(TextFeatures):
        tensors = [getattr(part, item.name) for part in parts]
        if tensors[0] is None:
            continue
        width = max(t.shape[1] for t in tensors)
        if item.name != "sentence":
            value = TextFeatures.PADDING.get(item.name, 0)
            pads = [(0, 0) * (t.ndim - 2) + (0, width - t.shape[1]) for t in tensors]
            tensors = [nn.functional.pad(t, pad, value=value) for t, pad in zip(tensors, pads, strict=True)]
        columns[item.name] = torch.cat(tensors)
    return TextFeatures(**columns)


def blank_texts(model: nn.Module) -> TextFeatures:
    """One text of zeros: `global_embeddings` wants both sides, and here only the image side is read."""
    words, yes = torch.zeros(1, 1, model.text_encoder.dim), torch.ones(1, 1, dtype=torch.bool)
    first = torch.zeros(1, 1, dtype=torch.int64)
    return TextFeatures(
        tokens=words,
        token_mask=yes,
        token_words=first,
        token_sentences=first,
        words=words,
        word_mask=yes,
        special_mask=~yes,
        unknown_mask=~yes,
        word_sentence=first,
        sentence=words[:, 0],
        cls_attention=words[..., 0],
    )


def blank_images(model: nn.Module, device: torch.device) -> ImageFeatures:
    """One image of zeros with one region, where an objective wants both sides and only the text's is read."""
    encoder = model.image_encoder
    return ImageFeatures(
        torch.zeros(1, encoder.pooled_dim, device=device), torch.zeros(1, 1, 1, encoder.region_dim, device=device)
    )
