"""Fine-tuned classifiers: an image encoder and a linear head on its pooled feature.

- GLoRIA (Lightning): `model.img_encoder.model.*` with the two embedders of pretraining, which the classifier does not
  use, and `model.classifier.*`; its encoder resizes to 299. From an ImageNet encoder: `model.img_encoder.conv1.*`, and
  no resize.
- gloria-Extended: the same without `model.`, in its own container.
- CXR-CLIP: `image_encoder.{resnet,image_encoder}.*` and `classifier.classification_head.*`. The released code reads a
  Swin's first token here as in pretraining. The pretraining file that its configuration names is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts import backbones
from gloria_core.checkpoints.layouts.key_maps import ImageTranslation, Shapes
from gloria_core.checkpoints.model import ConfigError

NAME = "fine-tuned classifier (GLoRIA, gloria-Extended, CXR-CLIP)"
HEADS = ("classifier.classification_head.", "classifier.")
ENCODERS = (  # how the encoder's tensors begin, and the side of the square it resizes to
    ("img_encoder.model.", 299),
    ("img_encoder.", None),
    ("image_encoder.resnet.", None),
    ("image_encoder.image_encoder.", None),
)
WITHOUT_PLACE = ("img_encoder.global_embedder.", "img_encoder.local_embedder.", "loss.")
"""GLoRIA's embedders, which its classifier keeps and never calls, and the class weights of a loss."""


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """A head named `classifier` beside an image encoder, and no text encoder."""
    names = {_bare(name) for name in shapes}
    has = [any(name.startswith(start) for name in names) for start in ("classifier.", "text_encoder.")]
    return has == [True, False] and any(name.startswith(("img_encoder.", "image_encoder.")) for name in names)


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> ImageTranslation:
    """See `gloria_core.checkpoints.layouts`."""
    encoder, renamed, ignored = {}, {}, []
    names = {_bare(theirs): theirs for theirs in tensors}
    prefix, resize_to = next(pair for pair in ENCODERS if any(name.startswith(pair[0]) for name in names))
    for name, theirs in names.items():
        if name.startswith(WITHOUT_PLACE):
            ignored.append(theirs)
        elif name.startswith(prefix):
            encoder[name.removeprefix(prefix)] = (theirs, tensors[theirs])
        elif name.startswith("classifier."):
            renamed[_head(name)] = (theirs, tensors[theirs])
        else:
            renamed[name] = (theirs, tensors[theirs])  # has no place: reported as unexpected
    if "classifier.weight" not in renamed or renamed["classifier.weight"][1].ndim != 2:
        raise ConfigError(f"its head is not linear (it has {', '.join(names[n] for n in names if 'classifier' in n)})")
    found = backbones.translate_named(encoder)
    return ImageTranslation(
        encoder=found.encoder,
        tensors={**{f"img_encoder.{name}": pair for name, pair in found.tensors.items()}, **renamed},
        ignored=[*ignored, *found.ignored],
        kind="classifier",
        classes=len(renamed["classifier.weight"][1]),
        resize_to=resize_to,
        in_channels=found.in_channels,
        pooling="first_token" if found.encoder == "swin_tiny" else "default",
    )


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")


def _head(name: str) -> str:
    for start in HEADS:
        if name.startswith(start):
            return f"classifier.{name.removeprefix(start)}"
    return name
