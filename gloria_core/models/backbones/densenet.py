"""DenseNet-121 of torchvision (Huang et al. 2017), the network of CheXNet and of most chest X-ray classifiers."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from gloria_core.models.backbones.base import Backbone, from_maps, torchvision_imagenet
from gloria_core.types import ImageFeatures

OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


class DenseNet(Backbone):
    """Regions: "layer2" and "layer3" the outputs of `denseblock2` and `denseblock3` themselves, before the transition
    that halves them; "layer4" `relu(norm5(denseblock4))`, the map that the pooled vector is the mean of.
    """

    NAMES = ("densenet121",)
    CLASSIFIERS = ("classifier.",)

    def build(self) -> nn.Module:
        trunk = get_model(self.name, weights=None)
        trunk.classifier = nn.Identity()
        return trunk

    def widths(self, trunk: nn.Module) -> dict[str, int]:
        layers = trunk.features
        return {
            "layer2": layers.transition2.norm.num_features,
            "layer3": layers.transition3.norm.num_features,
            "layer4": layers.norm5.num_features,
            "pooled": layers.norm5.num_features,
        }

    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        return trunk.features.conv0

    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        maps, x = {}, pixels
        for name, layer in trunk.features.named_children():
            x = maps[name] = layer(x)
        last = F.relu(x)
        return from_maps(last, last if stage == "layer4" else maps[f"denseblock{stage[-1]}"])

    def pyramid(self, trunk: nn.Module) -> nn.Module:
        return _Stages(trunk.features)

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """torchvision's download still has `denselayer1.norm.1.weight`, which its network calls `norm1.weight`."""
        return {OLD_NAME.sub(r"\1\2", name): value for name, value in tensors.items()}

    def imagenet(self) -> dict[str, Tensor]:
        return torchvision_imagenet(self.name)


class _Stages(nn.Module):
    """The maps of the regions, all three."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps, x = {}, pixels
        for name, layer in self.layers.named_children():
            x = maps[name] = layer(x)
        return {"layer2": maps["denseblock2"], "layer3": maps["denseblock3"], "layer4": F.relu(x)}
