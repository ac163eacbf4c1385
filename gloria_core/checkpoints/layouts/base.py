"""What a layout says of a file, and what several layouts read from names and shapes in the same way."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig

from gloria_core.checkpoints.model import ConfigError, ModelConfig, assemble
from gloria_core.models.key_maps import Named, Shapes, count, network_name, timm_names

# Of every published BERT; the number of heads cannot be read from shapes.
HEAD_WIDTH = 64
TRUNK, BERT = "image_encoder.trunk.", "text_encoder.bert."
CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"
# Regular expressions for the start of their names -> the start of ours, or None for a tensor that has no place.
Rules = Iterable[tuple[str, str | None]]
# The configuration that a file holds, as plain values.
Stored = Mapping[str, Any]


@dataclass(frozen=True)
class Translation:
    """A published file in our terms.

    Attributes:
        origin: name of the format
        network: makes what the file holds, with random values; it takes a tokenizer where it reads texts
        tensors: our name -> (their name, tensor in our shape)
        ignored: their names that have no place in the model, each for a reason that the layout's file states
        reads_texts: whether there is a text encoder
    """

    origin: str
    network: Callable[..., nn.Module]
    tensors: Named
    ignored: list[str]
    reads_texts: bool = False


@dataclass(frozen=True)
class Layout:
    """One format.

    Attributes:
        name: what people call it, for messages
        recognise: whether the tensors of a file (names -> shapes) and its stored configuration are of this layout, from
            names that no other layout has
        translate: the architecture to build and the place of every tensor; raises KeyError for a tensor that the
            architecture cannot be read without, and ValueError for one that is not supported
    """

    name: str
    recognise: Callable[[Shapes, Stored], bool]
    translate: Callable[[Mapping[str, Tensor], Stored], Translation]


def whole_model(
    name: str,
    marks: Iterable[str],
    rules: Callable[[Iterable[str], Stored], Rules],
    config: Callable[[Named, Stored], dict[str, Any]],
    *,
    origin: Callable[[Stored], str] | None = None,
    without_types: str = "",
) -> Layout:
    """The layout of image encoder, text encoder and objective together.

    Each of `marks`, regular expressions, fits the start of a tensor's name. `rules` are made from their names and the
    stored configuration, `config` from our tensors: the fields of `ModelConfig` that differ between layouts. `origin`:
    where the name of the format depends on the file. `without_types`: why the text encoder has no table of token types;
    it is then two rows of zeros.
    """

    def translate(tensors: Mapping[str, Tensor], stored: Stored) -> Translation:
        named, ignored = renamed(tensors, rules(tensors, stored))
        if without_types:
            width = named[f"{BERT}embeddings.word_embeddings.weight"][1].shape[1]
            named[f"{BERT}embeddings.token_type_embeddings.weight"] = (without_types, torch.zeros(2, width))
        common = {"behavior": "published", "image_encoder": image_encoder_name(named), "text_encoder": CLINICAL_BERT}
        model = ModelConfig.from_dict({**common, **config(named, stored)})
        network = partial(assemble, model, bert_architecture(named))
        return Translation(origin(stored) if origin else name, network, named, ignored, reads_texts=True)

    def recognise(shapes: Shapes, stored: Stored) -> bool:
        return all(any(re.match(mark, theirs) for theirs in shapes) for mark in marks)

    return Layout(name, recognise, translate)


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


def bert_architecture(named: Named) -> BertConfig:
    """Configuration of the text encoder, read from the shapes of its tensors."""
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
        type_vocab_size=shapes["embeddings.token_type_embeddings.weight"][0],
    )
