"""Fine-tuned networks that are ready to use: what notebooks 04 to 06 write as best.pt, and upstream ones.

    tuned = gloria_core.load("results/runs/quickstart/<run>/checkpoints/best.pt")
    tuned.predict(["a.png", "b.dcm"])

`save` and `load` are `gloria_core.save` and `gloria_core.load`; they take pretrained models too. `open_model` takes
upstream files and networks as well, and `FineTuned.evaluate` scores any of them on the test split of a dataset.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from gloria_core.checkpoints import native
from gloria_core.checkpoints.image_models import ImageClassifier
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.files import did_you_mean
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import Norm, read_gray
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.key_maps import network_name
from gloria_core.models.segmentation import SegmentationNet
from gloria_core.models.weights import WeightsError, fill
from gloria_core.tasks.annotated_images import AnnotatedImages
from gloria_core.tasks.classification.finetuning import TrainedClassifier
from gloria_core.tasks.detection import training as detection
from gloria_core.tasks.detection.data import BoxData
from gloria_core.tasks.label_efficiency import LabelEfficiency, Score
from gloria_core.tasks.segmentation import training as segmentation
from gloria_core.tasks.segmentation.data import SegmentationData
from gloria_core.tasks.segmentation.metrics import THRESHOLDS

Fitted = TrainedClassifier | segmentation.Segmenter | detection.TrainedDetector
NETWORKS = {"classification": ImageClassifier, "segmentation": SegmentationNet, **detection.DETECTORS}
# What rebuilds an image encoder.
ENCODER = ("name", "region_stage", "resize_to", "in_channels", "pooling", "channels_last")


@dataclass(frozen=True)
class Use:
    """How a network is used. The defaults are those of upstream files, which do not say; images are as GLoRIA's.

    Attributes:
        labels: names of the K outputs; empty where they are not known.
        thresholds: label -> the probability from which it is called positive, or a pixel or box is kept; 0.5 for a
            label that is not here, NaN where validation could not choose one.
        channels, norm: format of the pixels, see `to_tensor`.
        crop: side of the centre crop in pixels.
        image_size: side of the padded square that is cropped; 0 where it is not known.
        run_id: of the run that trained the network.
        label_fraction: share of the training labels that it saw.
    """

    labels: Sequence[str] = ()
    thresholds: Mapping[str, float] = field(default_factory=dict)
    channels: int = 3
    norm: Norm = "half"
    crop: int = 224
    image_size: int = 0
    run_id: str = ""
    label_fraction: float = 1.0


class FineTuned(nn.Module):
    """A classifier, segmentation network or detector with what its use needs, in evaluation mode.

    Attributes:
        config: the `Use`.
        labels, thresholds: of the outputs, all of them.
        outputs: which of the network's outputs these are.
    """

    def __init__(self, network: nn.Module, use: Use | None = None) -> None:
        super().__init__()
        self.network, self.config, self.outputs = network, use or Use(), list(range(network.options["classes"]))
        self.labels = tuple(self.config.labels) or tuple(f"output {number}" for number in self.outputs)
        self.thresholds = dict.fromkeys(self.labels, 0.5) | dict(self.config.thresholds)
        self.eval()

    @property
    def kind(self) -> str:
        """Name of the network, one of `NETWORKS`."""
        return next(name for name, network in NETWORKS.items() if type(self.network) is network)

    @property
    def task(self) -> str:
        """ "classification", "segmentation" or "detection"."""
        return "detection" if self.kind in detection.DETECTORS else self.kind

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits of the labels. Shape: (B, C, H, W) -> (B, K) or (B, K, H, W)"""
        return self.network(pixels)[:, self.outputs]

    def on(self, data: AnnotatedImages) -> Fitted:
        """What the task makes of this network on the studies of `data`: scores, masks or boxes of any of them.

        Raises ValueError where the images were prepared at another size than those that it was trained on.
        """
        size = self.config.image_size
        if size not in (0, data.cache.size):
            raise ValueError(
                f"the model was trained on images of {size} pixels and this dataset has {data.cache.size}: prepare it "
                f"again in notebook 01 with image_size {size}"
            )
        if self.task == "classification":
            return TrainedClassifier(self, data)
        if self.task == "detection":
            return detection.TrainedDetector(self.network, data, detection.DetectionConfig(detector=self.kind))
        levels = [np.abs(np.array(THRESHOLDS) - self.thresholds[label]).argmin() for label in self.labels]
        config = segmentation.SegmentationConfig()
        return segmentation.Segmenter(self, data, config, train=data.rows("train"), thresholds=levels)

    def evaluate(
        self, data: AnnotatedImages, protocol: LabelEfficiency, score: Score | None = None
    ) -> tuple[pd.DataFrame, dict[tuple[float, int], Fitted]]:
        """Score split test without training: rows and fits as `label_efficiency` of the task gives them.

        `score`: of a classifier, from `finetuning.ranking`; masks and boxes have their own.
        """
        fitted, fraction = self.on(data), self.config.label_fraction
        rows = protocol.score(data.frame, fitted, score).assign(n_train=0, train_positives=0)
        return rows.assign(**protocol.columns(fraction)), {(fraction, 0): fitted}

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
        config, size, rows = self.config, self.config.image_size or 256, list(range(len(names)))
        places = [Geometry.fit(*gray.shape, size) for gray in grays]
        squares = np.stack([place.apply(gray) for place, gray in zip(places, grays, strict=True)])
        cache = SimpleNamespace(size=size, rows=squares.__getitem__, geometry=places.__getitem__)
        frame, labels = pd.DataFrame({"study_id": names, "split": "test"}), np.array(self.labels)
        data = AnnotatedImages(frame, self.labels, tuple(rows), cache, config.crop, config.channels, config.norm)
        if self.task == "segmentation":
            data = SegmentationData(**vars(data), packed=np.empty(0), known=np.empty(0))
            masks = self.on(data).masks(rows)
            return [{k: data.on_original(i, m) for k, m in zip(labels, masks[i], strict=True)} for i in rows]
        if self.task == "detection":
            tables = []
            found = self.on(BoxData(**vars(data), truths=())).detect(rows)
            for name, place, boxes in zip(names, places, found, strict=True):
                low, high = place.points_to_original(boxes.boxes.reshape(-1, 2, 2)).swapaxes(0, 1)
                columns = dict(zip(("x", "y", "width", "height"), np.hstack([low, high - low]).T, strict=True))
                columns = {"image": name, "label": labels[boxes.labels], "score": boxes.scores, **columns}
                tables.append(pd.DataFrame(columns))
            table = pd.concat(tables)
            return table[table["score"] >= table["label"].map(self.thresholds)].reset_index(drop=True)
        chances = self.on(data).probabilities(rows).set_axis(names).rename_axis("image").reset_index()
        table = chances.melt("image", var_name="label", value_name="probability")
        table["threshold"] = table["label"].map(self.thresholds)
        positive = (table["probability"] >= table["threshold"]).astype("boolean")
        return table.assign(positive=positive.mask(table[["probability", "threshold"]].isna().any(axis=1)))


def save(path: str | Path, model: nn.Module, **options: Any) -> Path:
    """Write a pretrained model (`native.save`, with its options), or a fine-tuned one, all or nothing.

    A fine-tuned one is a `FineTuned`, or what `load_img_classification_model`, `load_img_segmentation_model` and
    `load_pretrained` give; `options` of these are fields of `Use`, for instance `labels`.
    """
    if isinstance(model, VisionLanguageModel):
        return native.save(path, model, **options)
    tuned = as_finetuned(model, **options)
    encoder = getattr(tuned.network, "img_encoder", getattr(tuned.network, "encoder", None))
    return native.write(
        path,
        network=tuned.kind,
        encoder={name: getattr(encoder, name) for name in ENCODER} if encoder else tuned.network.encoder_options,
        options=tuned.network.options,
        use=asdict(tuned.config),
        model=tuned.network.state_dict(),
    )


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
    tuned = FineTuned(network, Use(**content["use"]))
    return tuned.to(map_location or ("cuda" if torch.cuda.is_available() else "cpu"))


def as_finetuned(model: nn.Module, **fields: Any) -> FineTuned:
    """An upstream classifier or U-Net, or a network of ours, with `fields` of `Use`.

    Raises WeightsError for a model without a classifier, decoder or detector.
    """
    if isinstance(model, FineTuned):
        return model
    use = Use(**{**getattr(model, "pixels", {}), **fields})
    if isinstance(model, smp.Unet):
        name = network_name({key: tuple(value.shape) for key, value in model.encoder.state_dict().items()})
        encoder = ImageEncoder(name, in_channels=model.encoder.conv1.in_channels, channels_last=False)
        widths = [block.conv2[0].out_channels for block in model.decoder.blocks]
        theirs, model = model, SegmentationNet(encoder, model.segmentation_head[0].out_channels, channels=widths)
        for ours, part in ((encoder.trunk, "encoder"), (model.decoder, "decoder"), (model.head, "segmentation_head")):
            fill(ours, getattr(theirs, part).state_dict(), source="the U-Net")
    if not isinstance(model, tuple(NETWORKS.values())):
        raise WeightsError(
            f"a {type(model).__name__} has no classifier, decoder or detector: give a pretrained model as `checkpoint`"
        )
    encoder = getattr(model, "img_encoder", getattr(model, "encoder", None))
    return FineTuned(model, replace(use, channels=encoder.in_channels) if encoder else use)


def open_model(
    model: str | Path | nn.Module, task: str, available: Sequence[str], *, labels: Sequence[str] = (), size: int = 0
) -> FineTuned:
    """A fine-tuned model for a dataset that has the labels `available`, in images of `size` pixels.

    `model`: a file of `save`, a released fine-tuned checkpoint, or a network (see `as_finetuned`). `labels`: those to
    score, by default all of the model; where the file has no names, the names of its outputs in their order.
    An upstream file does not say how large its images were: where these are smaller than its crop, they are used whole,
    with a warning.
    It is put on the GPU if there is one.
    Raises WeightsError for a file that cannot be used, ValueError naming the labels that do not match.
    """
    where = f"{model}" if isinstance(model, str | Path) else "the model"
    if isinstance(model, str | Path):
        try:
            model = load(where)
        except WeightsError:
            model = load_pretrained(where)
    tuned = as_finetuned(model)
    if tuned.task != task:
        raise WeightsError(f"{where} is a model for {tuned.task}, not for {task}: use the notebook of that task")
    use, count = tuned.config, len(tuned.outputs)
    names = tuple(labels) or (tuple(available) if len(available) == 1 else ())
    if not use.labels and len(names) != count:
        raise ValueError(
            f"{where} has {count} outputs without names: give their {count} names in `labels`, in order, out of: "
            f"{', '.join(available)}"
        )
    if 0 < size < use.crop and not use.image_size:
        warnings.warn(f"{where} expects {use.crop} pixels; the {size} of these images are used whole", stacklevel=2)
        use = replace(use, crop=size)
    tuned = FineTuned(tuned.network, use if use.labels else replace(use, labels=names))
    wanted = tuple(labels) or tuned.labels
    for name, known, owner in [(n, *o) for n in wanted for o in ((tuned.labels, where), (available, "this dataset"))]:
        if name not in known:
            raise ValueError(
                f"label {name!r}: {owner} has none of that name.{did_you_mean(name, known)} It has {', '.join(known)}; "
                "set `labels` to those that both have"
            )
    if task != "detection":  # a detector's rows of other classes say that there is no box
        tuned.outputs, tuned.labels = [tuned.labels.index(name) for name in wanted], wanted
    return tuned.to("cuda" if torch.cuda.is_available() else "cpu")


def keep(
    run: Any,
    fitted: Fitted,
    *,
    label_fraction: float,
    thresholds: Mapping[str, float] | None = None,
    name: str = "best",
) -> Path:
    """Write what a task has fitted to `checkpoints/<name>.pt` of the run (its `folder` and `run_id`); the path."""
    data, network = fitted.data, getattr(fitted.network, "network", fitted.network)
    if isinstance(fitted, segmentation.Segmenter):
        thresholds = {label: THRESHOLDS[k] for label, k in zip(data.labels, fitted.thresholds, strict=True)}
    elif isinstance(fitted, detection.TrainedDetector):
        thresholds = dict.fromkeys(data.labels, network.score_threshold)
    images = {"channels": data.channels, "norm": data.norm, "crop": data.crop, "image_size": data.cache.size}
    about = {"labels": data.labels, "thresholds": thresholds, "run_id": run.run_id, "label_fraction": label_fraction}
    return save(Path(run.folder) / "checkpoints" / f"{name}.pt", network, **images, **about)
