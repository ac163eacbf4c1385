"""Segmentation from a pretrained encoder at several label fractions: train, choose on validation, score the test once.

The protocol is that of GLoRIA (Huang et al. 2021, section 4.4) and MGCA (Wang et al. 2022, section 4.3): a U-Net on
the encoder, 1, 10 and 100 % of the training studies, the whole validation and test split. Here thresholds and the best
step are chosen on validation, several subsets are drawn, and two baselines that see no image are reported beside every
number: the empty prediction, and the mean mask of the training subset. Without a validation mask the last step is kept
and every threshold is 0.5.

    data = segmentation_data(model, frame, cache, root, ["Pleural Effusion"])
    rows, fits = label_efficiency(model.image_encoder, data, LabelEfficiency(subsets=3, macro=data.labels))
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from gloria_core.models.segmentation import BatchNormMode, SegmentationNet, decoder_inputs
from gloria_core.tasks.label_efficiency import LabelEfficiency
from gloria_core.tasks.segmentation.data import SegmentationData, augmented
from gloria_core.tasks.segmentation.losses import LossName, segmentation_loss
from gloria_core.tasks.segmentation.metrics import (
    EMPTY,
    PUBLISHED_THRESHOLD,
    THRESHOLDS,
    MaskCounts,
    best_thresholds,
    count,
    segmentation_rows,
)
from gloria_core.training import supervised
from gloria_core.training.precision import autocast
from gloria_core.training.schedule import ScheduleName
from gloria_core.training.supervised import FeatureStore

# Ending of the metric names of the mean-mask baseline.
PRIOR = "_prior"


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig(supervised.FitConfig):
    """How a segmentation network is trained; rate and decay are MGCA's. Raises ValueError naming the field.

    Attributes:
        loss: see `segmentation_loss`.
        frozen, batch_norm, channels, width_scale: see `SegmentationNet`.
        steps: batches of `batch_size`, the same at every label fraction, so that few labels do not also mean few steps.
        validate_every: steps after which the validation split is scored.
        augment: rotation by up to 10 degrees and scaling by up to 10 %, of half of the images, as in both papers' code.
    """

    loss: LossName = "mgca"
    batch_norm: BatchNormMode = "eval"
    channels: tuple[int, ...] | None = None
    width_scale: PositiveFloat = 1.0
    steps: PositiveInt = 400
    validate_every: PositiveInt = 50
    patience: PositiveInt = 4
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    schedule: ScheduleName = "cosine"
    augment: bool = False

    @property
    def features_are_fixed(self) -> bool:
        """Whether an image always gives the decoder the same features, so that they may be computed once."""
        return self.frozen and self.batch_norm == "eval" and not self.augment


@dataclasses.dataclass
class Segmenter:
    """A network on `data`, and what was chosen on validation; without a network it predicts nothing.

    Attributes:
        store: features of a fixed encoder.
        train: rows of the subset.
        thresholds: (K,) indices into `THRESHOLDS`.
        history: one row a validation (step, train_loss, valid_dice).
        step: the best of them.
        notes: (K,) why a class was not fitted, or "".
    """

    network: SegmentationNet | None
    data: SegmentationData
    config: SegmentationConfig
    store: FeatureStore | None = dataclasses.field(default=None, repr=False)
    train: Sequence[int] = ()
    thresholds: Sequence[int] = ()
    history: pd.DataFrame | None = None
    step: int = 0
    notes: Sequence[str] = ()

    def logits(self, rows: np.ndarray, pixels: Tensor | None = None) -> Tensor:
        """Shape: -> (b, K, crop, crop); of `pixels` where they are given, else of the studies' own."""
        device, crop = next(self.network.parameters()).device, self.data.crop
        with autocast(device, self.config.precision):
            if pixels is None and self.store is not None:
                return self.network.decode(self.store(rows), (crop, crop))
            return self.network(self.data.pixels(rows).to(device) if pixels is None else pixels)

    @torch.no_grad()
    def probabilities(self, rows: np.ndarray) -> Tensor:
        """In evaluation mode. Shape: -> (b, K, crop, crop) float32."""
        if self.network is None:
            return torch.zeros(len(rows), len(self.data.labels), self.data.crop, self.data.crop)
        self.network.eval()
        return torch.sigmoid(self.logits(rows))

    def masks(self, rows: Sequence[int]) -> np.ndarray:
        """Predicted masks at the chosen thresholds. Shape: -> (b, K, crop, crop) bool."""
        probabilities = [self.probabilities(batch).cpu().numpy() for batch in _batches(rows)]
        return np.concatenate(probabilities) > np.array(THRESHOLDS, np.float32)[self.thresholds][:, None, None]

    def counts(self, rows: Sequence[int]) -> MaskCounts:
        """Pixel counts of these studies, in their order."""
        return count_masks(self.data, rows, self.probabilities)

    def score(self, rows: Sequence[int], *, macro: Sequence[str] = (), n_bootstrap: int = 1000) -> pd.DataFrame:
        """Metric rows of these studies: `segmentation_rows`, and again with `_prior` for the mean mask of `train`.

        The mean mask is the same for every image, thresholded on validation as the network is: what knowing the usual
        place of a finding is worth; it needs training studies. A label without a mask in `train` has NaN and a note,
        and the macro leaves it out.
        """
        data, options = self.data, {"macro": list(macro), "batch_size": self.config.batch_size, "notes": self.notes}
        options |= {"groups": data.frame["patient_id"].astype(str).to_numpy()[rows], "n_bootstrap": n_bootstrap}
        table = segmentation_rows(self.counts(rows), data.labels, thresholds=self.thresholds, **options)
        if not len(self.train):  # a network from elsewhere, on data without a training split
            return table.assign(step=self.step)
        thresholds = best_thresholds(mean_mask_counts(data, self.train, data.rows("valid")))
        prior = mean_mask_counts(data, self.train, rows)
        prior = segmentation_rows(prior, data.labels, thresholds=thresholds, **options)
        prior = prior[prior["metric"] != EMPTY]  # the same in both
        table = pd.concat([table, prior.assign(metric=prior["metric"] + PRIOR)], ignore_index=True)
        return table.assign(step=self.step)

    def cases(self, rows: Sequence[int], each: int = 4) -> dict[str, list[tuple]]:
        """The masks of `rows` with the best, median and worst Dice: image, truth, prediction and title of each."""
        counts = self.counts(rows).at(self.thresholds)
        scores = np.where(counts.truth > 0, counts.per_image()[..., 0], np.nan)
        dice = dict(zip(rows, scores, strict=True))

        def case(row: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
            title = f"{self.data.frame['study_id'][row]}\n{self.data.labels[k]}, Dice {dice[row][k]:.2f}"
            return self.data.images([row])[0], self.data.truth([row])[0, k], self.masks([row])[0, k], title

        return self.data.cases(rows, scores, each, case)


def train_segmenter(
    encoder: nn.Module,
    data: SegmentationData,
    train: Sequence[int],
    valid: Sequence[int],
    *,
    config: SegmentationConfig | None = None,
    seed: int = 0,
    store: FeatureStore | None = None,
    progress: supervised.Progress | None = None,
) -> Segmenter:
    """Train a decoder (and the encoder, unless frozen) on rows `train`; rows `valid` choose step and thresholds.

    `seed` sets the decoder's first weights, the order of the studies and the augmentation. torch's global random state
    does not change, nor does `encoder`: the network gets a copy. Only with a `store` (`feature_store`, features of
    one encoder that several fits share) the encoder itself is in the network, frozen.
    Validation maximises the mean over classes of the pooled Dice, each at its best threshold. A class without
    foreground in `train` sees empty masks only and is noted; it does not count in the mean, nor does one without
    foreground in `valid`. Where none counts, the last step is kept.

    Raises ValueError where no class has foreground in `train`, and where `store` is given with a config that changes
    the features.
    """
    config = config or SegmentationConfig()
    if store is not None and not config.features_are_fixed:
        raise ValueError("a feature store needs a frozen encoder, batch_norm='eval' and no augmentation")
    train, valid = np.asarray(train, int), np.asarray(valid, int)
    trained, missing = data.has_foreground(train), f"not fitted: no mask in {len(train)} training studies"
    if not trained.any():
        raise ValueError(f"{missing}; labels: {', '.join(data.labels)}")
    judged = np.flatnonzero(trained & data.has_foreground(valid))
    if not len(judged) and progress is not None:
        progress("no validation mask of what is trained: the last step is kept, and the threshold is 0.5")
    encoder, device = encoder if store is not None else copy.deepcopy(encoder), next(encoder.parameters()).device
    options = {name: getattr(config, name) for name in ("channels", "width_scale", "frozen", "batch_norm")}
    with supervised.seeded(seed):
        net = SegmentationNet(encoder, len(data.labels), **options).to(device).to(memory_format=torch.channels_last)
    store = feature_store(net.encoder, data, config) if store is None and config.features_are_fixed else store
    notes = tuple("" if fitted else missing for fitted in trained)
    segmenter = Segmenter(net, data, config, store, train, notes=notes)
    rng, thresholds = np.random.default_rng([seed, 5]), []

    def loss(rows: np.ndarray) -> Tensor:
        truth, pixels = torch.from_numpy(data.truth(rows)).to(device).float(), None
        if config.augment:
            with autocast(device, config.precision):
                pixels, truth = augmented(data.pixels(rows).to(device), truth, rng)
        known = torch.from_numpy(data.known[rows]).to(device)
        return segmentation_loss(config.loss, segmenter.logits(rows, pixels), truth, known)

    def validate() -> float:
        if not len(judged):
            thresholds.append(np.full(len(data.labels), PUBLISHED_THRESHOLD))
            return float("nan")
        counts = segmenter.counts(valid)
        thresholds.append(best_thresholds(counts))
        return float(counts.pooled()[judged, thresholds[-1][judged]].mean())

    segmenter.history, segmenter.step = supervised.fit(
        net,
        data.frame["study_id"],
        supervised.shuffled_batches(train, config.batch_size, rng, whole=True),
        loss,
        validate,
        config,
        steps=config.steps,
        validate_at={*range(config.validate_every, config.steps, config.validate_every), config.steps},
        metric="valid_dice",
        progress=progress,
    )
    segmenter.thresholds = thresholds[segmenter.history["step"].tolist().index(segmenter.step)]
    return segmenter


def feature_store(encoder: nn.Module, data: SegmentationData, config: SegmentationConfig) -> FeatureStore:
    """Features of a fixed encoder, for all fits that share it. The encoder is put into evaluation mode and frozen."""
    device = next(encoder.requires_grad_(False).eval().parameters()).device

    def encode(rows: list[int]) -> tuple[Tensor, ...]:
        with torch.no_grad(), autocast(device, config.precision):
            return decoder_inputs(encoder, data.pixels(rows).to(device))

    return FeatureStore(encode, limit=config.memory, device=device)


def _batches(rows: Sequence[int]) -> list[np.ndarray]:
    return np.array_split(np.asarray(rows, int), range(64, len(rows), 64))


def count_masks(data: SegmentationData, rows: Sequence[int], predict: Callable[[np.ndarray], Tensor]) -> MaskCounts:
    """Pixel counts of studies, in their order. `predict`: batch of rows -> probabilities (b, K, crop, crop)."""
    parts = []
    for batch in _batches(rows):
        probabilities = predict(batch)
        truth = torch.from_numpy(data.truth(batch)).to(probabilities.device)
        parts.append(count(probabilities, truth, data.known[batch]))
    return MaskCounts.joined(parts)


def mean_mask_counts(data: SegmentationData, train: Sequence[int], rows: Sequence[int]) -> MaskCounts:
    """Counts of predicting, for every study of `rows`, how often each pixel is foreground in the masks of `train`.

    The mean is over studies with foreground, so that its scale does not depend on how rare a finding is.
    """
    total = sum(data.truth(batch).sum(axis=0) for batch in _batches(train))
    annotated = (data.areas(train) > 0).sum(axis=0)
    mean = torch.from_numpy(total / np.maximum(annotated, 1)[:, None, None]).float()
    return count_masks(data, rows, lambda batch: mean.expand(len(batch), *mean.shape))


def label_efficiency(
    encoder: nn.Module,
    data: SegmentationData,
    protocol: LabelEfficiency,
    config: SegmentationConfig | None = None,
    *,
    progress: supervised.Progress | None = None,
) -> tuple[pd.DataFrame, dict[tuple[float, int], Segmenter]]:
    """Train on every subset of `protocol`: rows of `Segmenter.score`, and the segmenters by (fraction, subset).

    The number of the subset also seeds the decoder's first weights. A subset without any mask gives no segmenter: its
    rows are NaN with a note. More columns: those of `LabelEfficiency`, and step.
    """
    config, encoder, valid = config or SegmentationConfig(), copy.deepcopy(encoder), data.rows("valid")
    store = feature_store(encoder, data, config) if config.features_are_fixed else None

    def fit(train: np.ndarray, subset: int) -> Segmenter:
        if data.has_foreground(train).any():
            options = {"config": config, "seed": subset, "store": store, "progress": progress}
            return train_segmenter(encoder, data, train, valid, **options)
        k, note = len(data.labels), f"not fitted: no mask in {len(train)} training studies"
        return Segmenter(None, data, config, train=train, thresholds=[PUBLISHED_THRESHOLD] * k, notes=[note] * k)

    rows, fits = protocol.run(data.frame, fit, targets=data.positives(), progress=progress)
    return rows, {key: fitted for key, fitted in fits.items() if fitted.network is not None}
