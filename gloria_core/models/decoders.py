"""Decoders that give back an image from its regions and a report from its image (PRIOR, Cheng et al., ICCV 2023)."""

import math
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation
from transformers import BertConfig, BertModel

from gloria_core.models.heads import widened

STAGES = 5


class ImageDecoder(nn.Module):
    """Regions of the image and what the text told about them -> one grey image.

    Whole channels of the image's own regions are dropped at random (half of them), so that the text is needed. Then
    five times: resize (nearest) to 1/16, 1/8, 1/4, 1/2 and all of the image's size; two 3x3 convolutions with
    BatchNorm and ReLU, which halve the channels, from 2 D to D / 16.

    Shape: regions, told (B, D, h, w) -> (B, 1, H, W), `size` = (H, W)
    """

    def __init__(self, dim: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        widths = [max(1, 2 * dim // 2**step) for step in range(STAGES + 1)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*Conv2dNormActivation(before, after), *Conv2dNormActivation(after, after))
            for before, after in pairwise(widths)
        )
        self.head = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, regions: Tensor, told: Tensor, *, size: tuple[int, int]) -> Tensor:
        x = torch.cat([self.dropout(regions), told.to(regions.dtype)], dim=1)
        for step, block in enumerate(self.blocks, start=1):
            part = 2 ** (STAGES - step)
            x = block(F.interpolate(x, (max(1, size[0] // part), max(1, size[1] // part)), mode="nearest"))
        return widened(self.head(x))


class SentenceDecoder(nn.Module):
    """Learned queries that attend to each other and to the regions, and become the report's sentences, in any order.

    A BERT decoder with cross-attention, without words. `causal`: query i sees only queries 0..i, as in the released
    code of PRIOR, which meant not to: transformers masks whatever is called a decoder.

    Shape: regions (B, R, D) -> (B, n_queries, D)
    """

    def __init__(self, dim: int, *, n_queries: int = 16, layers: int = 8, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.queries = nn.Parameter(torch.randn(1, n_queries, dim))
        config = BertConfig(
            vocab_size=1,
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=dim // 64 if dim % 64 == 0 else math.gcd(8, dim),
            intermediate_size=4 * dim,
            max_position_embeddings=max(512, n_queries),
            is_decoder=True,
            add_cross_attention=True,
            use_cache=False,
        )
        self.bert = BertModel._from_config(config, attn_implementation="sdpa", add_pooling_layer=False)
        self.bert.embeddings.word_embeddings = nn.Identity()  # it is given vectors, never words

    def forward(self, regions: Tensor) -> Tensor:
        n, count = len(regions), self.queries.shape[1]
        # a four-dimensional mask is taken as it is; without one, transformers makes the causal mask of a decoder
        everything = torch.ones(n, 1, count, count, dtype=torch.bool, device=regions.device)
        output = self.bert(
            inputs_embeds=self.queries.expand(n, -1, -1),
            encoder_hidden_states=regions,
            attention_mask=None if self.causal else everything,
        )
        return widened(output.last_hidden_state)

    def in_order_of(self, targets: Tensor, regions: Tensor, *, inverse: bool = True) -> tuple[Tensor, Tensor]:
        """What is written, each row in the place of the target that it is matched with, and the targets.

        There are as many targets as queries: zero vectors are added. `inverse=False` takes row j from place `match`[j]
        instead, as the released code does, which is right only where the permutation is its own inverse.

        Shape: targets (B, S, D) with S <= n_queries -> (B, n_queries, D) twice
        """
        written = self(regions)
        targets = F.pad(targets, (0, 0, 0, written.shape[1] - targets.shape[1]))
        order = match(written, targets)
        order = order.argsort(dim=1) if inverse else order
        return written.gather(1, order[..., None].expand_as(written)), targets


@torch.no_grad()
def match(predicted: Tensor, targets: Tensor) -> Tensor:
    """Hungarian matching of least total L1 distance: the target that each prediction is matched with.

    One copy of all cost matrices to the host. A cost that is not finite counts as very large: the loss is not finite
    either, and reporting that is the training loop's affair.

    Shape: predicted, targets (B, Q, D) -> (B, Q) int64
    """
    costs = torch.cdist(widened(predicted), widened(targets), p=1)
    costs = costs.nan_to_num(nan=1e30, posinf=1e30).cpu().numpy()
    columns = [linear_sum_assignment(cost)[1].tolist() for cost in costs]
    return torch.tensor(columns, dtype=torch.int64, device=predicted.device)
