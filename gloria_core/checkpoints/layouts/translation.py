"""What a layout says of a file, and what several layouts read from shapes in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import BertConfig

from gloria_core.checkpoints.model import ConfigError, ModelConfig

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
