"""Heads and losses that several objectives share: projections, attention pooling, cosines, the contrastive loss.

Attention pooling gives one vector for a set of vectors, asked for by their summary: Radford et al. (CLIP), ICML 2021,
section 2.3; PRIOR (Cheng et al., ICCV 2023) pools regions and sentences with it. With a first vector x_0 (a summary,
such as the mean) and x_1..x_T, each plus its position p_t where there is one:

    y = C sum_t softmax_t( Q x_0 . K x_t / sqrt(D / heads) ) V x_t        in `heads` heads
"""

import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.types import ImageFeatures

# Floor of the product of two norms in a cosine (released code of GLoRIA, `gloria_loss.py`).
PRODUCT_EPS = 1e-8


def widened(value: Tensor) -> Tensor:
    """The tensor in float32 where it is half precision (autocast), untouched where it is float32 or float64."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class MLPHead(nn.Sequential):
    """Linear - ReLU - Linear, the non-linear projection of ConVIRT (Zhang et al. 2020, section 2.3) and SimCLR.

    Shape: (..., in_dim) -> (..., out_dim)
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, out_dim), nn.ReLU(), nn.Linear(out_dim, out_dim))


def cosine_matrix(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of every image with every text, in float32 or wider even under autocast.

    Shape: (B, D), (N, D) -> (B, N)
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = widened(images), widened(texts)
        norms = images.norm(dim=-1)[:, None] * texts.norm(dim=-1)[None, :]
        return images @ texts.T / norms.clamp(min=PRODUCT_EPS)


def contrastive_terms(logits: Tensor, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """InfoNCE in both directions for pairs on the diagonal: (image -> text, text -> image), each a mean over B.

    Shape: logits (B, B), rows images, columns texts
    Raises ValueError where the matrix is not square: image b must belong to text b.
    """
    if logits.ndim != 2 or logits.shape[0] != logits.shape[1]:
        raise ValueError(f"a contrastive loss pairs image b with text b; got logits of shape {tuple(logits.shape)}")
    logits, target = widened(logits), torch.arange(len(logits), device=logits.device)
    to_text, to_image = (F.cross_entropy(rows, target, label_smoothing=label_smoothing) for rows in (logits, logits.T))
    return to_text, to_image


# Regions of CLIP's and PRIOR's ResNet-50 on 224 pixels: 7 x 7.
PUBLISHED_SIDE = 7


class AttentionPool(nn.Module):
    """Multi-head attention of one query.

    `heads`: at most this many; fewer where they do not divide `dim`.
    `side`: pool regions of a side x side grid, each with a learned position; regions of another grid get the positions
    interpolated (bicubic). 0: a set without positions.

    Shape: first (N, D), vectors (N, T, D), mask (N, T) -> (N, D)
    """

    def __init__(self, dim: int, *, heads: int = 8, side: int = 0) -> None:
        super().__init__()
        self.heads, self.side = math.gcd(heads, dim), side
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(dim, dim) for _ in range(4))
        if side:
            self.positional_embedding = nn.Parameter(torch.randn(1 + side * side, dim) / dim**0.5)

    def forward(
        self, first: Tensor, vectors: Tensor, *, mask: Tensor | None = None, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """`mask`: True where a vector counts. `grid`: height and width of the regions, needed with positions."""
        x = torch.cat([first[:, None], vectors], dim=1)
        if self.side:
            if grid is None or grid[0] * grid[1] != vectors.shape[1]:
                raise ValueError(f"{vectors.shape[1]} regions do not fill the grid {grid}")
            positions = self.positional_embedding[None]
            x = x + resample_abs_pos_embed(positions, list(grid), num_prefix_tokens=1, antialias=False)
        query, key, value = (
            layer(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, part in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        allowed = None if mask is None else F.pad(mask, (1, 0), value=True)[:, None, None]
        pooled = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.c_proj(pooled.transpose(1, 2).flatten(2))[:, 0]

    def of_set(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Asked for by the mean of the vectors that count: (N, T, D), zero outside mask (N, T) -> (N, D)."""
        return self(vectors.sum(dim=1) / mask.sum(dim=1, keepdim=True), vectors, mask=mask)


class ImageHeads(nn.Module):
    """One vector for an image, one for each of its regions, and the regions as a map again.

    The image's is pooled from the regions, asked for by the encoder's pooled vector: where the regions are those of the
    last stage of a ResNet this is their mean, as in CLIP. `mixed`: take the channels-first map (Dr, h, w) for R = h * w
    rows of Dr numbers, as PRIOR's released code does by a view without a transpose. Each row then mixes channels of all
    positions: it has no place in the image.

    Shape: `ImageFeatures` of B images -> whole (B, D), regions (B, R, D)
    """

    def __init__(self, pooled_dim: int, region_dim: int, dim: int, *, mixed: bool = False) -> None:
        super().__init__()
        self.mixed = mixed
        self.query = nn.Identity() if pooled_dim == region_dim else nn.Linear(pooled_dim, region_dim)
        self.pool = AttentionPool(region_dim, side=PUBLISHED_SIDE)
        self.whole, self.local = nn.Linear(region_dim, dim), nn.Linear(region_dim, dim)

    def forward(self, images: ImageFeatures) -> tuple[Tensor, Tensor]:
        n, height, width, dim = images.regions.shape
        rows = images.regions.flatten(1, 2)
        pooled = self.pool(self.query(images.pooled), rows, grid=(height, width))
        if self.mixed:
            rows = images.regions.permute(0, 3, 1, 2).reshape(n, height * width, dim)
        return self.whole(pooled), self.local(rows)

    def as_map(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, R, D) -> (B, D, h, w), `grid` = (h, w); the same view back where `mixed`."""
        return (rows if self.mixed else rows.transpose(1, 2)).reshape(len(rows), rows.shape[2], *grid)
