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
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd

from gloria_core.data.reports import ReportError
from gloria_core.tasks.metrics import interval, resamples
from gloria_core.tasks.search import BLOCK, Found, labels_at, search
from gloria_core.tasks.search_blocks import Scores

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
