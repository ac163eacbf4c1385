"""Networks behind `ImageEncoder`, one family a file. A new family is one new file and its name here."""

from gloria_core.models.backbones.base import LITE_PACKAGE, POOLINGS, STAGES, Backbone, Pooling, RegionStage
from gloria_core.models.backbones.densenet import DenseNet
from gloria_core.models.backbones.efficientnet import EfficientNetLite
from gloria_core.models.backbones.resnet import ResNet
from gloria_core.models.backbones.swin import Swin
from gloria_core.models.backbones.vit import ViT

__all__ = ["LITE_PACKAGE", "NAMES", "POOLINGS", "STAGES", "Backbone", "Pooling", "RegionStage", "backbone"]

FAMILIES: tuple[type[Backbone], ...] = (ResNet, EfficientNetLite, DenseNet, ViT, Swin)
NAMES = tuple(name for family in FAMILIES for name in family.NAMES)


def backbone(name: str) -> Backbone:
    """The network of that name. Raises ValueError that lists all names for an unknown one."""
    for family in FAMILIES:
        if name in family.NAMES:
            return family(name)
    raise ValueError(f"unknown image encoder {name!r}; available: {', '.join(NAMES)}")
