"""Segmentation from a pretrained encoder at several label fractions: train, choose on validation, score the test once.

The protocol is that of GLoRIA (Huang et al. 2021, section 4.4) and MGCA (Wang et al. 2022, section 4.3): a U-Net on
the encoder, 1, 10 and 100 % of the training studies, the whole validation and test split. Here thresholds and the best
step are chosen on validation, several subsets are drawn, and two baselines that see no image stand beside every number:
the empty prediction, and the mean mask of the training subset.

    data = segmentation_data(model, frame, cache, root, ["Pleural Effusion"])
    rows, fitted = label_efficiency(model.image_encoder, data, macro=data.labels, seeds=range(3))

Training of one segmentation network: batches, losses, and what is chosen on the validation split.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gloria_core.data.splits import label_subset
from gloria_core.models.segmentation import BatchNormMode, Decoder, SegmentationNet, decoder_inputs, decoder_kind
from gloria_core.tasks.segmentation.data import FeatureStore, SegmentationData, augmented, shuffled_batches
from gloria_core.tasks.segmentation.losses import available, segmentation_loss
from gloria_core.tasks.segmentation.metrics import (
    EMPTY,
    PUBLISHED_THRESHOLD,
    THRESHOLDS,
    MaskCounts,
    best_thresholds,
    count,
    segmentation_rows,
)
from gloria_core.training.precision import Precision, choose_precision

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SCORED = 64  # images at a time where nothing is learnt


@dataclass(frozen=True)
class Recipe:
    """How a segmentation network is trained.

    `loss`: a name of `segmentation_losses`. `frozen`, `batch_norm`, `decoder`, `channels`: see `SegmentationNet`.
    `steps`: batches of `batch_size` at most, the same at every label fraction, so that few labels are not also few
    steps. After every `validate_every` steps the validation split is scored; `patience` such scores in a row without a
    better one end the training. `learning_rate`, `weight_decay`: AdamW with MGCA's values; the rate falls to zero along
    half a cosine. `encoder_scale` times the rate is the encoder's where it is trained. `augment`: rotation by up to 10
    degrees and scaling by up to 10 %, of half of the images, as in both papers' code. `memory`: bytes that the features
    of a fixed encoder may take. Raises ValueError naming the field.
    """

    loss: str = "mgca"
    frozen: bool = True
    batch_norm: BatchNormMode = "eval"
    decoder: Decoder = "auto"
    channels: tuple[int, ...] | None = None
    steps: int = 400
    validate_every: int = 50
    patience: int = 4
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    encoder_scale: float = 1.0
    augment: bool = False
    precision: Precision = "auto"
    memory: int = 2**30

    def __post_init__(self) -> None:
        if self.loss not in available():
            raise ValueError(f"loss {self.loss!r} is unknown; available: {', '.join(available())}")
        if self.batch_norm not in ("eval", "train"):
            raise ValueError(f'batch_norm must be "eval" or "train", not {self.batch_norm!r}')
        for name in ("steps", "validate_every", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def fixed(self) -> bool:
        """Whether an image always gives the decoder the same features, so that they may be computed once."""
        return self.frozen and self.batch_norm == "eval" and not self.augment


@dataclass(frozen=True)
class Segmenter:
    """A trained network with what was chosen on validation.

    `thresholds` (K,): numbers of `THRESHOLDS`. `history`: one row a validation (step, train_loss, valid_dice).
    `step`: the best of them. `notes` (K,): why a class was not fitted, or "". `n_train`: studies of the subset.
    """

    net: SegmentationNet
    data: SegmentationData
    recipe: Recipe
    thresholds: np.ndarray
    history: pd.DataFrame
    step: int
    notes: tuple[str, ...]
    n_train: int
    store: FeatureStore | None = field(default=None, repr=False)

    def probabilities(self, rows: Sequence[int]) -> np.ndarray:
        """Shape: -> (b, K, crop, crop) float32."""
        return torch.cat([p.cpu() for _, p in _predictions(self.net, self.data, rows, self.recipe, self.store)]).numpy()

    def masks(self, rows: Sequence[int]) -> np.ndarray:
        """Predicted masks at the chosen thresholds. Shape: -> (b, K, crop, crop) bool."""
        level = np.array([THRESHOLDS[number] for number in self.thresholds], np.float32)
        return self.probabilities(rows) > level[:, None, None]

    def counts(self, rows: Sequence[int]) -> MaskCounts:
        """Pixel counts of these studies, in their order."""
        return _counts(self.net, self.data, rows, self.recipe, self.store)


def fit(
    encoder: nn.Module,
    data: SegmentationData,
    train: Sequence[int],
    valid: Sequence[int],
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    store: FeatureStore | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Segmenter:
    """Train a decoder (and the encoder, unless frozen) on rows `train`, choosing step and thresholds on rows `valid`.

    `seed` sets the decoder's first weights, the order of the studies and the augmentation; torch's global random state
    is left as it was, and so is `encoder`: the network gets a copy. Only with a `store` (`feature_store`, features of
    one encoder that several fits share) the encoder itself is in the network, frozen.
    What validation maximises is the mean over classes of the pooled Dice, each at its best threshold; the weights of
    the best step are kept. `progress` is called with (step, that mean). A class without foreground in `train` sees
    empty masks only and is noted; it does not count in the mean, nor does one without foreground in `valid`.

    Raises ValueError where no class has foreground in `train`, or none of those has any in `valid`, and where `store`
    is given with a recipe that changes the features.
    """
    recipe = recipe or Recipe()
    if store is not None and not recipe.fixed:
        raise ValueError("a feature store needs a frozen encoder, batch_norm='eval' and no augmentation")
    train, valid = np.asarray(train, int), np.asarray(valid, int)
    trained, judged = data.has_foreground(train), data.has_foreground(train) & data.has_foreground(valid)
    if not judged.any():
        raise ValueError(f"{unfit(data, train, valid)}; labels: {', '.join(data.labels)}")
    net = _network(encoder if store is not None else copy.deepcopy(encoder), len(data.labels), recipe, seed)
    store = feature_store(net.encoder, data, recipe) if store is None and recipe.fixed else store
    history, best = [], (-1.0, 0, None, None)
    for step, loss in _training(net, data, train, recipe, seed, store):
        if step % recipe.validate_every and step != recipe.steps:
            continue
        counts = _counts(net, data, valid, recipe, store)
        chosen = best_thresholds(counts)
        reached = float(counts.pooled()[np.arange(len(chosen)), chosen][judged].mean())
        history.append((step, loss, reached))
        if progress is not None:
            progress(step, reached)
        if reached > best[0]:
            best = (reached, step, chosen, _changing_state(net))
        elif sum(row[0] > best[1] for row in history) >= recipe.patience:
            break
    net.load_state_dict(best[3], strict=False)
    notes = tuple("" if there else f"not fitted: no mask in {len(train)} training studies" for there in trained)
    table = pd.DataFrame(history, columns=["step", "train_loss", "valid_dice"])
    return Segmenter(net.eval(), data, recipe, best[2], table, best[1], notes, len(train), store)


def unfit(data: SegmentationData, train: Sequence[int], valid: Sequence[int]) -> str:
    """Why nothing can be learnt from rows `train`, or chosen by rows `valid`; "" where something can."""
    trained = data.has_foreground(train)
    if not trained.any():
        return f"not fitted: no mask in {len(train)} training studies"
    if not (trained & data.has_foreground(valid)).any():
        return f"not fitted: the validation split has no mask of what {len(train)} training studies show"
    return ""


def feature_store(encoder: nn.Module, data: SegmentationData, recipe: Recipe) -> FeatureStore:
    """Features of a fixed encoder, for all fits that share it. The encoder is put into evaluation mode and frozen."""
    kind, device = decoder_kind(encoder, recipe.decoder), next(encoder.parameters()).device
    encoder.requires_grad_(False)
    encoder.eval()

    def encode(rows: list[int]) -> tuple[Tensor, ...]:
        with torch.no_grad(), _autocast(device, recipe.precision):
            return decoder_inputs(encoder, data.pixels(rows).to(device), kind)

    return FeatureStore(encode, limit=recipe.memory, device=device)


def _network(encoder: nn.Module, classes: int, recipe: Recipe, seed: int) -> SegmentationNet:
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SegmentationNet(
            encoder,
            classes,
            decoder=recipe.decoder,
            channels=recipe.channels,
            frozen=recipe.frozen,
            batch_norm=recipe.batch_norm,
        )
    return net.to(device).to(memory_format=torch.channels_last)


def _training(
    net: SegmentationNet,
    data: SegmentationData,
    train: np.ndarray,
    recipe: Recipe,
    seed: int,
    store: FeatureStore | None,
) -> Iterator[tuple[int, float]]:
    """Steps of the optimiser; yields (steps done, mean loss since the last validation)."""
    device, rng = next(net.parameters()).device, np.random.default_rng([seed, 5])
    groups = [{"params": [*net.decoder.parameters(), *net.head.parameters()]}]
    if not recipe.frozen:
        groups.append({"params": net.encoder.parameters(), "lr": recipe.learning_rate * recipe.encoder_scale})
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / recipe.steps, 1)))
    )
    scaler = torch.amp.GradScaler(device.type, enabled=choose_precision(device, recipe.precision) == "float16")
    losses: list[float] = []
    for step, rows in enumerate(
        shuffled_batches(train, batch_size=recipe.batch_size, steps=recipe.steps, rng=rng), start=1
    ):
        net.train()
        truth = torch.from_numpy(data.truth(rows)).to(device).float()
        with _autocast(device, recipe.precision):
            if store is not None:
                features = store(rows)
            else:
                pixels = data.pixels(rows).to(device)
                if recipe.augment:
                    pixels, truth = augmented(pixels, truth, rng)
                features = net.features(pixels)
            logits = net.decode(features, (data.crop, data.crop))
        loss = segmentation_loss(recipe.loss, logits, truth, torch.from_numpy(data.known[rows]).to(device))
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {float(loss)} at step {step}: lower the learning rate or use float32")
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        falling.step()
        losses.append(float(loss.detach()))
        validated = step % recipe.validate_every == 0
        yield step, float(np.mean(losses))
        losses = [] if validated else losses


def _predictions(
    net: SegmentationNet, data: SegmentationData, rows: Sequence[int], recipe: Recipe, store: FeatureStore | None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Batches of rows with their probabilities (b, K, crop, crop)."""
    device, rows = next(net.parameters()).device, np.asarray(rows, int)
    net.eval()
    for first in range(0, len(rows), _SCORED):
        block = rows[first : first + _SCORED]
        with torch.no_grad(), _autocast(device, recipe.precision):
            features = store(block) if store is not None else net.features(data.pixels(block).to(device))
            logits = net.decode(features, (data.crop, data.crop))
        yield block, torch.sigmoid(logits)


def _counts(
    net: SegmentationNet, data: SegmentationData, rows: Sequence[int], recipe: Recipe, store: FeatureStore | None
) -> MaskCounts:
    parts = []
    for block, probabilities in _predictions(net, data, rows, recipe, store):
        truth = torch.from_numpy(data.truth(block)).to(probabilities.device)
        parts.append(count(probabilities, truth, data.known[block]))
    return MaskCounts.joined(parts)


def _changing_state(net: SegmentationNet) -> dict[str, Tensor]:
    """A copy of what training changes: all, or everything but the encoder where that is fixed."""
    fixed = net.features_are_fixed
    return {
        name: value.detach().clone()
        for name, value in net.state_dict().items()
        if not (fixed and name.startswith("encoder."))
    }


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    dtype = _DTYPES.get(choose_precision(device, precision))
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


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
            train = label_subset(data.frame, fraction, seed).index.to_numpy()
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
