"""One pretrained model: two encoders, an objective, a tokenizer, and the plain record that rebuilds them."""

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Any, Literal

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from gloria_core import objectives
from gloria_core.data.dataset import Collate
from gloria_core.data.files import did_you_mean
from gloria_core.data.images import Norm
from gloria_core.models.image_encoder import ImageEncoder, Pooling, RegionStage
from gloria_core.models.text_encoder import PRESETS, Aggregate, Positions, TextEncoder, preset_config
from gloria_core.types import Batch, Behavior, ImageFeatures, ObjectiveOutput, TextBatch, TextFeatures


class ConfigError(ValueError):
    """A model configuration has an unknown, missing or ill-typed field; the message names it."""


# Names of untrained models: GLoRIA with random values, and with its image weights alone.
BASELINES = ("random", "imagenet")


@dataclass(frozen=True, config=ConfigDict(strict=True))
class ModelConfig:
    """Everything that rebuilds a model, in JSON's types. The defaults are the phantom study on two CPU cores.

    `objective`, `objective_options`: a name of `gloria_core.objectives.available()` and its options.
    `image_encoder`, `image_weights`, `region_stage`, `resize_to`, `image_pooling`: see `ImageEncoder`.
    `text_encoder`: a preset ("phantom"), a Hugging Face id, a folder, or "package:<name>".
    `text_weights`: "auto" (random for a preset, pretrained for all others), "random", "pretrained", or a file.
    `last_layers`, `text_layers`, `text_pieces`, `text_norm`, `text_dropout`, `text_depth`, `text_positions`: see
    `TextEncoder`.
    `frozen_image`; `frozen_text_layers`: n first layers, -1 for all.
    `image_size`: side in pixels of the padded square in the image cache; `crop`: side of what the encoder is given.
    `channels`, `norm`, `max_tokens`, `text_section`: how the loader makes a batch.
    Raises pydantic's ValidationError, a ValueError, naming the field.
    """

    objective: str = "gloria"
    objective_options: dict[str, Any] = field(default_factory=dict)
    behavior: Behavior = "corrected"
    image_encoder: str = "resnet18"
    image_weights: str = "random"
    region_stage: RegionStage = "layer3"
    resize_to: int | None = None
    image_pooling: Pooling = "default"
    frozen_image: bool = False
    text_encoder: str = "phantom"
    text_weights: str = "auto"
    last_layers: int = 4
    text_layers: Aggregate = "sum"
    text_pieces: Aggregate = "sum"
    text_norm: bool = False
    text_dropout: float = 0.1
    text_depth: int = 0
    text_positions: Positions = "real"
    frozen_text_layers: int = 0
    image_size: int = 128
    crop: int = 128
    channels: Literal[1, 3] = 3
    norm: Norm = "half"
    max_tokens: int = 97
    text_section: Literal["impression", "findings", "both"] = "impression"
    seed: int = 0

    def __post_init__(self) -> None:
        known = objectives.available()
        if self.objective not in known:
            near = did_you_mean(self.objective, known)
            raise ValueError(f"objective must be one of {', '.join(known)}; got {self.objective!r}.{near}")
        if "behavior" in self.objective_options:
            raise ValueError('objective_options must not hold "behavior": it is a field of its own')
        if not 0 < self.crop <= self.image_size:
            raise ValueError(f"crop must be 1 to image_size = {self.image_size}, got {self.crop}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Inverse of `to_dict`; absent fields keep their defaults.

        Raises ConfigError for an unknown name (with the nearest valid one) and for a value of the wrong type.
        """
        known = [known.name for known in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown field {name!r}.{did_you_mean(name, known, cutoff=0)}")
        try:
            return cls(**values)
        except ValidationError as error:
            faults = [(".".join(map(str, f["loc"])), f["msg"], f["input"]) for f in error.errors()]
            told = [f"field {name!r}: {message}, got {value!r}" if name else message for name, message, value in faults]
            raise ConfigError("; ".join(told)) from error


def paper_config(objective: str, settings: Mapping[str, Any]) -> ModelConfig:
    """The settings of a paper (`Objective.encoders`) with those of a study, which are fields of `ModelConfig` by name.

    `objective`: also one of `BASELINES`, for which `objective_options` are left out. What is empty or 0 in `settings`
    takes the paper's value, else the default. The small preset text encoder is trained without dropout, because short
    runs of it underfit. Raises ConfigError.
    """
    method = "gloria" if objective in BASELINES else objective
    values = dict(objectives.objective_class(method).encoders)
    values |= {name: value for name, value in settings.items() if value}
    if objective in BASELINES:
        values["objective_options"] = {}
    if objective == "random":
        values |= {"image_weights": "random", "text_weights": "random"}
    if values.get("text_encoder") in PRESETS:
        values["text_dropout"] = 0.0
    return ModelConfig.from_dict({"objective": method, **values})


class VisionLanguageModel(nn.Module):
    """Encoders and objective, called as one: `model(batch).total.backward()`.

    `tokenizer` may be None (published weights without their vocabulary): texts must then come as token ids.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        objective: objectives.Objective,
        *,
        config: ModelConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.objective = image_encoder, text_encoder, objective
        self.config, self.tokenizer = config, tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def collate(self) -> Collate:
        """Items -> Batch, with the tokenizer and as many channels and word pieces as this model takes."""
        config = self.config
        return Collate(self.tokenizer, channels=config.channels, norm=config.norm, max_tokens=config.max_tokens)

    def encode_images(self, pixels: Tensor) -> ImageFeatures:
        """Features of B images; views are flattened, study by study.

        Shape: pixels (B, C, H, W) or (B, V, C, H, W), the latter gives B * V images
        """
        return self.image_encoder(pixels.flatten(0, 1) if pixels.ndim == 5 else pixels)

    def encode_texts(self, texts: TextBatch) -> TextFeatures:
        """Features of N texts."""
        return self.text_encoder(texts)

    def forward(self, batch: Batch) -> ObjectiveOutput:
        """Loss of a batch."""
        return self.objective(self.encode_images(batch.pixels), self.encode_texts(batch.text), batch)


def build_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> VisionLanguageModel:
    """A new model, with pretrained encoders where the configuration asks for them.

    Initial values depend on `config.seed` alone; the global random state is left as it was.
    Raises ConfigError, WeightsError, or TypeError for an unknown option of the objective.
    """
    source, weights = config.text_encoder, config.text_weights
    if source in PRESETS:
        if tokenizer is None:
            raise ConfigError(f"text encoder {source!r} takes its vocabulary from a tokenizer, and got none")
        source = preset_config(source, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id or 0)
    if weights == "auto":
        weights = "pretrained" if isinstance(source, str) else "random"
    return assemble(config, source, tokenizer, image_weights=config.image_weights, text_weights=weights)


def assemble(
    config: ModelConfig,
    text_source: BertConfig | str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    image_weights: str = "random",
    text_weights: str = "random",
) -> VisionLanguageModel:
    """The model of `config` on a given text architecture; loading a checkpoint starts from here, with random values."""
    needs = objectives.objective_class(config.objective).needs
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(config.seed)
        image_encoder = ImageEncoder(
            config.image_encoder,
            weights=image_weights,
            region_stage=config.region_stage,
            resize_to=config.resize_to,
            in_channels=config.channels,
            frozen=config.frozen_image,
            cls_attention=needs.cls_attention,
            pooling=config.image_pooling,
            channels_last=config.behavior != "published",  # published numbers before speed
        )
        options = ("layers", "pieces", "norm", "dropout", "depth", "positions")
        text_encoder = TextEncoder(
            text_source,
            weights=text_weights,
            last_layers=config.last_layers,
            frozen=True if config.frozen_text_layers < 0 else config.frozen_text_layers,
            attentions=needs.token_attention,
            pooler=needs.sentence,
            behavior=config.behavior,
            **{name: getattr(config, f"text_{name}") for name in options},
        )
        objective = objectives.build(
            config.objective,
            pooled_dim=image_encoder.pooled_dim,
            region_dim=image_encoder.region_dim,
            text_dim=text_encoder.dim,
            behavior=config.behavior,
            **config.objective_options,
        )
    if tokenizer is not None and len(tokenizer) > text_encoder.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} entries, the text encoder {text_encoder.config.vocab_size}: "
            "they do not belong together"
        )
    return VisionLanguageModel(image_encoder, text_encoder, objective, config=config, tokenizer=tokenizer)
