"""Segmentation from a pretrained encoder at several label fractions: train, choose on validation, score the test once.

The protocol is that of GLoRIA (Huang et al. 2021, section 4.4) and MGCA (Wang et al. 2022, section 4.3): a U-Net on
the encoder, 1, 10 and 100 % of the training studies, the whole validation and test split. Here thresholds and the best
step are chosen on validation, several subsets are drawn, and two baselines that see no image stand beside every number:
the empty prediction, and the mean mask of the training subset.

    data = segmentation_data(model, frame, cache, root, ["Pleural Effusion"])
    rows, fitted = label_efficiency(model.image_encoder, data, macro=data.labels, seeds=range(3))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

from gloria_core.tasks.classification import subset
from gloria_core.tasks.segmentation_data import SegmentationData, mask_counts, segmentation_data
from gloria_core.tasks.segmentation_metrics import (
    EMPTY,
    PUBLISHED_THRESHOLD,
    THRESHOLDS,
    MaskCounts,
    best_thresholds,
    count,
    segmentation_rows,
)
from gloria_core.tasks.segmentation_training import Recipe, Segmenter, feature_store, fit, unfit

__all__ = [
    "Recipe",
    "SegmentationData",
    "Segmenter",
    "best_median_worst",
    "fit",
    "label_efficiency",
    "mask_counts",
    "mean_mask_counts",
    "score",
    "segmentation_data",
    "subset",
]

PRIOR = "_prior"
"""Ending of the metric names of the mean-mask baseline."""
_BLOCK = 64


def label_efficiency(
    encoder: nn.Module,
    data: SegmentationData,
    *,
    fractions: Sequence[float] = (0.01, 0.1, 1.0),
    seeds: Sequence[int] = (0,),
    macro: Sequence[str] = (),
    recipe: Recipe | None = None,
    n_bootstrap: int = 1000,
    progress: Callable[[str], None] | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], Segmenter]]:
    """Fit at every fraction and seed, score split `test` once each: metric rows; segmenters by (fraction, seed).

    A seed selects the training subset (`classification.subset`) and the decoder's first weights. At fraction 1 all
    seeds have one subset: run once, under the first seed. Rows are those of `score`. A subset without any mask, or
    with none of a class that validation shows, gives no segmenter: its rows are NaN with a note.
    More columns: label_fraction, seed, split, n_train, step. `progress` gets a line of text after each fit.
    """
    recipe, encoder = recipe or Recipe(), copy.deepcopy(encoder)
    store = feature_store(encoder, data, recipe) if recipe.fixed else None
    tables, fitted = [], {}
    for fraction in fractions:
        for seed in seeds if fraction < 1 else list(seeds)[:1]:
            train = subset(data.frame, fraction, seed).index.to_numpy()
            about = {"label_fraction": fraction, "seed": seed, "split": "test", "n_train": len(train)}
            why = unfit(data, train, data.rows("valid"))
            if why:
                tables.append(_not_fitted(data, why, macro).assign(**about, step=0))
                continue
            found = fit(encoder, data, train, data.rows("valid"), recipe=recipe, seed=seed, store=store)
            table = score(found, train, macro=macro, n_bootstrap=n_bootstrap)
            tables.append(table.assign(**about, step=found.step))
            fitted[fraction, seed] = found
            if progress is not None:
                reached = found.history["valid_dice"].max()
                progress(f"{100 * fraction:g} %, subset {seed}: Dice {reached:.3f} on validation at step {found.step}")
    return pd.concat(tables, ignore_index=True), fitted


def score(
    segmenter: Segmenter, train: Sequence[int], *, macro: Sequence[str] = (), n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Metric rows of split `test`: those of `segmentation_rows`, and again with `_prior` for the mean mask of `train`.

    The mean mask is the same for every image, thresholded on validation as the network is: what knowing the usual place
    of a finding is worth. A label without a mask in `train` has NaN and a note, and the macro leaves it out.
    """
    data, test = segmenter.data, segmenter.data.rows("test")
    rules = {
        "macro": list(macro),
        "groups": data.frame["patient_id"].astype(str).to_numpy()[test],
        "batch_size": segmenter.recipe.batch_size,
        "notes": segmenter.notes,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
    }
    table = segmentation_rows(segmenter.counts(test), data.labels, thresholds=segmenter.thresholds, **rules)
    thresholds = best_thresholds(mean_mask_counts(data, train, data.rows("valid")))
    prior = segmentation_rows(mean_mask_counts(data, train, test), data.labels, thresholds=thresholds, **rules)
    prior = prior[prior["metric"] != EMPTY]  # no other than above
    return pd.concat([table, prior.assign(metric=prior["metric"] + PRIOR)], ignore_index=True)


def _not_fitted(data: SegmentationData, why: str, macro: Sequence[str]) -> pd.DataFrame:
    """The rows of `score` where there is nothing to learn from: NaN, a note, and the empty prediction's score."""
    test = data.rows("test")
    truth = data.areas(test)
    nothing = np.zeros((*truth.shape, len(THRESHOLDS)), np.int64)
    counts = MaskCounts(nothing, nothing, truth, data.known[test])
    notes, half = [why] * len(data.labels), [PUBLISHED_THRESHOLD] * len(data.labels)
    rows = segmentation_rows(counts, data.labels, thresholds=half, macro=list(macro), notes=notes, n_bootstrap=0)
    prior = rows[rows["metric"] != EMPTY]
    return pd.concat([rows, prior.assign(metric=prior["metric"] + PRIOR)], ignore_index=True)


def mean_mask_counts(data: SegmentationData, train: Sequence[int], rows: Sequence[int]) -> MaskCounts:
    """Counts of predicting, for every study of `rows`, how often each pixel is foreground in the masks of `train`.

    The mean is over studies with foreground, so that its scale does not depend on how rare a finding is.
    """
    train, rows = np.asarray(train, int), np.asarray(rows, int)
    total = np.zeros((len(data.labels), data.crop, data.crop))
    for first in range(0, len(train), _BLOCK):
        total += data.truth(train[first : first + _BLOCK]).sum(axis=0)
    drawn = (data.areas(train) > 0).sum(axis=0)
    mean = torch.from_numpy(total / np.maximum(drawn, 1)[:, None, None]).float()
    parts = []
    for first in range(0, len(rows), _BLOCK):
        block = rows[first : first + _BLOCK]
        same = mean.expand(len(block), *mean.shape)
        parts.append(count(same, torch.from_numpy(data.truth(block)), data.known[block]))
    return MaskCounts.joined(parts)


def best_median_worst(scores: Sequence[float], each: int = 1) -> dict[str, list[int]]:
    """Positions of the highest, middle and lowest scores, `each` of them; NaN is left out, ties go to the first.

    No position is named twice; with fewer scores than asked for, the later groups are shorter.
    Raises ValueError where every score is NaN.
    """
    scores = np.asarray(scores, float)
    order = [int(place) for place in np.argsort(-scores, kind="stable") if np.isfinite(scores[place])]
    if not order:
        raise ValueError("no finite score to choose cases from")
    best, rest = order[:each], order[each:]
    worst, middle = rest[max(len(rest) - each, 0) :], rest[: max(len(rest) - each, 0)]
    # the median of all scores, not of those that are left
    middle = sorted(middle, key=lambda place: abs(order.index(place) - (len(order) - 1) / 2))[:each]
    return {"best": best, "median": sorted(middle, key=order.index), "worst": worst}
