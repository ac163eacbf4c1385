"""What a layout says of a file, and what several layouts read from names and shapes in the same way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from gloria_core.checkpoints.model import ConfigError, ModelConfig, assemble
from gloria_core.models.key_maps import Named, Shapes, count, network_name, timm_names

# Of every published BERT; the number of heads cannot be read from shapes.
HEAD_WIDTH = 64
TRUNK, BERT = "image_encoder.trunk.", "text_encoder.bert."
# Regular expressions for the start of their names -> the start of ours, or None for a tensor that has no place.
Rules = Iterable[tuple[str, str | None]]


@dataclass(frozen=True)
class Translation:
    """A published file in our terms.

    `tensors`: our name -> (their name, tensor in our shape). `ignored`: their names that have no place in the model,
    each for a reason that the layout's file states. `origin`: name of the format.
    """

    origin: str
    config: ModelConfig
    text: BertConfig
    tensors: Named
    ignored: list[str]

    def build(self, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """The model with random values."""
        return assemble(self.config, self.text, tokenizer)


@dataclass(frozen=True)
class ImageTranslation:
    """A published file without a text encoder. `network` makes what it holds, with random values.

    `origin`, `tensors`, `ignored`: as in `Translation`.
    """

    origin: str
    network: Callable[[], nn.Module]
    tensors: Named
    ignored: list[str]

    def build(self, tokenizer: PreTrainedTokenizerBase | None) -> nn.Module:
        """The model with random values. Raises ConfigError for a tokenizer, which nothing here could use."""
        if tokenizer is not None:
            raise ConfigError("it has no text encoder, so a tokenizer is of no use to it")
        return self.network()


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> tuple[Named, list[str]]:
    """Tensors under our names by the first rule that fits, and their names of those that have no place.

    A name that no rule fits is kept: it will be reported as unexpected. The image encoder's names become timm's. A 1x1
    convolution of an objective becomes the weight of a Linear over channels.
    """
    named, trunk, ignored = {}, {}, []
    for theirs, value in tensors.items():
        pattern, ours = next(((p, new) for p, new in rules if re.match(p, theirs)), ("", ""))
        if ours is None:
            ignored.append(theirs)
            continue
        name = re.sub(f"^(?:{pattern})", ours, theirs)
        if name.startswith(TRUNK):
            trunk[name.removeprefix(TRUNK)] = (theirs, value)
        elif name.startswith("objective.") and value.ndim > 2 and value.shape[2:].numel() == 1:
            named[name] = (theirs, value.flatten(1))
        else:
            named[name] = (theirs, value)
    trunk, unused = timm_names(trunk)
    return named | {f"{TRUNK}{name}": pair for name, pair in trunk.items()}, ignored + unused


def shapes_of(named: Named, prefix: str = "") -> Shapes:
    """Our names, without the prefix that they begin with -> shapes."""
    return {name.removeprefix(prefix): tuple(v.shape) for name, (_, v) in named.items() if name.startswith(prefix)}


def image_encoder_name(named: Named) -> str:
    """Which network the image encoder is. Raises WeightsError for one that is not supported."""
    return network_name(shapes_of(named, TRUNK))


def bert_architecture(named: Named, *, token_types: int | None = None) -> BertConfig:
    """Configuration of the text encoder, read from the shapes of its tensors.

    `token_types`: their number where the file has no table of them.
    """
    shapes = shapes_of(named, BERT)
    vocabulary, width = shapes["embeddings.word_embeddings.weight"]
    if width % HEAD_WIDTH:
        raise ConfigError(f"a BERT of width {width} has no heads of width {HEAD_WIDTH}")
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=count(shapes, "encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=shapes["encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes["embeddings.position_embeddings.weight"][0],
        type_vocab_size=token_types or shapes["embeddings.token_type_embeddings.weight"][0],
    )
