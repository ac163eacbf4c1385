"""EfficientNet-Lite0 of timm (Tan and Le 2019, without squeeze-and-excitation), whose weights come as a pip package."""

from __future__ import annotations

from torch import Tensor, nn

from gloria_core.models import weights as sources
from gloria_core.models.backbones.base import LITE_PACKAGE, Backbone, from_maps
from gloria_core.types import ImageFeatures

LAST_BLOCK = {"layer2": 2, "layer3": 4, "layer4": 6}  # the last block of stride 8, 16 and 32


class EfficientNetLite(Backbone):
    """Regions: the last block of that stride. Pooled: mean of the map after the head convolution."""

    NAMES = ("efficientnet_lite0",)
    CLASSIFIERS = ("classifier.",)

    def build(self) -> nn.Module:
        import timm

        trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        trunk.classifier = nn.Identity()
        return trunk

    def widths(self, trunk: nn.Module) -> dict[str, int]:
        return {"layer2": 40, "layer3": 112, "layer4": 320, "pooled": trunk.conv_head.out_channels}

    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        return trunk.conv_stem

    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        x = trunk.bn1(trunk.conv_stem(pixels))
        regions = x
        for number, block in enumerate(trunk.blocks):
            x = block(x)
            if number == LAST_BLOCK[stage]:
                regions = x
        return from_maps(trunk.bn2(trunk.conv_head(x)), regions)

    def pyramid(self, trunk: nn.Module) -> nn.Module:
        return _Stages(trunk)

    def fill_from_package(self, trunk: nn.Module, package: str) -> None:
        if package != LITE_PACKAGE:
            super().fill_from_package(trunk, package)
        tensors = sources.read_tensors(sources.package_file(package, "*.pth"))
        without_classifier = {name: value for name, value in tensors.items() if not name.startswith("_fc.")}
        # the package keeps the names of another implementation; order and shapes are timm's
        sources.fill_by_order(trunk, without_classifier, source=f"package {package}")


class _Stages(nn.Module):
    """The maps of the regions, all three; the head convolution behind them is left out."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.conv_stem, self.bn1, self.blocks = trunk.conv_stem, trunk.bn1, trunk.blocks

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        x, maps = self.bn1(self.conv_stem(pixels)), []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return {stage: maps[number] for stage, number in LAST_BLOCK.items()}
