"""ResNets of torchvision (He et al. 2016), and a tiny one with the same names for tests and lessons."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import BasicBlock

from gloria_core.models.backbones.base import STAGES, Backbone, from_maps, torchvision_imagenet
from gloria_core.types import ImageFeatures

TINY = "resnet_tiny"


class TinyResNet(nn.Module):
    """A ResNet of one narrow block a stage, with the names of torchvision's: for tests and for lessons."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        before = 16
        for number, width in enumerate((16, 32, 64, 128), start=1):
            stride = 1 if number == 1 else 2
            skip = (
                None
                if stride == 1
                else nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))
            )
            setattr(self, f"layer{number}", nn.Sequential(BasicBlock(before, width, stride, skip)))
            before = width


class ResNet(Backbone):
    """Regions: output of the stage of that name. Pooled: mean of `layer4`."""

    NAMES = (TINY, "resnet18", "resnet34", "resnet50")
    CLASSIFIERS = ("fc.",)

    def build(self) -> nn.Module:
        if self.name == TINY:
            return TinyResNet()
        trunk = get_model(self.name, weights=None)
        trunk.fc = nn.Identity()
        return trunk

    def widths(self, trunk: nn.Module) -> dict[str, int]:
        widths = {}
        for stage in STAGES:
            block = getattr(trunk, stage)[-1]
            widths[stage] = (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
        return {**widths, "pooled": widths["layer4"]}

    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        return trunk.conv1

    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(pixels))))
        regions = x
        for name in ("layer1", *STAGES):
            x = getattr(trunk, name)(x)
            if name == stage:
                regions = x
        return from_maps(x, regions)

    def pyramid(self, trunk: nn.Module) -> nn.Module:
        return IntermediateLayerGetter(trunk, {name: name for name in STAGES})

    def imagenet(self) -> dict[str, Tensor]:
        return super().imagenet() if self.name == TINY else torchvision_imagenet(self.name)
