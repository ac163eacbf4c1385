"""Image encoders alone: state dicts under the names of torchvision, timm or transformers (4 and 5).

Among them PRIOR's `prior_resnet50.pt`, torchvision's ResNet-50 with one input channel. Network and input channels are
read from the tensors, the names are brought to those of our networks (`dialects`). Left out, because an encoder has no
place for them: classifiers, poolers, and tables of counting numbers. A file from before PyTorch 0.4.1 lacks BatchNorm's
counters of batches, which nothing here reads; they are set to zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import Dialect, ImageTranslation, Named, Shapes, dialect_of
from gloria_core.checkpoints.model import ConfigError

NAME = "image encoder alone (torchvision, timm, transformers)"
PREFIXES = ("", "module.", "model.", "encoder.", "backbone.", "trunk.", "resnet.", "vit.", "swin.")
WITHOUT_PLACE = re.compile(
    r"(fc|head|heads|head_dist|classifier|pooler|last_linear)\..*|.*\.(relative_position_index|attn_mask|position_ids)"
    r"|embeddings\.mask_token"
)


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """Whether all tensors are one network's, perhaps with its classifier."""
    return _place(shapes) is not None


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> ImageTranslation:
    """See `gloria_core.checkpoints.layouts`."""
    prefix, _ = _place({name: tuple(value.shape) for name, value in tensors.items()})
    return translate_named({name.removeprefix(prefix): (name, value) for name, value in tensors.items()})


def translate_named(named: Named) -> ImageTranslation:
    """The same for the part of a file that is an image encoder. Raises ConfigError for an unknown network."""
    shapes = {name: tuple(value.shape) for name, (_, value) in named.items()}
    dialect = dialect_of(shapes)
    if dialect is None:
        raise ConfigError(f"its image encoder is none that is known; its first tensors: {', '.join(list(named)[:3])}")
    ignored = [theirs for name, (theirs, _) in named.items() if WITHOUT_PLACE.fullmatch(name)]
    renamed = {}
    for name, pair in named.items():
        if not WITHOUT_PLACE.fullmatch(name):
            for pattern, ours in dialect.rules:
                name = re.sub(pattern, ours, name)
            renamed[name] = pair
    if dialect.arrange is not None:
        renamed = dialect.arrange(renamed)
    for name in [name for name in renamed if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        renamed.setdefault(counter, (f"(zero, for {counter})", torch.zeros((), dtype=torch.int64)))
    return ImageTranslation(
        encoder=dialect.encoder(shapes),
        tensors={f"trunk.{name}": pair for name, pair in renamed.items()},
        ignored=ignored,
        in_channels=shapes[dialect.anchors[0]][1],
    )


def _place(shapes: Shapes) -> tuple[str, Dialect] | None:
    for prefix in PREFIXES:
        inside = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        outside = [n for n in shapes if not n.startswith(prefix) and not WITHOUT_PLACE.fullmatch(n)]
        dialect = None if outside else dialect_of(inside)
        if dialect is not None:
            return prefix, dialect
    return None
