"""Fine-tuned networks that are ready to use: what notebooks 04 to 06 write as best.pt, and upstream ones.

    tuned = gloria_core.load("results/runs/quickstart/<run>/checkpoints/best.pt")
    tuned.predict(["a.png", "b.dcm"])

`save` and `load` are `gloria_core.save` and `gloria_core.load`; they take pretrained models too. `open_model` takes
upstream files and networks as well, and `FineTuned.evaluate` scores any of them on the test split of a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from gloria_core.checkpoints import native
from gloria_core.checkpoints.image_models import ImageClassifier, Pixels
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.files import did_you_mean
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import read_gray
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.key_maps import network_name
from gloria_core.models.segmentation import SegmentationNet
from gloria_core.models.weights import WeightsError, fill
from gloria_core.tasks.annotated_images import AnnotatedImages
from gloria_core.tasks.classification.finetuning import Finetuned
from gloria_core.tasks.detection import training as detection
from gloria_core.tasks.detection.data import BoxData
from gloria_core.tasks.label_efficiency import LabelEfficiency, Score
from gloria_core.tasks.segmentation import training as segmentation
from gloria_core.tasks.segmentation.data import SegmentationData
from gloria_core.tasks.segmentation.metrics import THRESHOLDS

Task = Literal["classification", "segmentation", "detection"]
Fitted = Finetuned | segmentation.Segmenter | detection.TrainedDetector
NETWORKS = {"classifier": ImageClassifier, "segmentation": SegmentationNet, **detection.DETECTORS}
# What rebuilds an image encoder.
ENCODER = ("name", "region_stage", "resize_to", "in_channels", "pooling", "channels_last")


class FineTuned(nn.Module):
    """A classifier, segmentation network or detector with what its use needs.

    Attributes:
        labels: names of the K outputs; empty where an upstream file does not have them.
        thresholds: label -> the probability from which it is called positive, or a pixel or box is kept; by default 0.5
            as in the papers' code, NaN where validation could not choose one.
        config: how images are prepared.
        run_id: of the run that trained it, or "".
        label_fraction: share of the training labels that it saw; 1 where that is not known.
        outputs: which of the network's outputs the labels are.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        labels: Sequence[str] = (),
        thresholds: Mapping[str, float] | None = None,
        config: Pixels | None = None,
        run_id: str = "",
        label_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        self.network, self.labels, self.config = network, tuple(labels), config or Pixels()
        self.run_id, self.label_fraction, self.outputs = run_id, label_fraction, list(range(network.options["classes"]))
        self.thresholds = dict.fromkeys(labels, 0.5) if thresholds is None else dict(thresholds)
        self.eval()

    @property
    def kind(self) -> str:
        """Name of the network, one of `NETWORKS`."""
        return next(name for name, network in NETWORKS.items() if type(self.network) is network)

    @property
    def task(self) -> Task:
        return {"classifier": "classification", "segmentation": "segmentation"}.get(self.kind, "detection")

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the labels. Shape: (B, C, H, W) -> (B, K) or (B, K, H, W)"""
        return self.network(pixels)[:, self.outputs]

    def on(self, data: AnnotatedImages) -> Fitted:
        """What the task makes of this network on the studies of `data`: scores, masks or boxes of any of them.

        Raises ValueError where the images were prepared at another size than those that it was trained on.
        """
        size = self.config.image_size
        if size and size != data.cache.size:
            raise ValueError(
                f"the model was trained on images of {size} pixels and this dataset has {data.cache.size}: prepare it "
                f"again in notebook 01 with image_size {size}"
            )
        if self.task == "classification":
            return Finetuned(self, data)
        if self.task == "detection":
            return detection.TrainedDetector(self.network, data, detection.DetectionConfig(detector=self.kind))
        levels = [np.abs(np.array(THRESHOLDS) - self.thresholds[label]).argmin() for label in self.labels]
        config = segmentation.SegmentationConfig()
        return segmentation.Segmenter(self, data, config, train=data.rows("train"), thresholds=levels)

    def evaluate(
        self,
        data: AnnotatedImages,
        protocol: LabelEfficiency,
        score: Score | None = None,
    ) -> tuple[pd.DataFrame, dict[tuple[float, int], Fitted]]:
        """Score split test without training: rows and fits as `label_efficiency` of the task gives them.

        `score`: of a classifier, from `finetuning.ranking`; masks and boxes have their own.
        """
        fitted = self.on(data)
        rows = protocol.score(data.frame, fitted, score)
        rows = rows.assign(**protocol.columns(self.label_fraction), n_train=0, train_positives=0)
        return rows, {(self.label_fraction, 0): fitted}

    def predict(self, images: Sequence[str | Path | np.ndarray]) -> pd.DataFrame | list[dict[str, np.ndarray]]:
        """What the network says of image files, or of gray arrays (H, W) uint8.

        Images are named by their path, arrays by their number. Raises ImageError naming the file.
        Classification: a row an image and label, with probability, threshold, and positive (NA without a threshold).
        Segmentation: for each image label -> mask (H, W) bool in the pixels of the file.
        Detection: a row a box of at least the threshold, with image, label, score, and x, y, width, height in pixels of
        the file.
        """
        names = [str(number) if isinstance(image, np.ndarray) else str(image) for number, image in enumerate(images)]
        grays = [image if isinstance(image, np.ndarray) else read_gray(image) for image in images]
        size, rows = self.config.image_size or 256, list(range(len(names)))
        geometries = [Geometry.fit(*gray.shape, size) for gray in grays]
        squares = np.stack([geometry.apply(gray) for geometry, gray in zip(geometries, grays, strict=True)])
        cache = SimpleNamespace(size=size, rows=lambda paths: squares[paths], geometry=lambda path: geometries[path])
        frame, config = pd.DataFrame({"study_id": names, "split": "test"}), self.config
        labels = self.labels or tuple(f"output {number}" for number in self.outputs)
        data = AnnotatedImages(frame, labels, tuple(rows), cache, config.crop, config.channels, config.norm)
        if self.task == "segmentation":
            named = FineTuned(self.network, labels=labels, thresholds=self.thresholds or None, config=config)
            data = SegmentationData(**vars(data), packed=np.empty(0), known=np.empty(0))
            masks = named.on(data).masks(rows)
            return [{k: data.on_original(i, m) for k, m in zip(labels, masks[i], strict=True)} for i in rows]
        if self.task == "detection":
            found = []
            for row, boxes in enumerate(self.on(BoxData(**vars(data), truths=())).detect(rows)):
                corners = geometries[row].points_to_original(boxes.boxes.reshape(-1, 2, 2)).reshape(-1, 4)
                for (x1, y1, x2, y2), label, score in zip(corners, boxes.labels, boxes.scores, strict=True):
                    found.append((names[row], labels[label], score, x1, y1, x2 - x1, y2 - y1))
            table = pd.DataFrame(found, columns=["image", "label", "score", "x", "y", "width", "height"])
            return table[table["score"] >= table["label"].map(self.thresholds).fillna(0.0)].reset_index(drop=True)
        chances = 1 / (1 + np.exp(-self.on(data).scores(rows).set_axis(names)))
        table = chances.rename_axis("image").reset_index().melt("image", var_name="label", value_name="probability")
        table["threshold"] = table["label"].map(self.thresholds or dict.fromkeys(labels, 0.5))
        decided = (table["probability"] >= table["threshold"]).astype("boolean")
        return table.assign(positive=decided.mask(table[["probability", "threshold"]].isna().any(axis=1)))


def save(path: str | Path, model: nn.Module, **options: Any) -> Path:
    """Write a pretrained model (`native.save`, with its options), or a fine-tuned one, all or nothing.

    A fine-tuned one is a `FineTuned`, or what `load_img_classification_model`, `load_img_segmentation_model` and
    `load_pretrained` give; `options` of these are fields of `FineTuned`, for instance `labels`.
    """
    if isinstance(model, VisionLanguageModel):
        return native.save(path, model, **options)
    tuned = as_finetuned(model, **options)
    encoder = getattr(tuned.network, "img_encoder", getattr(tuned.network, "encoder", None))
    given = tuned.network.encoder_options if encoder is None else {name: getattr(encoder, name) for name in ENCODER}
    fields = {name: getattr(tuned, name) for name in ("thresholds", "run_id", "label_fraction")}
    fields |= {"labels": list(tuned.labels), "pixels": asdict(tuned.config)}
    kind, options = tuned.kind, tuned.network.options
    return native.write(path, network=kind, encoder=given, options=options, **fields, model=tuned.network.state_dict())


def load(path: str | Path, *, map_location: str | torch.device | None = None) -> VisionLanguageModel | FineTuned:
    """The model of a file written by `save`, in evaluation mode; nothing is fetched from anywhere.

    A `VisionLanguageModel` from notebook 02, or a `FineTuned` from notebooks 04 to 06. `map_location`: the device of
    the model; None is the GPU if there is one, else the CPU.
    Raises WeightsError for a missing, truncated or foreign file, and for tensors that do not fit.
    """
    content = native.read(path)
    if "network" not in content:
        return native.load(path, map_location=map_location)
    with torch.random.fork_rng(devices=[]):  # random values that are overwritten leave no trace
        network = NETWORKS[content["network"]](ImageEncoder(**content["encoder"]), **content["options"])
    fill(network, content["model"], source=str(path))
    fields = {name: content[name] for name in ("labels", "thresholds", "run_id", "label_fraction")}
    tuned = FineTuned(network, config=Pixels(**content["pixels"]), **fields)
    return tuned.to(map_location or ("cuda" if torch.cuda.is_available() else "cpu"))


def as_finetuned(model: nn.Module, **fields: Any) -> FineTuned:
    """An upstream classifier or U-Net, or a network of ours, with `fields` of `FineTuned`.

    Raises WeightsError for a model without a classifier, decoder or detector.
    """
    if isinstance(model, FineTuned):
        return model
    if isinstance(model, smp.Unet):
        weights = model.encoder.state_dict()
        name, channels = (
            network_name({key: tuple(value.shape) for key, value in weights.items()}),
            model.encoder._in_channels,
        )
        encoder = ImageEncoder(name, in_channels=channels, channels_last=False)
        widths = [block.conv2[0].out_channels for block in model.decoder.blocks]
        network = SegmentationNet(encoder, model.segmentation_head[0].out_channels, channels=widths)
        for ours, theirs in ((encoder.trunk, model.encoder), (network.decoder, model.decoder)):
            fill(ours, theirs.state_dict(), source="the U-Net")
        fill(network.head, model.segmentation_head.state_dict(), source="the U-Net")
        return FineTuned(network, **{"config": getattr(model, "pixels", Pixels(channels=channels)), **fields})
    if not isinstance(model, tuple(NETWORKS.values())):
        raise WeightsError(
            f"a {type(model).__name__} has no classifier, decoder or detector: give a pretrained model as `checkpoint`"
        )
    config = getattr(model, "pixels", None) or Pixels(channels=model.img_encoder.in_channels)
    return FineTuned(model, **{"config": config, **fields})


def open_model(
    model: str | Path | nn.Module, task: Task, available: Sequence[str], *, labels: Sequence[str] = (), size: int = 0
) -> FineTuned:
    """A fine-tuned model for a dataset that has the labels `available`, in images of `size` pixels.

    `model`: a file of `save`, a released fine-tuned checkpoint, or a network (see `as_finetuned`). `labels`: those to
    score, by default all of the model; where the file has no names, the names of its outputs in their order.
    An upstream file does not say how large its images were: where these are smaller than its crop, they are used whole.
    Raises WeightsError for a file that cannot be used, ValueError naming the labels that do not match.
    """
    where, given = f"{model}" if isinstance(model, str | Path) else "the model", model
    if isinstance(model, str | Path):
        try:
            given = load(model)
        except WeightsError:
            given = load_pretrained(model)
    tuned = as_finetuned(given)
    if tuned.task != task:
        raise WeightsError(f"{where} is a model for {tuned.task}, not for {task}: use the notebook of that task")
    if not tuned.labels:
        names = tuple(labels) or (tuple(available) if len(available) == 1 else ())
        if len(names) != len(tuned.outputs):
            raise ValueError(
                f"{where} has {len(tuned.outputs)} outputs without names: give their {len(tuned.outputs)} names in "
                f"`labels`, in order, out of: {', '.join(available)}"
            )
        tuned = FineTuned(tuned.network, labels=names, config=tuned.config)
    wanted = tuple(labels) or tuned.labels
    for name in wanted:
        for known, owner in ((tuned.labels, where), (available, "this dataset")):
            if name not in known:
                raise ValueError(
                    f"label {name!r}: {owner} has none of that name.{did_you_mean(name, known)} It has: "
                    f"{', '.join(known)}. Set `labels` to those that both have"
                )
    if task != "detection":
        tuned.outputs, tuned.labels = [tuned.labels.index(name) for name in wanted], wanted
    if size and not tuned.config.image_size:
        tuned.config = replace(tuned.config, crop=min(tuned.config.crop, size))
    return tuned


def keep(
    run: Any, fitted: Fitted, *, label_fraction: float, thresholds: Mapping[str, float] | None = None, name="best"
):
    """Write what a task has fitted to `checkpoints/<name>.pt` of the run (its `folder` and `run_id`); the path."""
    data, network = fitted.data, fitted.network
    if isinstance(fitted, segmentation.Segmenter):
        thresholds = {label: THRESHOLDS[k] for label, k in zip(data.labels, fitted.thresholds, strict=True)}
    elif isinstance(fitted, detection.TrainedDetector):
        thresholds = dict.fromkeys(data.labels, network.score_threshold)
    config = Pixels(data.channels, data.norm, data.crop, data.cache.size)
    if isinstance(network, FineTuned):
        network = network.network
    fields = {"labels": data.labels, "thresholds": thresholds, "config": config, "label_fraction": label_fraction}
    return save(Path(run.folder) / "checkpoints" / f"{name}.pt", FineTuned(network, run_id=run.run_id, **fields))
