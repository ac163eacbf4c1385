"""Retrieval between images and reports: exact search, its metrics, and an index file.

- Recall@K, median and mean rank: is the query's own partner among the first K candidates (CXR-CLIP, You et al. 2023,
  table 3 and the `retrieval_image_text` of its released evaluator)?
- Precision@K: the share of the first K candidates with the query's finding (ConVIRT, Zhang et al. 2020, section 4.3, on
  8 x 200 studies; GLoRIA, Huang et al. 2021, section 4.3, on 5 x 200 with K = 5, 10, 100).

Both depend on K, on the number of candidates and on how many of them are relevant, so every row has the value of a
random order beside it (`chance`). Intervals resample the patients of the queries; the candidates stay the same.

**Ties.** Scores that differ by at most `TIE` (relative for scores above 1) count as equal, because a matrix product
does not round all its cells alike. All metrics are means over the orders of tied candidates: constant embeddings give
exactly the value of a random order.

**Identical reports.** Many studies share a text ("No acute process."). Texts are compared by `text_groups`:

- `merged`: each distinct text is one candidate and one query (CXR-CLIP).
- `right`: all studies are candidates, and all with the query's text are relevant. Easier: frequent texts are many.
- `wrong`: only the study itself is relevant, and its copies are mistakes. No model can reach 1.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveInt, SkipValidation, validate_call
from safetensors import SafetensorError
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise
from torch import Tensor, nn

from gloria_core.data.files import atomic_write, content_hash
from gloria_core.tasks.features import EncodedTexts, image_batches, inference, select
from gloria_core.tasks.metrics import Statistic, bootstrap_rows, ratio_of_sums

TIE = 1e-6
BATCH = 256  # queries that are scored at a time: with 100,000 candidates 100 MB of float32

Direction = Literal["image_to_text", "text_to_image"]
Duplicates = Literal["merged", "right", "wrong"]
COLUMNS = ["target", "metric", "value", "ci_low", "ci_high", "n", "patients", "chance", "note"]


@dataclass(frozen=True)
class Scores:
    """Similarities of Q queries with C candidates: dot products of vectors (Q, D) and (C, D), made by `cosine`."""

    queries: Tensor
    candidates: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.queries), len(self.candidates)

    @property
    def T(self) -> "Scores":  # noqa: N802
        """The candidates as queries, and the queries as candidates."""
        return Scores(self.candidates, self.queries)

    def batches(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, (b, C) scores) of `size` queries at a time."""
        for first in range(0, len(self.queries), size):
            rows = slice(first, min(first + size, len(self.queries)))
            yield rows, self.queries[rows] @ self.candidates.T


def cosine(queries: np.ndarray, candidates: np.ndarray) -> Scores:
    """Cosine of embeddings (Q, D) and (C, D), in float32. A vector of zeros has cosine 0 with everything.

    Raises ValueError for other shapes, no rows, or the first row that is not finite.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"embeddings must be (Q, D) and (C, D), got {queries.shape} and {candidates.shape}")
    if not len(queries) or not len(candidates):
        raise ValueError(f"nothing to search: {len(queries)} queries and {len(candidates)} candidates")
    vectors = []
    for name, values in (("query", queries), ("candidate", candidates)):
        finite = np.isfinite(values).all(axis=1)
        if not finite.all():
            raise ValueError(f"{name} {int(finite.argmin())} has values that are NaN or infinite")
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        vectors.append(nn.functional.normalize(tensor, dim=1))
    return Scores(*vectors)


@dataclass(frozen=True)
class Ranking:
    """Where the relevant candidates of Q queries stand.

    Shape: `nearest`, `scores` (Q, k) candidates in falling order and their scores; `queries` (Q,) numbers of the
    queries; then counts (Q,): `above` irrelevant candidates above the best relevant one, `tied_irrelevant` and
    `tied_relevant` candidates with its score (itself included), and all `relevant` ones. `candidates`: their number.
    """

    nearest: np.ndarray
    scores: np.ndarray
    above: np.ndarray
    tied_irrelevant: np.ndarray
    tied_relevant: np.ndarray
    relevant: np.ndarray
    queries: np.ndarray
    candidates: int

    @property
    def rank(self) -> np.ndarray:
        """(Q,) rank of the first relevant candidate, from 1."""
        return self.above + 1 + self.tied_irrelevant / (self.tied_relevant + 1)

    def recall(self, k: int) -> np.ndarray:
        """(Q,) 1 where a relevant candidate is among the first k, 0 where not, its probability where ties decide."""
        tied = self.tied_irrelevant + self.tied_relevant
        return 1.0 - probability_of_none(self.tied_relevant, tied, np.clip(k - self.above, 0, None))

    def chance_recall(self, k: int) -> np.ndarray:
        """(Q,) recall in a random order of the candidates."""
        total, drawn = (np.full(len(self.relevant), number) for number in (self.candidates, k))
        return 1.0 - probability_of_none(self.relevant, total, drawn)

    @property
    def chance_rank(self) -> np.ndarray:
        """(Q,) expected rank of the first relevant candidate in a random order."""
        return (self.candidates + 1) / (self.relevant + 1)


def probability_of_none(marked: np.ndarray, total: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Probability that `drawn` of `total` items, without replacement, contain none of the `marked` (hypergeometric).

    All arguments and the result have shape (Q,). `scipy.stats.hypergeom.pmf` gives the same, 100 times slower.
    """
    result = np.ones(len(total))
    for i in range(int(drawn.max(initial=0))):
        left = np.clip(total - marked - i, 0, None) / np.maximum(total - i, 1)
        result *= np.where(i < np.minimum(drawn, total), left, 1.0)
    return result


def label_shares(
    scores: Scores, labels: np.ndarray, ks: Sequence[int], *, patients: Sequence[object] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each query's first k candidates that has each label, and that of all its candidates.

    Shape: labels (C, K) of 0 and 1 -> (Q, K, len(ks)) and (Q, K)
    `patients`: of queries that are the candidates, too; images of the query's own patient are no candidates.
    Raises ValueError for a k beyond the number of candidates of a query.
    """
    numbers = None if patients is None else torch.from_numpy(pd.factorize(np.asarray(patients))[0])
    weights = torch.tensor(np.column_stack([labels, np.ones(len(labels))]), dtype=torch.float32)
    shares, overall = [], []
    for rows, block in scores.batches(BATCH):
        if numbers is not None:
            block[numbers[rows, None] == numbers] = -torch.inf
        first, of_k = block.topk(max(ks), dim=1).values, []
        if first.isneginf().any():
            raise ValueError(f"k is {max(ks)}: a query has fewer candidates of other patients")
        for k in ks:
            above, tied = ((part.float() @ weights).double() for part in _above_and_tied(block, first[:, [k - 1]]))
            of_k.append(((above + (k - above[:, -1:]) / tied[:, -1:] * tied) / k)[:, :-1])
        shares.append(torch.stack(of_k, dim=2))
        total = ((~block.isneginf()).float() @ weights).double()
        overall.append((total / total[:, -1:])[:, :-1])
    return torch.cat(shares).numpy(), torch.cat(overall).numpy()


def _above_and_tied(block: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """(b, C) bool each: scores above the limit (b, 1), and equal to it."""
    margin = TIE * limit.abs().clamp_min(1.0)
    above = block > limit + margin
    return above, (block >= limit - margin) & ~above


def _first(block: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates (b, k) of the highest scores, and the scores; of equal ones the earlier candidate comes first."""
    values, places = (part.numpy() for part in block.topk(k, dim=1))
    order = np.lexsort((places, -values), axis=1)
    return np.take_along_axis(places, order, axis=1), np.take_along_axis(values, order, axis=1)


def report_texts(frame: pd.DataFrame, section: Literal["impression", "findings", "both"] = "impression") -> pd.Series:
    """The text of every study that has one, with the frame's index, as pretraining reads it.

    "both" are joined by a blank line, or whichever of them has text.
    """
    columns = ["findings", "impression"] if section == "both" else [section]
    rows = frame[columns].fillna("").astype(str).to_numpy()
    texts = pd.Series(["\n\n".join(text for text in row if text.strip()) for row in rows], frame.index, dtype=object)
    return texts[texts != ""]


def text_groups(texts: Sequence[str]) -> np.ndarray:
    """(n,) number of each distinct text, from 0 in order of first use; case, punctuation and blanks do not count."""
    words = [" ".join(re.findall(r"\w+", text.lower())) for text in texts]
    return pd.factorize(np.array(words, dtype=object))[0]


@validate_call(config={"arbitrary_types_allowed": True})
def rank_partners(
    scores: SkipValidation[Scores],
    texts: SkipValidation[Sequence[str]],
    *,
    direction: Direction = "image_to_text",
    duplicates: Duplicates = "merged",
    k: PositiveInt = 10,
    batch_size: PositiveInt = BATCH,
) -> Ranking:
    """Rank all candidates for each query, among n studies with one image and one text each.

    `scores` are images (rows) by texts (columns). The `k` nearest are listed, or all where there are fewer. `nearest`
    and `queries` of the ranking are rows of the studies.
    Raises ValueError for an unknown name, or where scores and texts differ in number.
    """
    if scores.shape != (len(texts), len(texts)):
        raise ValueError(f"scores {scores.shape} and {len(texts)} texts; one image and one text a study are expected")
    studies, group = np.arange(len(texts)), text_groups(texts)
    distinct = np.unique(group, return_index=True)[1] if duplicates == "merged" else studies
    group = torch.from_numpy(studies if duplicates == "wrong" else group)
    queries, candidates = studies, distinct
    if direction == "text_to_image":
        scores, queries, candidates = scores.T, distinct, studies
    parts = []
    for rows, block in Scores(scores.queries[queries], scores.candidates[candidates]).batches(batch_size):
        relevant = group[queries[rows], None] == group[candidates]
        best = block.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        above, tied = _above_and_tied(block, best)
        counts = (above, tied & ~relevant, tied & relevant, relevant)
        parts.append((*_first(block, min(k, block.shape[1])), *(count.sum(dim=1).numpy() for count in counts)))
    nearest, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Ranking(candidates[nearest], *columns, queries=queries, candidates=len(candidates))


def recall_rows(
    ranking: Ranking,
    *,
    target: str,
    ks: Sequence[int] = (1, 5, 10),
    patients: Sequence[object] | None = None,
    suffix: str = "",
    **resampling: int,
) -> pd.DataFrame:
    """Recall@K, median rank and mean rank over the queries, with intervals and chance. Columns: `COLUMNS`.

    `patients`: of all studies; whole patients are resampled. `suffix` is added to the names of the metrics.
    `resampling`: `n_bootstrap` and `seed`, see `bootstrap_rows`.
    The chance of the median rank is the median of the queries' expected ranks in a random order.
    A K that is not below the number of candidates is left out: everything would be found.
    """
    ks, n = [k for k in ks if k < ranking.candidates], len(ranking.queries)

    def statistic(recall: list[np.ndarray], rank: np.ndarray) -> Statistic:
        mean = ratio_of_sums(np.column_stack([*recall, rank]), np.ones((n, 1)))
        order = np.argsort(rank, kind="stable")

        def values(weights: np.ndarray) -> np.ndarray:
            means = mean(weights)
            # weighted median: between two middle values their mean
            total, ordered = weights[:, order].cumsum(axis=1), rank[order]
            half = total[:, -1:] / 2
            median = (ordered[(total < half).sum(axis=1)] + ordered[(total <= half).sum(axis=1)]) / 2
            return np.column_stack([means[:, :-1], median, means[:, -1]])[:, None]

        return values

    measured = statistic([ranking.recall(k) for k in ks], ranking.rank)
    chance = statistic([ranking.chance_recall(k) for k in ks], ranking.chance_rank)(np.ones((1, n)))[0]
    names = [name + suffix for name in (*(f"recall_at_{k}" for k in ks), "median_rank", "mean_rank")]
    groups = None if patients is None else np.asarray(patients)[ranking.queries]
    options = {"columns": {"chance": chance}, "groups": groups, **resampling}
    return bootstrap_rows(measured, np.ones((n, 1), dtype=bool), [target], names, **options)[COLUMNS]


def left_out(ks: Sequence[int], candidates: int) -> str:
    """A sentence that names the K that are not below the number of candidates."""
    beyond = [str(k) for k in ks if k >= candidates]
    if not beyond:
        return f"{candidates} candidates: every K is below that"
    return f"K = {', '.join(beyond)} left out: with {candidates} candidates, such a list contains them all"


def recall_table(scores: Scores, texts: Sequence[str], **options: Any) -> pd.DataFrame:
    """`recall_rows` of both directions (target) and all three rules for identical reports, of images by texts.

    `options`: `ks`, `patients`, `n_bootstrap` and `seed` of `recall_rows`.
    Metrics of `merged` have plain names, of `right` and `wrong` the suffixes `_copies_right` and `_copies_wrong`.
    """
    tables = []
    for direction in get_args(Direction):
        for duplicates in get_args(Duplicates):
            suffix = "" if duplicates == "merged" else f"_copies_{duplicates}"
            ranking = rank_partners(scores, texts, direction=direction, duplicates=duplicates, k=1)
            tables.append(recall_rows(ranking, target=direction, suffix=suffix, **options))
    return pd.concat(tables, ignore_index=True)


def precision_table(
    scores: Mapping[str, Scores],
    targets: pd.DataFrame,
    patients: Sequence[object],
    *,
    ks: Sequence[int] = (5, 10, 100),
    **resampling: int,
) -> pd.DataFrame:
    """Precision@K by class: of the first K candidates of a query that has the class, the share that has it, too.

    `scores`: by direction ("image_to_text", "text_to_image", "image_to_image"), whose queries and candidates are the
    same n studies; in "image_to_image" the query's own patient is no candidate (in the papers the query's own report
    is). targets: (n, K), 1 present, anything else absent. Where each study has exactly one class (5 x 200) this is the
    papers' number; where studies have several, a query counts once for each. `macro` is the mean over classes.
    Chance is the share of candidates with the class. A class without a query is NaN.
    Metrics of image to text have plain names, others the direction as a suffix. Columns: `COLUMNS` and direction.
    A K that is not below the number of candidates is left out. `resampling`: as in `recall_rows`.
    """
    labels, has = list(targets.columns), targets.to_numpy() == 1
    tables = [pd.DataFrame(columns=[*COLUMNS, "direction"])]
    notes = ["" if any_query else "no query with this finding" for any_query in has.any(axis=0)]
    for direction, matrix in scores.items():
        other_patients = direction == "image_to_image"
        candidates = len(has) - (max(Counter(patients).values()) if other_patients else 0)
        below = [k for k in ks if k < candidates]
        if not below or not labels:
            continue
        shares, chance = label_shares(matrix, has, below, patients=patients if other_patients else None)
        suffix = "" if direction == "image_to_text" else f"_{direction}"
        names = [f"precision_at_{k}{suffix}" for k in below]
        of_queries = ratio_of_sums(shares * has[..., None], np.repeat(has[..., None], len(below), axis=2))
        by_chance = {"chance": ratio_of_sums(chance * has, has)(np.ones((1, len(has))))[0]}
        options = {"columns": by_chance, "groups": patients, **resampling}
        rows = bootstrap_rows(of_queries, has, labels, names, macro=labels, notes=notes, **options)
        tables.append(rows[COLUMNS].assign(direction=direction))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def with_chance(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, then their chance as rows `<metric>_chance`, for a run record, which has no column for it."""
    chance = rows.assign(metric=rows["metric"] + "_chance", value=rows["chance"], ci_low=np.nan, ci_high=np.nan)
    return pd.concat([rows, chance], ignore_index=True)


def rerank(
    model: nn.Module,
    frame: pd.DataFrame,
    cache,
    texts: EncodedTexts,
    ranking: Ranking,
    *,
    direction: Direction = "image_to_text",
    batch_size: int = 64,
) -> Ranking:
    """A ranking of `rank_partners` with its k nearest in the order of the objective's own similarity.

    The similarity (with its local part, where the objective has one) is too slow for all pairs. What is not among the k
    nearest stays where it is, behind them.
    """
    k = ranking.nearest.shape[1]
    queries, nearest = np.repeat(ranking.queries, k), ranking.nearest.ravel()
    of_image, of_text = (queries, nearest) if direction == "image_to_text" else (nearest, queries)
    similarity, (used, number) = np.empty(len(queries), dtype=np.float32), np.unique(of_image, return_inverse=True)
    for rows, images in image_batches(model, frame.iloc[used], cache, batch_size=batch_size):
        with inference(model, "float32") as where:
            for i in range(rows.start, rows.stop):
                image, mine = select(images, [i - rows.start]), np.flatnonzero(number == i)
                for pairs in np.split(mine, range(64, len(mine), 64)):
                    chosen = select(texts.features, of_text[pairs].tolist()).to(where)
                    similarity[pairs] = model.objective.similarity(image, chosen)[0].float().cpu().numpy()
    group = text_groups(texts.texts)
    relevant = group[ranking.nearest] == group[ranking.queries][:, None]
    return reordered(ranking, similarity.reshape(-1, k), relevant)


def reordered(ranking: Ranking, similarity: np.ndarray, relevant: np.ndarray) -> Ranking:
    """The ranking with its k nearest in the order of another similarity; all behind them stay where they are.

    Shape: `similarity` and `relevant` (Q, k), of every nearest candidate.
    """
    k, listed = ranking.nearest.shape[1], relevant.any(axis=1)
    order = np.argsort(-similarity, axis=1, kind="stable")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    above, tied = (part.numpy() for part in _above_and_tied(torch.from_numpy(similarity), torch.from_numpy(best)))
    # a relevant candidate that is not among the k nearest stands behind all of them, whatever it was tied with
    behind = np.maximum(ranking.above, k)
    return replace(
        ranking,
        nearest=np.take_along_axis(ranking.nearest, order, 1),
        scores=np.take_along_axis(similarity, order, 1),
        above=np.where(listed, above.sum(1), behind),
        tied_irrelevant=np.where(listed, (tied & ~relevant).sum(1), ranking.above + ranking.tied_irrelevant - behind),
        tied_relevant=np.where(listed, (tied & relevant).sum(1), ranking.tied_relevant),
    )


class SearchIndexError(ValueError):
    """An index file that cannot be used, or not with this model; the message says which and the remedy."""


def fingerprint(model: nn.Module) -> str:
    """16 hex digits of all weights and buffers, the configuration and the vocabulary; the same on every device."""
    weights = {
        name: content_hash(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }
    vocabulary = {} if model.tokenizer is None else model.tokenizer.get_vocab()
    return content_hash([model.config.to_dict(), vocabulary, weights])


@dataclass(frozen=True)
class SearchIndex:
    """n embedded texts or images with their ids, and the fingerprint of the model; made by `SearchIndex.of`.

    Embeddings of two models cannot be compared, so the index refuses every other model.
    Shape: `embedding` (n, D) float32, the objective's global embedding; `ids` and `contents` (texts, or paths of
    images) of length n.
    """

    model: str
    ids: tuple[str, ...]
    contents: tuple[str, ...]
    embedding: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.contents) == len(self.embedding):
            raise ValueError(f"{len(self)} ids, {len(self.contents)} texts or paths, {len(self.embedding)} embeddings")

    @classmethod
    def of(
        cls, model: nn.Module, ids: Sequence[object], contents: Sequence[str], embedding: np.ndarray
    ) -> "SearchIndex":
        """The index of what `model` has embedded."""
        return cls(fingerprint(model), tuple(map(str, ids)), tuple(map(str, contents)), embedding)

    def __len__(self) -> int:
        return len(self.ids)

    def nearest(self, model: nn.Module, embedding: np.ndarray, *, k: int = 5) -> pd.DataFrame:
        """The k entries of highest cosine, or all, for each of Q embeddings (Q, D) of the same model.

        Columns: query (0..Q-1), rank (from 1), cosine, id, content. Raises SearchIndexError for another model.
        """
        if (own := fingerprint(model)) != self.model:
            raise SearchIndexError(
                f"the index was made with model {self.model}, this is model {own}: their embeddings cannot be "
                "compared. Load the checkpoint that the index was made with, or make the index again"
            )
        rows, k = [], min(k, len(self))
        for batch, block in cosine(np.atleast_2d(embedding), self.embedding).batches(BATCH):
            for query, entries, values in zip(range(batch.start, batch.stop), *_first(block, k), strict=True):
                ranked = enumerate(zip(entries, values, strict=True), start=1)
                rows += [(query, rank, value, self.ids[i], self.contents[i]) for rank, (i, value) in ranked]
        return pd.DataFrame(rows, columns=["query", "rank", "cosine", "id", "content"])

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        entries = json.dumps({"model": self.model, "ids": self.ids, "contents": self.contents}).encode()
        # the entries are a tensor of bytes: the header of a safetensors file is limited to 100 MB
        tensors = {"entries": np.frombuffer(entries, np.uint8), "embedding": self.embedding.astype(np.float32)}
        atomic_write(path, serialise(tensors))
        return Path(path)


def load_index(path: str | Path) -> SearchIndex:
    """The index of a file written by `save`. Raises SearchIndexError for a missing or damaged file, or another kind."""
    try:
        content = parse(Path(path).read_bytes())
        entries = json.loads(content["entries"].tobytes())
        return SearchIndex(entries["model"], tuple(entries["ids"]), tuple(entries["contents"]), content["embedding"])
    except OSError as error:
        raise SearchIndexError(f"search index {path} cannot be opened ({error.strerror})") from None
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SearchIndexError(f"{path} is damaged or no search index ({error}); make it again") from error
