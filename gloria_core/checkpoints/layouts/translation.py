"""What a layout says of a file, and what several layouts read from shapes in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from gloria_core.checkpoints.image_models import image_classifier, unet
from gloria_core.checkpoints.model import ConfigError, ModelConfig, assemble
from gloria_core.models.image_encoder import ImageEncoder

Shapes = Mapping[str, tuple[int, ...]]
HEAD_WIDTH = 64
"""Of every published BERT; the number of heads cannot be read from shapes."""


@dataclass(frozen=True)
class Translation:
    """A foreign file in our terms.

    `tensors`: our name -> (their name, tensor in our shape). `ignored`: their names that have no place in the model,
    each for a reason that the layout's file states.
    """

    config: ModelConfig
    text: BertConfig
    tensors: dict[str, tuple[str, Tensor]]
    ignored: list[str] = field(default_factory=list)

    def build(self, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """The model with random values."""
        return assemble(self.config, self.text, tokenizer)


@dataclass(frozen=True)
class ImageTranslation:
    """A foreign file without a text encoder: an `ImageEncoder`, one with a linear head, or a U-Net.

    `encoder`, `region_stage`, `resize_to`, `in_channels`, `pooling`: see `ImageEncoder`.
    `kind`: "encoder", "classifier" (of `classes` logits) or "unet" (of `classes` masks).
    `tensors`, `ignored`: as in `Translation`.
    """

    encoder: str
    tensors: dict[str, tuple[str, Tensor]]
    ignored: list[str] = field(default_factory=list)
    kind: Literal["encoder", "classifier", "unet"] = "encoder"
    classes: int = 0
    region_stage: str = "layer3"
    resize_to: int | None = None
    in_channels: int = 3
    pooling: str = "default"

    def build(self, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """The model with random values. Raises ConfigError for a tokenizer, which nothing here could use."""
        if tokenizer is not None:
            raise ConfigError("it has no text encoder, so a tokenizer is of no use to it")
        if self.kind == "unet":
            return unet(self.encoder, in_channels=self.in_channels, classes=self.classes)
        encoder = ImageEncoder(
            self.encoder,
            region_stage=self.region_stage,
            resize_to=self.resize_to,
            in_channels=self.in_channels,
            pooling=self.pooling,
            channels_last=False,  # published numbers before speed
        )
        return image_classifier(encoder, self.classes) if self.kind == "classifier" else encoder


def bert_architecture(shapes: Shapes, prefix: str, **changes: int) -> BertConfig:
    """Configuration of the BERT whose tensors begin with `prefix`, read from their shapes.

    `changes` stand in for what a file does not show, such as `type_vocab_size` where there are no token types.
    """
    vocabulary, width = shapes[f"{prefix}embeddings.word_embeddings.weight"]
    if width % HEAD_WIDTH:
        raise ConfigError(f"a BERT of width {width} has no heads of width {HEAD_WIDTH}")
    types = f"{prefix}embeddings.token_type_embeddings.weight"
    found = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": count(shapes, f"{prefix}encoder.layer."),
        "num_attention_heads": width // HEAD_WIDTH,
        "intermediate_size": shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0],
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embeddings.weight"][0],
        "type_vocab_size": changes.get("type_vocab_size") or shapes[types][0],
    }
    return BertConfig(**{**found, **changes})


def resnet_name(shapes: Shapes, prefix: str) -> str:
    """Which ResNet of torchvision has the tensors that begin with `prefix`. Raises ConfigError for another one."""
    stages = tuple(count(shapes, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = f"{prefix}layer1.0.conv3.weight" in shapes
    known = {(False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50"}
    if (bottleneck, stages) not in known:
        kind = "bottleneck" if bottleneck else "basic"
        raise ConfigError(f"its image encoder has {stages} {kind} blocks a stage: no ResNet-18, -34 or -50")
    return known[bottleneck, stages]


def count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})
