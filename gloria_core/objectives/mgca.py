"""MGCA: alignment of radiographs and reports as wholes (ITA), by word and patch (CTA), and by prototype (CPA).

Wang, Zhou, Wang, Vardhanabhuti, Yu: "Multi-Granularity Cross-modal Alignment for Generalized Medical Visual
Representation Learning", NeurIPS 2022, arXiv 2210.06044, section 3. Released code: github.com/HKU-MedAI/MGCA
(`mgca_module.py`, `encoder.py`). With the projected unit vectors v of an image, r of its report, p_j of its patches and
t_i of the report's words, N pairs in a batch, and CE(M)_i = -log softmax_k(M_ik) at k = i:

    L_ITA   = mean_n  CE(S)_n + CE(S')_n,              S_nm = v_n . r_m / tau_ita
    a_ij    = softmax_j(t_i . p_j / tau_cta)           what word i attends to
    o_i     = normalize(sum_j a_ij p_j)                the word seen in the image
    L_word  = mean_n  sum_i w_i (CE(M)_i + CE(M')_i) / 2,       M_ik = t_i . o_k / tau_cta, within one pair
    L_patch = the same with words and patches exchanged, and weights u_j
    L_CPA   = -mean_n (q_v . log softmax(z_r / tau_cpa) + q_r . log softmax(z_v / tau_cpa)) / 2
    loss    = lambda_ita L_ITA + lambda_cta (L_word + L_patch) + lambda_cpa L_CPA

w and u are the attention of the class tokens of the two encoders, clipped to their 10 % and 90 % quantiles. z = C v or
C r are cosines with the prototypes C, and q is their balanced assignment by Sinkhorn-Knopp (no gradient).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from gloria_core.models.heads import contrastive_terms, widened
from gloria_core.models.text_encoder import words_from_pieces
from gloria_core.objectives.base import Objective
from gloria_core.types import AttentionRows, Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures

Level = Literal["ita", "cta", "cpa"]
TEMPERATURES = MappingProxyType({"ita": 0.07, "cta": 0.1, "cpa": 0.2})
WEIGHTS = MappingProxyType({"ita": 1.0, "cta": 1.0, "cpa": 1.0})  # the released command line; its defaults differ
PUBLISHED_TOKENS = 112  # the released code pads every caption to this length


class ProjectionHead(nn.Sequential):
    """Linear - BatchNorm - ReLU - Linear - BatchNorm without scale (`encoder.py`; there a 1x1 convolution for tokens).

    Shape: (rows, in_dim) -> (rows, out_dim)
    """

    def __init__(self, in_dim: int, out_dim: int, *, hidden: int) -> None:
        first, last = nn.Linear(in_dim, hidden), nn.Linear(hidden, out_dim)
        super().__init__(first, nn.BatchNorm1d(hidden), nn.ReLU(), last, nn.BatchNorm1d(out_dim, affine=False))


class MGCA(Objective):
    """Instance-, token- and prototype-wise alignment.

    `dim`, `hidden`: widths of the four projection heads. `n_prototypes`: rows of C.
    `temperatures`, `weights`: tau and lambda by name, "ita", "cta", "cpa"; a missing name keeps the released
    0.07, 0.1, 0.2 and 1, 1, 1. With weight 0, "cta" and "cpa" are left out with their parameters; without both, what
    remains is the ConVIRT baseline of the released code.
    `freeze_prototypes_epochs`: the prototypes get gradients of exactly zero in the first epochs.
    `use_local_attention`: o and its counterpart come from two learned attention layers of one head instead of a_ij.
    `bidirectional`: False leaves L_patch out.
    `behavior`: what the released code does ("published") and what is done instead ("corrected"):
    - word weights: words get the attention to the token *after* each of their pieces, `[SEP]` the attention to padding,
      zero (`word_weight_shift`); each its own, without `[SEP]`.
    - a caption that fills 112 tokens loses its last word and `[SEP]` (`full_caption_drop_tail`); it keeps its words.
    - zero vectors up to 111 words pass the word head, enter its BatchNorm, and are negatives of every word, and `[SEP]`
      is a word (`mask_padding_in_bn_and_negatives`); the words alone, without `[SEP]`.
    - patch contexts are normalised without patch attention (ResNet) only (`normalize_patch_context`); always.
    - C is normalised in place by a training step, and its gradient ignores that; the gradient passes through.
    Both see the pairs of all processes; the released code contrasts and balances those of each GPU on its own. Zero
    positions (`text_positions`) and 6 of 12 BERT layers are options of the text encoder. Without patch attention (any
    ResNet) u is uniform. `similarity` is the cosine of the global projections.

    Shape: images B, texts N, patches R = h * w, projections D = `dim`
    """

    needs = Needs(cls_attention=True, token_attention=True, sentence=False)
    rows = AttentionRows(unit="word", normalisation="softmax")
    attention_formula = r"a_{ij} = \mathrm{softmax}_j\,(t_i \cdot p_j \,/\, 0.1)"
    encoders = MappingProxyType({"last_layers": 1, "max_tokens": PUBLISHED_TOKENS})

    def __init__(
        self,
        *,
        pooled_dim: int,
        region_dim: int,
        text_dim: int,
        behavior: Behavior = "corrected",
        dim: PositiveInt = 128,
        hidden: PositiveInt = 2048,
        n_prototypes: PositiveInt = 500,
        temperatures: Mapping[Level, PositiveFloat] | None = None,
        weights: Mapping[Level, NonNegativeFloat] | None = None,
        freeze_prototypes_epochs: NonNegativeInt = 1,
        use_local_attention: bool = False,
        bidirectional: bool = True,
    ) -> None:
        super().__init__(behavior)
        self.bidirectional = bidirectional
        self.temperatures, self.weights = TEMPERATURES | (temperatures or {}), WEIGHTS | (weights or {})
        if not any(self.weights.values()):
            raise ValueError("the weights are all zero")
        self.freeze_prototypes_epochs, self.prototypes_frozen = freeze_prototypes_epochs, False
        self.image_head = ProjectionHead(pooled_dim, dim, hidden=hidden)
        self.text_head = ProjectionHead(text_dim, dim, hidden=hidden)
        self.word_attention = self.patch_attention = None
        self.has_local_embeddings = self.weights["cta"] > 0
        if self.weights["cta"]:
            self.region_head = ProjectionHead(region_dim, dim, hidden=hidden)
            self.word_head = ProjectionHead(text_dim, dim, hidden=hidden)
            if use_local_attention:  # a parameter that no loss reaches is not made
                self.word_attention = nn.MultiheadAttention(dim, 1, batch_first=True)
                self.patch_attention = nn.MultiheadAttention(dim, 1, batch_first=True) if bidirectional else None
        else:
            self.rows = None
        if self.weights["cpa"]:
            self.prototypes = nn.Linear(dim, n_prototypes, bias=False)

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B pairs. Raises ValueError for unequal numbers, a text without words or without `cls_attention`."""
        v, r = (_unit(value) for value in self.global_embeddings(images, texts))
        terms, attention = {}, None
        with torch.autocast(v.device.type, enabled=False):
            names = ("ita_image_to_text", "ita_text_to_image")
            terms |= zip(names, contrastive_terms(v @ r.T / self.temperatures["ita"]), strict=True)
        total = self.weights["ita"] * sum(terms.values())
        if self.weights["cta"]:
            token_terms, attention = self._token_terms(images, texts)
            terms |= token_terms
            total = total + self.weights["cta"] * sum(token_terms.values())
        if self.weights["cpa"]:
            terms["cpa"] = self._prototype_term(v, r)
            total = total + self.weights["cpa"] * terms["cpa"]
        return ObjectiveOutput(total=total, terms=terms, attention=attention)

    def attention(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(N, W, h, w): a_ij of image n and text n, or of one image and N texts; rows that are no words are zero."""
        regions, words, mask = self.local_embeddings(images, texts)
        patches = self.one_image_a_text(regions, len(words)).flatten(1, 2)
        with torch.autocast(words.device.type, enabled=False):
            _, weights = attend(words, patches, temperature=self.temperatures["cta"], layer=self.word_attention)
        return (weights * mask[..., None]).unflatten(2, regions.shape[1:3])

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors p (B, h, w, D) and t (N, W, D), and the mask (N, W) of the words; `[CLS]` has a zero row."""
        if not self.has_local_embeddings:
            return super().local_embeddings(images, texts)
        words, _ = self.word_rows(texts)
        return self._regions(images), F.pad(words, (0, 0, 1, 0))[:, : texts.words.shape[1]], self._word_mask(texts)

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self.image_head(images.pooled)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        """Of `[CLS]`."""
        return self.text_head(texts.words[:, 0])

    def word_rows(self, texts: TextFeatures) -> tuple[Tensor, Tensor]:
        """Unit vectors (N, M, D) of the columns from 1 on, and which are words (N, M); published: padded to M = 111."""
        words, mask = texts.words[:, 1:], self._word_mask(texts)[:, 1:]
        if self.behavior == "corrected":
            projected = _unit(self.word_head(words[mask]))
            return projected.new_zeros(*mask.shape, projected.shape[1]).index_put((mask,), projected), mask
        words = F.pad(words * mask[..., None], (0, 0, 0, PUBLISHED_TOKENS - 1 - words.shape[1]))
        projected = _unit(self.word_head(words.flatten(0, 1))).unflatten(0, words.shape[:2])
        return projected, F.pad(mask, (0, words.shape[1] - mask.shape[1]))

    def word_weights(self, texts: TextFeatures) -> Tensor:
        """w (N, W) without gradient, zero where there is no word. Raises ValueError for a text without words."""
        if texts.cls_attention is None:
            raise ValueError("MGCA weighs words by what [CLS] attends to: make the TextEncoder with attentions=True")
        attention = widened(texts.cls_attention.detach())
        if self.behavior == "published":
            attention = F.pad(attention[:, 1:], (0, 1))
        weights = words_from_pieces(attention[..., None], texts.token_words, texts.words.shape[1])[..., 0]
        mask = self._word_mask(texts) & (weights > 0)
        empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"texts without words have no word-patch alignment: rows {empty[:5]} of the batch")
        return clipped_weights(weights, mask)

    def patch_weights(self, images: ImageFeatures) -> Tensor:
        """u (B, h, w) without gradient; uniform where the image encoder has no class token."""
        shape = images.regions.shape[:3]
        if images.cls_attention is None:
            return widened(images.pooled).new_full(shape, 1 / (shape[1] * shape[2]))
        return clipped_weights(widened(images.cls_attention).flatten(1)).view(shape)

    def on_epoch(self, epoch: int) -> None:
        """Freezes the prototypes in the first epochs. AdamW's decay still shortens them, which changes no cosine."""
        self.prototypes_frozen = epoch < self.freeze_prototypes_epochs

    def _token_terms(self, images: ImageFeatures, texts: TextFeatures) -> tuple[dict[str, Tensor], Tensor]:
        """L_word and L_patch, and the attention (N, W, h, w) in the former."""
        word_weights, mask = self.word_weights(texts)[:, 1:], self._word_mask(texts)[:, 1:]
        regions, (words, used), tau = self._regions(images), self.word_rows(texts), self.temperatures["cta"]
        n_words, patches = mask.shape[1], regions.flatten(1, 2)
        word_weights = F.pad(word_weights, (0, words.shape[1] - n_words))
        negatives = None if self.behavior == "published" else used
        with torch.autocast(words.device.type, enabled=False):
            contexts, attention = attend(words, patches, temperature=tau, layer=self.word_attention)
            terms = {"cta_word": paired_loss(words, _unit(contexts), word_weights, temperature=tau, mask=negatives)}
            if self.bidirectional:
                contexts, _ = attend(patches, words, temperature=tau, layer=self.patch_attention, mask=used)
                if self.behavior == "corrected" or images.cls_attention is None:
                    contexts = _unit(contexts)
                patch_weights = self.patch_weights(images).flatten(1)
                terms["cta_patch"] = paired_loss(patches, contexts, patch_weights, temperature=tau)
        attention = F.pad(attention.detach()[:, :n_words] * mask[..., None], (0, 0, 1, 0))
        return terms, attention.unflatten(2, regions.shape[1:3])

    def _prototype_term(self, v: Tensor, r: Tensor) -> Tensor:
        weight = self.prototypes.weight
        if self.behavior == "published" and self.training:
            with torch.no_grad():
                weight.copy_(F.normalize(weight, dim=1))
        if self.prototypes_frozen:
            weight = weight.detach() + 0 * weight  # zero and not None: every process expects a gradient
        prototypes = F.normalize(widened(weight), dim=1)
        if self.behavior == "published":
            prototypes = prototypes.detach() + (weight - weight.detach())  # the gradient skips the normalisation
        with torch.autocast(v.device.type, enabled=False):
            z_v, z_r = v @ prototypes.T, r @ prototypes.T
            log_v, log_r = ((z / self.temperatures["cpa"]).log_softmax(dim=1) for z in (z_v, z_r))
            return -(sinkhorn(z_v) * log_r + sinkhorn(z_r) * log_v).sum(dim=1).mean() / 2

    def _regions(self, images: ImageFeatures) -> Tensor:
        return _unit(self.region_head(images.regions.flatten(0, 2))).unflatten(0, images.regions.shape[:3])

    def _word_mask(self, texts: TextFeatures) -> Tensor:
        """(N, W): the columns that are words."""
        if self.behavior == "corrected":
            return texts.word_mask & ~texts.special_mask
        length, column = texts.token_mask.shape[1], torch.arange(texts.words.shape[1], device=texts.words.device)
        if length > PUBLISHED_TOKENS:
            raise ValueError(f'MGCA, behavior="published": {length} tokens in a text, it takes {PUBLISHED_TOKENS}')
        mask = texts.word_mask & (column > 0)
        if length == PUBLISHED_TOKENS:
            full, pending = texts.token_mask[:, -1:], texts.token_words[:, -2:-1]
            mask &= ~full | (column < pending)
        return mask


def attend(
    queries: Tensor, keys: Tensor, *, temperature: float, layer: nn.Module | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What each query attends to: softmax over the keys of query . key / temperature, or a learned attention `layer`.

    Shape: queries (B, Q, D), keys (B, K, D), mask (B, K): the keys that count -> contexts (B, Q, D), weights (B, Q, K)
    """
    if layer is not None:
        return layer(queries, keys, keys, key_padding_mask=None if mask is None else ~mask)
    scores = queries @ keys.transpose(1, 2) / temperature
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], float("-inf"))
    weights = scores.softmax(dim=-1)
    return weights @ keys, weights


def paired_loss(
    queries: Tensor, contexts: Tensor, weights: Tensor, *, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """mean_b sum_i w_i (CE(M)_i + CE(M')_i) / 2 with M = queries contexts' / temperature.

    CE(M)_i = -log softmax_k(M_ik) at k = i: context i belongs to query i, and the other contexts of the same pair,
    or those in the mask, are its negatives.

    Shape: queries, contexts (B, Q, D); weights, mask (B, Q) -> scalar
    """
    logits = queries @ contexts.transpose(1, 2) / temperature
    by_row = by_column = logits
    if mask is not None:
        by_row = logits.masked_fill(~mask[:, None], float("-inf"))
        by_column = logits.masked_fill(~mask[:, :, None], float("-inf"))
    errors = by_row.logsumexp(dim=2) + by_column.logsumexp(dim=1) - 2 * logits.diagonal(dim1=1, dim2=2)
    return (weights * errors).sum(dim=1).mean() / 2


@torch.no_grad()
def clipped_weights(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each row clipped to the 10 % and 90 % quantiles of its masked entries, then scaled to sum 1; zero outside.

    Quantiles are interpolated linearly (released code of MGCA, `mgca_module.py`). A row without an entry gives NaN.

    Shape: weights, mask (N, M) -> (N, M), without gradient
    """
    mask = torch.ones_like(weights, dtype=torch.bool) if mask is None else mask
    inside = weights.masked_fill(~mask, float("nan"))
    low, high = torch.nanquantile(inside, weights.new_tensor([0.1, 0.9]), dim=1, keepdim=True)
    clipped = torch.maximum(torch.minimum(weights, high), low) * mask
    return clipped / clipped.sum(dim=1, keepdim=True)


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Assignment of each row to K prototypes that uses every prototype about equally; rows sum to 1.

    Sinkhorn-Knopp on exp(scores / epsilon), as in SwAV (Caron et al., NeurIPS 2020, section 3.1). The scores are
    cosines in float32 or wider: exp(1 / 0.05) = 4.9e8 does not fit into float16.

    Shape: (B, K) -> (B, K), without gradient
    """
    rows, columns = scores.shape
    transport = (scores / epsilon).exp()
    transport = transport / transport.sum()
    for _ in range(iterations):
        transport = transport / (columns * transport.sum(dim=0, keepdim=True))
        transport = transport / (rows * transport.sum(dim=1, keepdim=True))
    return transport / transport.sum(dim=1, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    """Length 1 along the last axis, in float32 or wider."""
    return F.normalize(widened(vectors), dim=-1)
