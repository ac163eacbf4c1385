"""Segmentation networks on a pretrained image encoder: the U-Net of segmentation-models-pytorch, and SETR's decoder.

The encoder is the very module that a checkpoint holds: its stages feed the decoder, and no tensor is copied or renamed.
GLoRIA (Huang et al. 2021, section 4.4) and MGCA (Wang et al. 2022, section 4.3) put segmentation-models-pytorch's U-Net
(Ronneberger et al. 2015) on their ResNet-50; MGCA puts SETR's progressive upsampling (Zheng et al. 2021, section 3.2)
on its ViT. Both read the image as it comes: the 299-pixel resize inside the encoders is for pretraining and probing.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from segmentation_models_pytorch.base import SegmentationHead, initialization
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

BatchNormMode = Literal["eval", "train"]
# Decoder widths from coarse to fine: the default of segmentation-models-pytorch, and of both papers.
CHANNELS = (256, 128, 64, 32, 16)
SETR_CHANNELS = (512, 256, 128, 64)
DEEPEST = 32


def decoder_inputs(encoder: nn.Module, pixels: Tensor) -> tuple[Tensor, ...]:
    """What a decoder reads of images of any size: the pyramid of the padded images, or the region grid.

    Shape: (B, C, H, W) -> five tensors (B, D_s, H' / s, W' / s), H' and W' the next multiples of 32; or one
        (B, h, w, Dr)
    """
    if not encoder.has_pyramid:
        return (encoder(pixels).regions,)
    top, bottom, left, right = _margins(*pixels.shape[-2:])
    if top or bottom or left or right:
        pixels = F.pad(pixels, (left, right, top, bottom), mode="replicate")
    return tuple(encoder.pyramid(pixels))


class SetrDecoder(nn.Module):
    """SETR-PUP as MGCA's released code has it (mgca_segmenter.py): a linear layer, four times convolve and double.

    Convolution 3 x 3, BatchNorm, ReLU, bilinear upsampling by two with aligned corners; widths 512, 256, 128, 64; then
    the last convolution to K maps.
    Shape: (B, h, w, Dr) -> (B, K, 16 h, 16 w)
    """

    def __init__(self, region_dim: int, classes: int, *, channels: Sequence[int] = SETR_CHANNELS) -> None:
        super().__init__()
        if len(channels) != len(SETR_CHANNELS):
            raise ValueError(f"channels has {len(channels)} widths; SETR's decoder doubles four times and needs four")
        self.linear = nn.Linear(region_dim, region_dim)
        layers: list[nn.Module] = []
        for before, width in zip((region_dim, *channels[:-1]), channels, strict=True):
            layers += Conv2dNormActivation(before, width, bias=True)
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
        self.steps = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels[-1], classes, 3, padding=1)

    def forward(self, regions: Tensor) -> Tensor:
        return self.head(self.steps(self.linear(regions).permute(0, 3, 1, 2)))


class SegmentationNet(nn.Module):
    """An image encoder with a decoder that gives one logit map a class, at the size of the input.

    `encoder`: an `ImageEncoder`, used and not copied. `classes`: K maps; each is a yes/no question of its own.
    The decoder of a convolutional encoder is the U-Net's, that of a transformer SETR's. `channels`: widths of the
    decoder, coarse to fine (five for the U-Net, four for SETR), or None for `width_scale` times the published ones.
    `frozen`: the encoder gets no gradient. `batch_norm` of a frozen encoder: "eval" keeps the pretrained statistics;
    "train" is what the released MGCA code does (statistics of the batch, and the stored ones drift), although its
    weights are frozen too.

    Inputs whose sides 32 does not divide are padded with their border pixels on all sides, and the logits cut back, so
    that grids stay aligned. Nothing is resized, except for SETR, whose grid of 16-pixel cells does not fill the input.

    Shape: (B, C, H, W) -> (B, K, H, W)
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        *,
        channels: Sequence[int] | None = None,
        width_scale: float = 1.0,
        frozen: bool = True,
        batch_norm: BatchNormMode = "eval",
    ) -> None:
        super().__init__()
        self.encoder, self.frozen, self.batch_norm = encoder, frozen, batch_norm
        encoder.frozen = frozen
        encoder.requires_grad_(not frozen)
        published = CHANNELS if encoder.has_pyramid else SETR_CHANNELS
        channels = tuple(channels or (int(width * width_scale) for width in published))
        self.options = {"classes": classes, "channels": list(channels)}
        if encoder.has_pyramid:
            widths = encoder.pyramid_widths
            self.decoder = UnetDecoder((encoder.in_channels, *widths), channels, n_blocks=len(widths))
            self.head = SegmentationHead(channels[-1], classes)
            initialization.initialize_decoder(self.decoder)
            initialization.initialize_head(self.head)
        else:
            self.decoder = SetrDecoder(encoder.region_dim, classes, channels=channels)
            self.head = nn.Identity()
        self.train(self.training)

    def train(self, mode: bool = True) -> "SegmentationNet":
        """Training mode; a frozen encoder stays in evaluation mode, its BatchNorm as `batch_norm` says."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
            for module in self.encoder.modules():
                if mode and self.batch_norm == "train" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
        return self

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """What the decoder reads: five maps ("unet"), or one region grid ("setr"). No gradient if frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return decoder_inputs(self.encoder, pixels)

    def decode(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits of the features of images of `size` = (H, W) pixels. Shape: -> (B, K, H, W) float32."""
        height, width = size
        if not self.encoder.has_pyramid:
            logits = self.decoder(features[0])
            if tuple(logits.shape[-2:]) != (height, width):
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
            return logits.float()
        top, bottom, left, right = _margins(height, width)
        # the decoder wants the input first, for its size alone: an empty view of that size costs nothing
        blank = features[0].new_empty(1).expand(1, 1, height + top + bottom, width + left + right)
        logits = self.head(self.decoder([blank, *features]))
        return logits[..., top : top + height, left : left + width].float()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decode(self.features(pixels), tuple(pixels.shape[-2:]))


def _margins(height: int, width: int) -> tuple[int, int, int, int]:
    """Rows and columns to add (top, bottom, left, right) so that 32 divides both sides."""
    rows, columns = -height % DEEPEST, -width % DEEPEST
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2
