"""Vision transformers of timm with patches of 16 pixels (Dosovitskiy et al. 2021), the image encoder of MGCA's ViT.

Names and shapes are timm's `vit_base_patch16_224` without classifier, 150 tensors, which are also those of MGCA's
released `img_encoder_q.model` (Wang et al. 2022). The public ImageNet weights are DeiT's (Touvron et al. 2021),
trained on ImageNet-1k alone; MGCA starts from DeiT-base.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gloria_core.models.backbones.base import STAGES, Backbone, fetching
from gloria_core.types import ImageFeatures

PATCH = 16
TIMM_NAMES = {
    "vit_tiny_patch16": ("vit_tiny_patch16_224", "deit_tiny_patch16_224.fb_in1k"),
    "vit_small_patch16": ("vit_small_patch16_224", "deit_small_patch16_224.fb_in1k"),
    "vit_base_patch16": ("vit_base_patch16_224", "deit_base_patch16_224.fb_in1k"),
}


class ViT(Backbone):
    """Regions: patch tokens after the final norm, at every stage the same grid of stride 16.

    Pooled: "default" and "first_token" the class token after the final norm, "mean" the mean of the patch tokens.
    Position embeddings belong to 224 x 224 pixels and are interpolated (bicubic) for other sizes. Sides must be
    multiples of 16, ValueError otherwise.
    """

    NAMES = tuple(TIMM_NAMES)
    POOLINGS = ("default", "mean", "first_token")
    CLASSIFIERS = ("head.",)
    STRIDES: ClassVar = dict.fromkeys(STAGES, PATCH)

    def build(self) -> nn.Module:
        import timm

        # global_pool is what timm's own classifier would read; it decides which norm exists, and "token" has `norm`
        return timm.create_model(TIMM_NAMES[self.name][0], num_classes=0, global_pool="token", dynamic_img_size=True)

    def widths(self, trunk: nn.Module) -> dict[str, int]:
        return dict.fromkeys((*STAGES, "pooled"), trunk.embed_dim)

    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        return trunk.patch_embed.proj

    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        batch, _, height, width = pixels.shape
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"{self.name} needs sides that are multiples of {PATCH} pixels, got {height} x {width}; "
                "crop the images or set resize_to"
            )
        rows, columns = height // PATCH, width // PATCH
        read: list[Tensor] = []
        last = trunk.blocks[-1].attn
        if cls_attention:
            with last.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].detach())):
                tokens = trunk.forward_features(pixels)
        else:
            tokens = trunk.forward_features(pixels)
        patches = tokens[:, 1:]
        return ImageFeatures(
            pooled=patches.mean(dim=1) if pooling == "mean" else tokens[:, 0],
            regions=patches.reshape(batch, rows, columns, -1),
            cls_attention=class_attention(last, read[0]).reshape(batch, rows, columns) if cls_attention else None,
        )

    def imagenet(self) -> dict[str, Tensor]:
        import timm

        source = TIMM_NAMES[self.name][1]
        with fetching(f"{self.name} ({source})"):
            return timm.create_model(source, pretrained=True, num_classes=0).state_dict()


@torch.no_grad()
def class_attention(attention: nn.Module, tokens: Tensor) -> Tensor:
    """Attention of the class token to the patches: softmax over all tokens, mean over heads, class column left out.

    Only the one row is computed, from the block's own weights; the fused kernel of the forward pass never shows it.
    A row sums to less than one, by what the class token gives to itself. It carries no gradient: MGCA detaches the
    weights that it makes of it.

    Shape: tokens (B, 1 + R, D), the normed input of timm's `Attention` -> (B, R)
    """
    batch, length, width = tokens.shape
    heads = attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = nn.functional.linear(tokens[:, :1], weight[:width], None if bias is None else bias[:width])
    key = nn.functional.linear(tokens, weight[width : 2 * width], None if bias is None else bias[width : 2 * width])
    query = attention.q_norm(query.reshape(batch, 1, heads, -1).transpose(1, 2))
    key = attention.k_norm(key.reshape(batch, length, heads, -1).transpose(1, 2))
    scores = (query * attention.scale) @ key.transpose(2, 3)
    return scores.float().softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)
