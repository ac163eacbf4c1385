"""Exact search in blocks: the nearest candidates of every query, and the rank of the right ones, in one pass.

100,000 queries against 100,000 candidates would be a matrix of 40 GB. Here only a block of it exists at a time, and
what of it is kept is the best `k` of each query and three counts. Nothing is approximated.

**Ties.** Scores that differ by no more than `TIE` (relative for scores above 1) count as equal: a matrix product does
not round all its cells alike. Equal scores have no order, so a rank is a range, and what is reported is the mean over
all orders of the tied: constant embeddings give exactly the level of chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gloria_core.tasks.search_blocks import Matches, Scores, blocks, cosine, matrix, row_blocks

__all__ = ["BLOCK", "TIE", "Found", "cosine", "labels_at", "matrix", "none_of", "reordered", "search"]

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
