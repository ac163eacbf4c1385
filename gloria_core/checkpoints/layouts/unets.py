"""U-Nets of segmentation-models-pytorch as GLoRIA (Lightning, `model.`) and gloria-Extended (no prefix) save them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import ImageTranslation, Shapes, resnet_name

NAME = "U-Net (GLoRIA, gloria-Extended)"


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """Encoder, decoder and segmentation head of the library's names, on a ResNet."""
    names = {_bare(name) for name in shapes}
    return {"encoder.conv1.weight", "decoder.blocks.0.conv1.0.weight", "segmentation_head.0.weight"} <= names


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> ImageTranslation:
    """See `gloria_core.checkpoints.layouts`."""
    renamed = {_bare(theirs): (theirs, value) for theirs, value in tensors.items()}
    ignored = [theirs for name, (theirs, _) in renamed.items() if name.startswith("loss.")]  # class weights of a loss
    renamed = {name: pair for name, pair in renamed.items() if not name.startswith("loss.")}
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    return ImageTranslation(
        encoder=resnet_name(shapes, "encoder."),
        tensors=renamed,
        ignored=ignored,
        kind="unet",
        classes=shapes["segmentation_head.0.weight"][0],
        in_channels=shapes["encoder.conv1.weight"][1],
    )


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")
