"""Retrieval: which report belongs to this image, which image to this report, which image looks like this one.

Two questions, two numbers. Of pairs: is the image's own report among the first K (Recall@K, median and mean rank;
CXR-CLIP, You et al. 2023, table 3, and the `retrieval_image_text` of its released evaluator)? Of classes: how many of
the first K share the query's finding (Precision@K; ConVIRT, Zhang et al. 2020, section 4.3, on 8 x 200 studies; GLoRIA,
Huang et al. 2021, section 4.3, on 5 x 200 with K = 5, 10, 100)? Chance stands beside every number: it depends on K, on
the number of candidates and on how many of them are right.

**Duplicate texts.** "No acute process." is the report of many studies. Texts are compared after `normalised`:

- `merged`: each distinct text is one candidate, embedded once (CXR-CLIP), and as a query is asked once.
- `right`: all studies are candidates, and every one with the query's text is right. Easier: frequent texts abound.
- `wrong`: only the study itself is right, and its copies are mistakes. What careless code does; no model can reach 1.

Ties are resolved by their mean over all orders (see `search`). Intervals draw patients (of the queries) with
replacement and keep the candidates: they say what other queries to the same archive would give.

Scores of many queries with many candidates, a block at a time, and the pairs of them that belong together.

Exact search in blocks: the nearest candidates of every query, and the rank of the right ones, in one pass.

100,000 queries against 100,000 candidates would be a matrix of 40 GB. Here only a block of it exists at a time, and
what of it is kept is the best `k` of each query and three counts. Nothing is approximated.

**Ties.** Scores that differ by no more than `TIE` (relative for scores above 1) count as equal: a matrix product does
not round all its cells alike. Equal scores have no order, so a rank is a range, and what is reported is the mean over
all orders of the tied: constant embeddings give exactly the level of chance.

A search that is kept: embeddings, ids and the fingerprint of their model in one file; and re-ranking.

Embeddings of two models have nothing to do with each other, and a search across them gives an answer all the same. So
an index knows its model by what it computes with: weights, configuration and vocabulary, not by a file name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, Self, get_args

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise
from torch import Tensor, nn

from gloria_core.data.reports import ReportError
from gloria_core.tasks.features import EncodedTexts, Features, image_batches, inference, select
from gloria_core.tasks.metrics import interval, resamples
from gloria_core.training.precision import Precision
from gloria_core.types import ImageFeatures

_PAIRS = 1 << 20  # matching pairs listed at a time


class Scores(Protocol):
    """Similarity of every query (Q) with every candidate (C), made block by block."""

    shape: tuple[int, int]

    def block(self, rows: slice, columns: slice) -> Tensor:
        """(q, c) float32."""

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(P,) scores of single pairs."""

    def take(self, rows: Sequence[int], columns: Sequence[int]) -> Self:
        """The scores of some queries with some candidates."""

    def turned(self) -> Self:
        """Candidates ask, queries answer."""


@dataclass(frozen=True)
class Cosine:
    """Cosines of Q and C vectors of width D; made by `cosine`, which normalises them."""

    queries: Tensor
    candidates: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.queries), len(self.candidates)

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.queries[rows] @ self.candidates[columns].T

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        step = max(1, (1 << 22) // self.queries.shape[1])
        parts = [
            (self.queries[rows[i : i + step]] * self.candidates[columns[i : i + step]]).sum(1)
            for i in range(0, len(rows), step)
        ]
        return torch.cat(parts) if parts else self.queries.new_zeros(0)

    def take(self, rows: Sequence[int], columns: Sequence[int]) -> Cosine:
        return Cosine(self.queries[_index(rows, self.queries)], self.candidates[_index(columns, self.candidates)])

    def turned(self) -> Cosine:
        return Cosine(self.candidates, self.queries)


@dataclass(frozen=True)
class Matrix:
    """Scores that were computed whole, for sets where they fit in memory; made by `matrix`."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.values.shape)

    def block(self, rows: slice, columns: slice) -> Tensor:
        return self.values[rows, columns].clone()

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.values[rows, columns]

    def take(self, rows: Sequence[int], columns: Sequence[int]) -> Matrix:
        return Matrix(self.values[_index(rows, self.values)][:, _index(columns, self.values)])

    def turned(self) -> Matrix:
        return Matrix(self.values.T)


def cosine(queries: np.ndarray, candidates: np.ndarray, *, device: torch.device | str = "cpu") -> Cosine:
    """Cosine scores of embeddings (Q, D) and (C, D), in float32. A vector of zeros has cosine 0 with everything.

    Raises ValueError for other shapes, no rows, or the first row that is not finite.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"embeddings must be (Q, D) and (C, D), got {queries.shape} and {candidates.shape}")
    if not len(queries) or not len(candidates):
        raise ValueError(f"nothing to search: {len(queries)} queries and {len(candidates)} candidates")
    tensors = []
    for name, values in (("query", queries), ("candidate", candidates)):
        _refuse_nonfinite(values, name)
        vectors = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device)
        tensors.append(torch.nn.functional.normalize(vectors, dim=1))
    return Cosine(*tensors)


def matrix(values: np.ndarray) -> Matrix:
    """Given scores (Q, C). Raises ValueError for another shape, no cells, or the first row that is not finite."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"scores must be (Q, C) with at least one cell, got {values.shape}")
    _refuse_nonfinite(values, "query")
    return Matrix(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)))


class Matches:
    """Pairs of equal numbers, listed query by query without ever comparing all with all."""

    def __init__(self, queries: np.ndarray | None, candidates: np.ndarray | None, shape: tuple[int, int]) -> None:
        self.given = queries is not None
        if self.given != (candidates is not None):
            raise ValueError("numbers of queries and of candidates belong together; give both or none")
        if not self.given:
            self.counts = np.zeros(shape[0], dtype=np.int64)
            return
        if (len(queries), len(candidates)) != shape:
            raise ValueError(
                f"{len(queries)} and {len(candidates)} numbers for {shape[0]} queries, {shape[1]} candidates"
            )
        candidates = np.asarray(candidates)
        self.order = np.argsort(candidates, kind="stable")
        self.first = np.searchsorted(candidates, queries, side="left", sorter=self.order)
        self.counts = np.searchsorted(candidates, queries, side="right", sorter=self.order) - self.first

    def pairs(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Query (counted from the block's first) and candidate of every match of these rows."""
        if not self.given:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        counts = self.counts[rows]
        start = np.cumsum(counts) - counts
        place = np.arange(counts.sum()) - np.repeat(start - self.first[rows], counts)
        return np.repeat(np.arange(len(counts)), counts), self.order[place]


def row_blocks(pairs: np.ndarray, most: int) -> Iterator[slice]:
    """Consecutive queries, at most `most` and, where one query alone does not have more, `_PAIRS` listed pairs."""
    first, total = 0, np.concatenate([[0], np.cumsum(pairs)])
    while first < len(pairs):
        fitting = int(np.searchsorted(total, total[first] + _PAIRS, side="right")) - 1
        last = min(max(first + 1, fitting), first + most, len(pairs))
        yield slice(first, last)
        first = last


def blocks(scores: Scores, rows: slice, own: Matches, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of these queries, barred candidates at minus infinity."""
    query, candidate = own.pairs(rows)
    for first in range(0, scores.shape[1], width):
        columns = slice(first, min(first + width, scores.shape[1]))
        block = scores.block(rows, columns)
        here = (candidate >= columns.start) & (candidate < columns.stop)
        if here.any():
            block[query[here], candidate[here] - first] = -torch.inf
        yield columns, block


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(rows, dtype=np.int64), device=like.device)


def _refuse_nonfinite(values: np.ndarray, name: str) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(f"{name} {int(bad.argmax())} has values that are NaN or infinite")


TIE = 1e-6
BLOCK = (1024, 8192)
"""Queries and candidates of one block: 32 MB of float32."""


@dataclass(frozen=True)
class Found:
    """What a search found, for Q queries.

    Shape: `nearest`, `scores` (Q, k) candidates in falling order and their scores; then (Q,) int64 counts:
    `better` wrong candidates above the best right one, `tied` wrong ones level with it, `level` right ones level with
    it (itself included), `right` right candidates, `allowed` candidates that could be found.
    """

    nearest: np.ndarray
    scores: np.ndarray
    better: np.ndarray
    tied: np.ndarray
    level: np.ndarray
    right: np.ndarray
    allowed: np.ndarray

    @property
    def rank(self) -> np.ndarray:
        """(Q,) rank of the first right candidate, from 1; the mean over all orders of the tied."""
        return self.better + 1 + self.tied / (self.level + 1)

    def recall(self, k: int) -> np.ndarray:
        """(Q,) 1 where a right candidate is among the first k, 0 where not, its probability where ties decide."""
        return 1.0 - none_of(self.level, self.tied + self.level, np.clip(k - self.better, 0, None))

    def chance_recall(self, k: int) -> np.ndarray:
        """(Q,) recall under a random order of the allowed candidates."""
        return 1.0 - none_of(self.right, self.allowed, np.full(len(self.right), k))

    @property
    def chance_rank(self) -> np.ndarray:
        """(Q,) expected rank of the first right candidate under a random order."""
        return (self.allowed + 1) / (self.right + 1)


def none_of(marked: np.ndarray, total: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Probability that `drawn` of `total` items, without replacement, hold none of the `marked` (hypergeometric)."""
    result = np.ones(len(total))
    for i in range(int(drawn.max(initial=0))):
        active = i < np.minimum(drawn, total)
        left = np.maximum(total - i, 1)
        result *= np.where(active, np.clip(total - marked - i, 0, None) / left, 1.0)
    return result


def search(
    scores: Scores,
    *,
    k: int = 10,
    query_group: np.ndarray | None = None,
    candidate_group: np.ndarray | None = None,
    query_own: np.ndarray | None = None,
    candidate_own: np.ndarray | None = None,
    block: tuple[int, int] = BLOCK,
) -> Found:
    """The k nearest candidates of every query, and where the right ones stand.

    A candidate is right where its group (a number) is that of the query; without groups, all counts but `allowed`
    are zero. A candidate whose `own` number is that of the query cannot be found (the query itself, or its patient).
    Memory: the embeddings, one block, and O(Q k).

    Raises ValueError for k outside 1..allowed, blocks below 1, groups of another length, or a query (named) that
    has no right candidate.
    """
    shape = scores.shape
    if min(block) < 1:
        raise ValueError(f"block is {block}; both sides must be at least 1")
    right, own = Matches(query_group, candidate_group, shape), Matches(query_own, candidate_own, shape)
    allowed = shape[1] - own.counts
    if not 1 <= k <= allowed.min():
        raise ValueError(f"k is {k}; it must be 1 to {allowed.min()}, the candidates that the poorest query has")
    parts = [
        _search_rows(scores, rows, k, right, own, block[1]) for rows in row_blocks(right.counts + own.counts, block[0])
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Found(*columns, allowed=allowed)


def labels_at(
    scores: Scores,
    labels: np.ndarray,
    ks: Sequence[int],
    *,
    query_own: np.ndarray | None = None,
    candidate_own: np.ndarray | None = None,
    block: tuple[int, int] = BLOCK,
) -> np.ndarray:
    """(len(ks), Q, K): the share of each query's first k candidates that has each label; `labels` is (C, K) of 0 and 1.

    Where candidates tie at place k, the mean over their orders. Two passes: one for the k-th scores, one to count.
    Raises ValueError as `search`, and for labels of another length.
    """
    if labels.shape[0] != scores.shape[1]:
        raise ValueError(f"{labels.shape[0]} rows of labels for {scores.shape[1]} candidates")
    own = Matches(query_own, candidate_own, scores.shape)
    found = search(scores, k=max(ks), query_own=query_own, candidate_own=candidate_own, block=block)
    shares = np.empty((len(ks), scores.shape[0], labels.shape[1]))
    weights = torch.tensor(np.column_stack([labels, np.ones(len(labels))]), dtype=torch.float32)
    for rows in row_blocks(own.counts, block[0]):
        limits = torch.from_numpy(found.scores[rows][:, [k - 1 for k in ks]])
        above, level = _counts_at(scores, rows, limits, weights, own, block[1])
        for i, k in enumerate(ks):
            open_places = (k - above[i, :, -1:]) / level[i, :, -1:].clip(1)
            shares[i, rows] = ((above[i] + open_places * level[i]) / k)[:, :-1]
    return shares


def _search_rows(scores: Scores, rows: slice, k: int, right: Matches, own: Matches, width: int) -> tuple:
    count = rows.stop - rows.start
    best, level, n_right = _best_right(scores, rows, right, own)
    low, high = best - _margin(best), best + _margin(best)
    better, reached = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    values, places = None, None
    for columns, block in blocks(scores, rows, own, width):
        if right.given:
            better += (block > high[:, None].to(block.device)).sum(1).cpu()
            reached += (block >= low[:, None].to(block.device)).sum(1).cpu()
        top, place = block.topk(min(k, block.shape[1]), dim=1)
        top, place = top.cpu(), place.cpu() + columns.start
        if values is not None:
            top, place = torch.cat([values, top], 1), torch.cat([places, place], 1)
        values, chosen = top.topk(min(k, top.shape[1]), dim=1)
        places = place.gather(1, chosen)
    # among equal scores the earlier candidate comes first, so that a figure is the same on every machine
    order = np.lexsort((places.numpy(), -values.numpy()), axis=1)
    nearest, top = (np.take_along_axis(part.numpy(), order, 1) for part in (places, values))
    tied = (reached - better - level).clamp_min(0) if right.given else better
    return nearest, top, better.numpy(), tied.numpy(), level.numpy(), n_right.numpy()


def _best_right(scores: Scores, rows: slice, right: Matches, own: Matches) -> tuple[Tensor, Tensor, Tensor]:
    """Score of the best right candidate of each query, how many right ones are level with it, how many there are."""
    count = rows.stop - rows.start
    if not right.given:
        return torch.zeros(count), *(torch.zeros(count, dtype=torch.int64) for _ in range(2))
    query, candidate = right.pairs(rows)
    if own.given:
        barred = np.stack(own.pairs(rows), axis=1)
        width = scores.shape[1]
        keep = ~np.isin(query * width + candidate, barred[:, 0] * width + barred[:, 1])
        query, candidate = query[keep], candidate[keep]
    n_right = torch.from_numpy(np.bincount(query, minlength=count))
    if (n_right == 0).any():
        raise ValueError(f"query {rows.start + int((n_right == 0).nonzero()[0])} has no right candidate to find")
    query = torch.from_numpy(query)
    values = scores.pairs(query + rows.start, torch.from_numpy(candidate)).cpu()
    best = torch.full((count,), -torch.inf).scatter_reduce(0, query, values, "amax")
    near = values >= (best - _margin(best))[query]
    return best, torch.zeros(count, dtype=torch.int64).scatter_add(0, query, near.long()), n_right


def _counts_at(
    scores: Scores, rows: slice, limits: Tensor, weights: Tensor, own: Matches, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """(len(ks), q, K + 1) sums of `weights` over candidates above, and level with, each limit (q, len(ks))."""
    above = np.zeros((limits.shape[1], limits.shape[0], weights.shape[1]))
    level = np.zeros_like(above)
    for columns, block in blocks(scores, rows, own, width):
        part = weights[columns].to(block.device)
        for i, limit in enumerate(limits.T.to(block.device)):
            over = block > (limit + _margin(limit))[:, None]
            near = (block >= (limit - _margin(limit))[:, None]) & ~over
            above[i] += (over.float() @ part).cpu().numpy()
            level[i] += (near.float() @ part).cpu().numpy()
    return above, level


def reordered(found: Found, fine: np.ndarray, right: np.ndarray) -> Found:
    """`found` with its k nearest put into the order of finer scores; what lies behind them stays where it is.

    Shape: `fine` and `right` (Q, k), the finer score of every nearest candidate and whether it is right.
    """
    k = found.nearest.shape[1]
    order = np.argsort(-fine, axis=1, kind="stable")
    inside = right.any(axis=1)
    best = np.where(right, fine, -np.inf).max(axis=1, initial=-np.inf)
    margin = TIE * np.maximum(1.0, np.abs(np.where(inside, best, 0.0)))
    over, near = fine > (best + margin)[:, None], np.abs(fine - best[:, None]) <= margin[:, None]
    # a right candidate that the first search left outside stands behind all k, whatever tied with it
    outside = np.maximum(found.better, k)
    return replace(
        found,
        nearest=np.take_along_axis(found.nearest, order, 1),
        scores=np.take_along_axis(fine, order, 1),
        better=np.where(inside, (over & ~right).sum(1), outside),
        tied=np.where(inside, (near & ~right).sum(1), found.better + found.tied - outside),
        level=np.where(inside, (near & right).sum(1), found.level),
    )


def _margin(values: Tensor) -> Tensor:
    return TIE * values.abs().clamp_min(1.0)


Direction = Literal["image_to_text", "text_to_image"]
Duplicates = Literal["merged", "right", "wrong"]
COLUMNS = ("target", "metric", "value", "ci_low", "ci_high", "n", "chance")

_WORDS = re.compile(r"\w+")


def report_texts(frame: pd.DataFrame, section: str = "impression") -> list[str]:
    """The text of every study, as pretraining reads it: "impression", "findings", or "both", joined by a blank line.

    Raises ReportError naming the studies without text, ValueError for another section.
    """
    columns = {"impression": ["impression"], "findings": ["findings"], "both": ["findings", "impression"]}
    if section not in columns:
        raise ValueError(f"section is {section!r}; it must be one of {', '.join(columns)}")
    rows = zip(*(frame[column].fillna("").astype(str) for column in columns[section]), strict=True)
    texts = ["\n\n".join(part for part in row if part.strip()) for row in rows]
    empty = [study for study, text in zip(frame["study_id"].astype(str), texts, strict=True) if not text.strip()]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ReportError(f"{len(empty)} studies have no {section} to retrieve (study_id {listed}); leave them out")
    return texts


def normalised(text: str) -> str:
    """What makes two reports the same: their words in order, in small letters, without punctuation and blanks."""
    return " ".join(_WORDS.findall(text.lower()))


def text_groups(texts: Sequence[str]) -> np.ndarray:
    """(n,) number of each distinct normalised text, counted from 0 in order of first use."""
    return pd.factorize(np.array([normalised(text) for text in texts], dtype=object))[0]


def pairing(
    texts: Sequence[str], direction: Direction, duplicates: Duplicates = "merged"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the studies that ask, rows of those that answer, and the (n,) group in which two rows are right."""
    if direction not in get_args(Direction) or duplicates not in get_args(Duplicates):
        raise ValueError(
            f"direction must be one of {', '.join(get_args(Direction))} and duplicates one of "
            f"{', '.join(get_args(Duplicates))}; got {direction!r} and {duplicates!r}"
        )
    everyone, groups = np.arange(len(texts)), text_groups(texts)
    distinct = np.unique(groups, return_index=True)[1] if duplicates == "merged" else everyone
    queries, candidates = (everyone, distinct) if direction == "image_to_text" else (distinct, everyone)
    return queries, candidates, everyone if duplicates == "wrong" else groups


def find_partners(
    scores: Scores,
    texts: Sequence[str],
    *,
    direction: Direction = "image_to_text",
    duplicates: Duplicates = "merged",
    k: int = 10,
    block: tuple[int, int] = BLOCK,
) -> tuple[Found, np.ndarray]:
    """Search among n studies with one image and one text each; `scores` are images (rows) by texts (columns).

    Returns what was found, with `nearest` counted in rows of the studies, and the (Q,) rows that asked.
    Raises ValueError where scores and texts differ in number, or k is larger than the number of candidates.
    """
    if scores.shape != (len(texts), len(texts)):
        raise ValueError(f"scores {scores.shape} and {len(texts)} texts; one image and one text a study are expected")
    queries, candidates, group = pairing(texts, direction, duplicates)
    asked = (scores if direction == "image_to_text" else scores.turned()).take(queries, candidates)
    found = search(asked, k=k, query_group=group[queries], candidate_group=group[candidates], block=block)
    return Found(candidates[found.nearest], *(getattr(found, name) for name in _FIELDS)), queries


_FIELDS = ("scores", "better", "tied", "level", "right", "allowed")


def recall_rows(
    found: Found,
    *,
    target: str,
    ks: Sequence[int] = (1, 5, 10),
    patients: Sequence[object] | None = None,
    suffix: str = "",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Recall@K, median rank and mean rank over the queries, with intervals and chance. Columns: `COLUMNS`.

    `patients`: (Q,) of the queries; whole patients are drawn. `suffix` is put behind the names of the metrics.
    The chance of the median rank is the median of the queries' expected ranks under a random order.
    A K beyond the number of candidates is left out: everything would be found.
    """
    values = {f"recall_at_{k}": (found.recall(k), found.chance_recall(k), _mean) for k in ks if k < found.allowed.min()}
    values["median_rank"] = (found.rank, found.chance_rank, _median)
    values["mean_rank"] = (found.rank, found.chance_rank, _mean)
    blocks = list(resamples(len(found.rank), groups=patients, n_bootstrap=n_bootstrap, seed=seed))
    one, rows = np.ones((1, len(found.rank))), []
    for name, (value, chance, reduce) in values.items():
        drawn = np.concatenate([reduce(value, weights) for weights in blocks]) if blocks else np.array([])
        point, level = float(reduce(value, one)[0]), float(reduce(chance, one)[0])
        rows.append((target, name + suffix, point, *interval(drawn), len(value), level))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def precision_rows(
    scores: Scores,
    query_targets: pd.DataFrame,
    candidate_targets: pd.DataFrame,
    *,
    ks: Sequence[int] = (5, 10, 100),
    own: tuple[Sequence[object], Sequence[object]] | None = None,
    patients: Sequence[object] | None = None,
    suffix: str = "",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Precision@K by class: of the first K candidates of a query that has the class, the share that has it, too.

    Targets: (Q, K) and (C, K), 1 present; anything else is not. Where each study has exactly one class (5 x 200) this
    is the papers' number; where studies have several, a query counts once for each. `macro` is the mean over classes.
    `own`: names of queries and candidates; a candidate with the query's name cannot be found (its patient, for images
    that look for images; the papers' text candidates include the query's own report).
    Chance is the share of candidates with the class. A class without a query is NaN. A K beyond the number of
    candidates is left out; ValueError where that leaves none.
    """
    labels = list(query_targets.columns)
    if list(candidate_targets.columns) != labels:
        raise ValueError("queries and candidates must have the same classes in the same order")
    has, of = (frame.to_numpy() == 1 for frame in (query_targets, candidate_targets))
    names = {}
    if own is not None:
        codes = pd.factorize(np.concatenate([np.asarray(part, dtype=str) for part in own]))[0]
        names = {"query_own": codes[: len(has)], "candidate_own": codes[len(has) :]}
    chance, allowed = _class_chance(of, names, len(has))
    ks = [k for k in ks if k < allowed.min()]
    if not ks:
        raise ValueError(f"every K is beyond the {allowed.min()} candidates of the poorest query")
    shares = labels_at(scores, of.astype(np.float32), ks, **names)
    blocks = list(resamples(len(has), groups=patients, n_bootstrap=n_bootstrap, seed=seed))
    rows = []
    for k, share in zip(ks, shares, strict=True):
        columns = [_class_mean(share, has, weights) for weights in [np.ones((1, len(has))), *blocks]]
        point, drawn = columns[0][0], np.concatenate(columns[1:] or [np.empty((0, len(labels)))])
        level = _class_mean(chance, has, np.ones((1, len(has))))[0]
        for c, label in enumerate(labels):
            rows.append((label, k, point[c], *interval(drawn[:, c]), int(has[:, c].sum()), level[c]))
        known = np.isfinite(point)
        macro = drawn[:, known].mean(axis=1) if known.any() else np.array([])
        value, by_chance = (float(part[known].mean()) if known.any() else float("nan") for part in (point, level))
        rows.append(("macro", k, value, *interval(macro), int(has.any(axis=1).sum()), by_chance))
    found = pd.DataFrame(rows, columns=["target", "k", *COLUMNS[2:]])
    return found.assign(metric=[f"precision_at_{k}{suffix}" for k in found["k"]])[list(COLUMNS)]


def chance_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """The chance levels as rows of their own, `<metric>_chance`, for a run record that has no column for them."""
    return rows.assign(metric=rows["metric"] + "_chance", value=rows["chance"], ci_low=np.nan, ci_high=np.nan)


Reduce = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return weights @ values / weights.sum(axis=1)


def _median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Median of each resample; between two middle values, their mean."""
    order = np.argsort(values, kind="stable")
    total, ordered = weights[:, order].cumsum(axis=1), values[order]
    half = total[:, -1:] / 2
    low = ordered[(total < half).sum(axis=1)]
    return (low + ordered[(total <= half).sum(axis=1)]) / 2


def _class_mean(share: np.ndarray, has: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(b, K) mean of (Q, K) shares over the queries that have the class; NaN where a resample has none."""
    total = weights @ has
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, weights @ np.where(has, share, 0.0) / total, np.nan)


def _class_chance(of: np.ndarray, names: dict[str, np.ndarray], queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(Q, K) share of the candidates of each query that have each class, and (Q,) how many candidates it has."""
    if not names:
        return np.tile(of.mean(axis=0), (queries, 1)), np.full(queries, len(of))
    count = int(max(part.max() for part in names.values())) + 1
    size = np.bincount(names["candidate_own"], minlength=count)
    barred = np.stack([np.bincount(names["candidate_own"], weights=column, minlength=count) for column in of.T], axis=1)
    allowed = len(of) - size[names["query_own"]]
    return (of.sum(axis=0) - barred[names["query_own"]]) / np.maximum(allowed, 1)[:, None], allowed


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
