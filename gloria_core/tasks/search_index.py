"""A search that is kept: embeddings, ids and the fingerprint of their model in one file; and re-ranking.

Embeddings of two models have nothing to do with each other, and a search across them gives an answer all the same. So
an index knows its model by what it computes with: weights, configuration and vocabulary, not by a file name.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise
from torch import nn

from gloria_core.tasks.embedding import EncodedTexts, Features, image_batches, inference, select
from gloria_core.tasks.retrieval import Direction, text_groups
from gloria_core.tasks.search import Found, cosine, reordered, search
from gloria_core.training.precision import Precision
from gloria_core.types import ImageFeatures

FORMAT, VERSION = "gloria_core search index", 1
Kind = Literal["images", "texts"]


class SearchIndexError(ValueError):
    """An index file that cannot be used, or not with this model; the message says which and the remedy."""


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of all weights and buffers, the configuration and the vocabulary; the same on every device."""
    digest = hashlib.sha256()
    tokenizer = getattr(model, "tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if tokenizer is not None else []
    digest.update(json.dumps([model.config.to_dict(), vocabulary], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SearchIndex:
    """n embedded images or texts of one model. `texts` is "" for each image, and `paths` "" for each text without one.

    Shape: `embedding` (n, D) float32, the objective's global embedding; `ids`, `texts`, `paths` of length n.
    """

    kind: Kind
    model: str
    embedding: np.ndarray
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def nearest(self, model: nn.Module, embedding: np.ndarray, *, k: int = 5) -> pd.DataFrame:
        """The k entries of highest cosine for each of Q embeddings (Q, D) of the same model.

        Columns: query (0..Q-1), rank (from 1), id, cosine, text, path. Raises SearchIndexError for another model,
        ValueError for k outside 1..n.
        """
        self.check(model)
        found = search(cosine(np.atleast_2d(embedding), self.embedding), k=k)
        place = found.nearest.ravel()
        return pd.DataFrame(
            {
                "query": np.repeat(np.arange(len(found.nearest)), k),
                "rank": np.tile(np.arange(1, k + 1), len(found.nearest)),
                "id": [self.ids[i] for i in place],
                "cosine": found.scores.ravel(),
                "text": [self.texts[i] for i in place],
                "path": [self.paths[i] for i in place],
            }
        )

    def check(self, model: nn.Module) -> None:
        """Raises SearchIndexError unless this very model made the index."""
        asked = fingerprint(model)
        if asked != self.model:
            raise SearchIndexError(
                f"the index was made with model {self.model}, this is model {asked}: their embeddings cannot be "
                "compared. Load the checkpoint that the index was made with, or make the index again"
            )

    def save(self, path: str | Path) -> Path:
        """One safetensors file, all or nothing: written beside `path`, then renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {k: v for k, v in asdict(self).items() if k != "embedding"}
        entries = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        content = serialise(
            {"embedding": np.ascontiguousarray(self.embedding, dtype=np.float32), "entries": entries},
            metadata={"format": FORMAT, "version": str(VERSION)},
        )
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)  # mkstemp gives 0600, which other users of a shared folder cannot read
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path


def load_index(path: str | Path, model: nn.Module | None = None) -> SearchIndex:
    """The index of a file written by `save`; with `model`, only if it is the one that made it.

    Raises SearchIndexError for a missing, damaged or foreign file, or another model.
    """
    path = Path(path)
    try:
        content = parse(path.read_bytes())
        about = json.loads(content["entries"].tobytes())
        lists = {name: tuple(about[name]) for name in ("ids", "texts", "paths")}
        index = SearchIndex(about["kind"], about["model"], content["embedding"], **lists)
        lengths = {len(index.embedding), *map(len, lists.values())}
    except OSError as error:
        raise SearchIndexError(f"search index {path} cannot be opened ({error.strerror})") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SearchIndexError(f"{path} is damaged or no search index ({error}); make it again") from error
    if len(lengths) != 1:
        raise SearchIndexError(f"{path} is damaged: its columns have {sorted(lengths)} entries; make it again")
    if model is not None:
        index.check(model)
    return index


def index_images(model: nn.Module, frame: pd.DataFrame, features: Features) -> SearchIndex:
    """Index of the images of a frame, of which `features` were made by `image_features`."""
    if tuple(frame["study_id"].astype(str)) != features.study_ids:
        raise ValueError("frame and features do not hold the same studies in the same order")
    paths = tuple(frame["images"].astype(str))
    return SearchIndex("images", fingerprint(model), features.embedding, features.study_ids, ("",) * len(paths), paths)


def index_texts(model: nn.Module, ids: Sequence[str], texts: EncodedTexts) -> SearchIndex:
    """Index of texts with their ids, of which `texts` were made by `text_features`."""
    if len(ids) != len(texts):
        raise ValueError(f"{len(ids)} ids for {len(texts)} texts")
    return SearchIndex(
        "texts", fingerprint(model), texts.embedding, tuple(map(str, ids)), texts.texts, ("",) * len(ids)
    )


def rerank(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: EncodedTexts,
    found: Found,
    queries: np.ndarray,
    *,
    direction: Direction = "image_to_text",
    or_first: bool = False,
    batch_size: int = 64,
    precision: Precision = "auto",
) -> Found:
    """`found` and `queries` of `find_partners`, the nearest in the order of the objective's own similarity.

    Global cosine is one product of matrices and searches everything; the objective's similarity (with its local
    part, where it has one) is dear and orders only the shortlist. What the shortlist missed keeps its rank behind it.
    `or_first`: see `image_batches`.
    """
    k = found.nearest.shape[1]
    asked = np.repeat(queries, k)
    image, text = (asked, found.nearest.ravel()) if direction == "image_to_text" else (found.nearest.ravel(), asked)
    pairs, settings = np.stack([image, text], axis=1), {"batch_size": batch_size, "precision": precision}
    fine = pair_similarities(model, frame, cache, texts, pairs, or_first=or_first, **settings)
    group = text_groups(texts.texts)
    return reordered(found, fine.reshape(-1, k), group[found.nearest] == group[queries][:, None])


def pair_similarities(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: EncodedTexts,
    pairs: np.ndarray,
    *,
    or_first: bool = False,
    batch_size: int = 64,
    precision: Precision = "auto",
) -> np.ndarray:
    """(P,) objective's similarity of single pairs (row of the frame, row of the texts); images are encoded once."""
    out = np.empty(len(pairs), dtype=np.float32)
    order = np.argsort(pairs[:, 0], kind="stable")
    images_used, first = np.unique(pairs[order, 0], return_index=True)
    groups = np.split(order, first[1:])
    used, settings = frame.iloc[images_used], {"or_first": or_first, "batch_size": batch_size, "precision": precision}
    for rows, images in image_batches(model, used, cache, **settings):
        with inference(model, None, "float32") as where:
            for place in range(rows.start, rows.stop):
                one = _row(images, place - rows.start)
                for mine in np.split(groups[place], range(64, len(groups[place]), 64)):
                    asked = select(texts.features, pairs[mine, 1].tolist()).to(where)
                    out[mine] = model.objective.similarity(one, asked)[0].float().cpu().numpy()
    return out


def _row(images: ImageFeatures, row: int) -> ImageFeatures:
    here = slice(row, row + 1)
    extra = None if images.cls_attention is None else images.cls_attention[here]
    return ImageFeatures(images.pooled[here], images.regions[here], extra)
