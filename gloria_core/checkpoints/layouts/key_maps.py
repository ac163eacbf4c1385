"""How torchvision, timm and transformers name the tensors of the image networks, and what we call them.

Our ResNets and DenseNet are torchvision's, our ViTs timm's, our Swin is transformers 5's.

What a layout says of a file, and what several layouts read from shapes in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedTokenizerBase

from gloria_core.checkpoints.image_models import image_classifier, unet
from gloria_core.checkpoints.model import ConfigError, ModelConfig, assemble
from gloria_core.models.backbones.densenet import OLD_NAME
from gloria_core.models.backbones.swin import new_name
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


Named = Mapping[str, tuple[str, Tensor]]
"""Name within the network -> (name in the file, tensor)."""
Rules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Dialect:
    """How one library names a family. The first of `anchors` is the layer that reads the pixels."""

    anchors: tuple[str, ...]
    encoder: Callable[[Shapes], str]
    rules: Rules = ()
    arrange: Callable[[dict[str, tuple[str, Tensor]]], dict[str, tuple[str, Tensor]]] | None = None


def dialect_of(shapes: Shapes) -> Dialect | None:
    """The dialect of a network's tensors, without a prefix; None for an unknown one."""
    return next((found for found in DIALECTS if all(name in shapes for name in found.anchors)), None)


# ------------------------------------------------------------------------------------------------- which network


def _resnet(shapes: Shapes) -> str:
    if shapes["conv1.weight"][0] == 16:
        return "resnet_tiny"
    return resnet_name(shapes, "")


def _huggingface_resnet(shapes: Shapes) -> str:
    stages = tuple(count(shapes, f"encoder.stages.{stage}.layers.") for stage in range(4))
    deep = "encoder.stages.0.layers.0.layer.2.convolution.weight" in shapes
    known = {(False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50"}
    return _one_of(known, (deep, stages), "ResNet")


def _densenet(shapes: Shapes) -> str:
    layers = tuple(
        len({name.split(".")[2] for name in shapes if name.startswith(f"features.denseblock{block}.denselayer")})
        for block in (1, 2, 3, 4)
    )
    return _one_of({(6, 12, 24, 16): "densenet121"}, layers, "DenseNet")


def _efficientnet(shapes: Shapes) -> str:
    squeezes = any(".se." in name for name in shapes)
    return _one_of(
        {(1280, 320, False): "efficientnet_lite0"}, (*shapes["conv_head.weight"][:2], squeezes), "EfficientNet"
    )


def _vit(first: str, blocks: str) -> Callable[[Shapes], str]:
    def name(shapes: Shapes) -> str:
        width, _, patch, _ = shapes[first]
        known = {
            (192, 16, 12): "vit_tiny_patch16",
            (384, 16, 12): "vit_small_patch16",
            (768, 16, 12): "vit_base_patch16",
        }
        found = max(count(shapes, prefix) for prefix in blocks.split("|"))
        return _one_of(known, (width, patch, found), "ViT")

    return name


def _swin(first: str, stages: tuple[str, ...]) -> Callable[[Shapes], str]:
    def name(shapes: Shapes) -> str:
        depths = tuple(count({n: s for n, s in shapes.items() if ".norm" in n or "layernorm" in n}, p) for p in stages)
        return _one_of({(96, 4, (2, 2, 6, 2)): "swin_tiny"}, (*shapes[first][0:4:2], depths), "Swin")

    return name


def _one_of(known: Mapping[Any, str], found: object, family: str) -> str:
    if found not in known:
        raise ConfigError(
            f"its {family} has the sizes {found}; known: {', '.join(f'{v} {k}' for k, v in known.items())}"
        )
    return known[found]


# -------------------------------------------------------------------------------------------------- rearrangements


def _joined(named: Named) -> dict[str, tuple[str, Tensor]]:
    """Query, key and value of each attention as the one matrix of timm."""
    result = {}
    for name, (theirs, value) in named.items():
        part = re.search(r"\.attn\.([qkv])\.", name)
        if part is None:
            result[name] = (theirs, value)
        elif part[1] == "q":
            others = [named[name.replace(".attn.q.", f".attn.{other}.")][1] for other in "kv"]
            result[name.replace(".attn.q.", ".attn.qkv.")] = (
                f"{theirs} (with key and value)",
                torch.cat([value, *others]),
            )
    return result


def _separated(named: Named) -> dict[str, tuple[str, Tensor]]:
    """The one matrix of attention as query, key and value of transformers."""
    result = {}
    for name, (theirs, value) in named.items():
        if ".attention.qkv." not in name:
            result[name] = (theirs, value)
            continue
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            result[name.replace(".qkv.", f".{letter}_proj.")] = (theirs, part)
    return result


def _timm_swin(named: Named) -> dict[str, tuple[str, Tensor]]:
    """timm merges patches at the start of a stage since its version 0.9, transformers at the end of the one before."""
    early = "encoder.layers.0.downsample.reduction.weight" not in named
    moved = {}
    for name, pair in named.items():
        found = re.match(r"encoder\.layers\.(\d)\.(downsample\..*)", name)
        moved[f"encoder.layers.{int(found[1]) - 1}.{found[2]}" if found and early else name] = pair
    return _separated(moved)


# -------------------------------------------------------------------------------------------------------- dialects

_HUGGINGFACE_RESNET: Rules = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{stage}\.layers\.", f"layer{stage + 1}.") for stage in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{step}\.convolution\.", f".conv{step + 1}.") for step in range(3)),
    *((rf"\.layer\.{step}\.normalization\.", f".bn{step + 1}.") for step in range(3)),
)
_HUGGINGFACE_VIT: Rules = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
_TORCHVISION_VIT: Rules = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_SWIN_BLOCK: Rules = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"^norm\.", "layernorm."),
)
_TIMM_SWIN: Rules = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    *_SWIN_BLOCK,
)
_TORCHVISION_SWIN: Rules = (
    (r"^features\.0\.0\.", "embeddings.patch_embeddings.projection."),
    (r"^features\.0\.2\.", "embeddings.norm."),
    *((rf"^features\.{2 * stage + 1}\.", f"encoder.layers.{stage}.blocks.") for stage in range(4)),
    *((rf"^features\.{2 * stage + 2}\.", f"encoder.layers.{stage}.downsample.") for stage in range(3)),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    *_SWIN_BLOCK,
)
_PROJECTION, _EMBED = "embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight"
DIALECTS = (
    Dialect(("conv1.weight", "layer1.0.conv1.weight"), _resnet),
    Dialect(("embedder.embedder.convolution.weight",), _huggingface_resnet, _HUGGINGFACE_RESNET),
    Dialect(("features.conv0.weight", "features.norm5.weight"), _densenet, ((OLD_NAME.pattern, r"\1\2"),)),
    Dialect(("conv_stem.weight", "conv_head.weight"), _efficientnet),
    Dialect((_EMBED, "cls_token"), _vit(_EMBED, "blocks.")),
    Dialect(
        (_PROJECTION, "embeddings.cls_token"), _vit(_PROJECTION, "encoder.layer.|layers."), _HUGGINGFACE_VIT, _joined
    ),
    Dialect(("conv_proj.weight", "class_token"), _vit("conv_proj.weight", "encoder.layers."), _TORCHVISION_VIT),
    Dialect(
        (_EMBED, "patch_embed.norm.weight"),
        _swin(_EMBED, tuple(f"layers.{stage}.blocks." for stage in range(4))),
        _TIMM_SWIN,
        _timm_swin,
    ),
    Dialect(
        (_PROJECTION, "embeddings.norm.weight"),
        _swin(_PROJECTION, tuple(f"encoder.layers.{stage}.blocks." for stage in range(4))),
        arrange=lambda named: {new_name(name): pair for name, pair in named.items()},
    ),
    Dialect(
        ("features.0.0.weight", "features.1.0.attn.qkv.weight"),
        _swin("features.0.0.weight", tuple(f"features.{2 * stage + 1}." for stage in range(4))),
        _TORCHVISION_SWIN,
        _separated,
    ),
)
