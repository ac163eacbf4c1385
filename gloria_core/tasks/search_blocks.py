"""Scores of many queries with many candidates, a block at a time, and the pairs of them that belong together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

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
