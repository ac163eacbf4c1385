"""ConVIRT: contrast of whole radiographs with whole texts, the global-only baseline.

Zhang, Jiang, Miura, Manning, Langlotz: "Contrastive Learning of Medical Visual Representations from Paired Images and
Text", arXiv 2010.00747, MLHC 2022. With projections v = g_v(h_v), u = g_u(h_u) and temperature tau:

    l(v->u) = -log exp(cos(v_i, u_i) / tau) / sum_k exp(cos(v_i, u_k) / tau)        (eq. 2; eq. 3 is l(u->v))
    loss    = mean over pairs of  lambda l(v->u) + (1 - lambda) l(u->v)            (eq. 4)

The authors released no code, so "published" and "corrected" are the same here.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from gloria_core.models.heads import MLPHead, contrastive_terms, cosine_matrix
from gloria_core.objectives.base import Objective
from gloria_core.types import Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures


class ConVIRT(Objective):
    """Two non-linear projection heads and a bidirectional contrastive loss (section 2.2 and 2.3 of the paper).

    `temperature` 0.1, `image_weight` (lambda) 0.75 and `projection_dim` 512 are the paper's. The text vector is the
    maximum over the token vectors; the paper takes those of BERT's last layer: `last_layers=1` of the text encoder.
    `similarity` is the cosine of the projections.

    There is no local loss. `local_embeddings` passes region and word vectors through the heads of the whole image and
    the whole text, for cosine maps; they were **never trained locally**.

    Shape: images B, texts N
    """

    needs = Needs(sentence=False)
    encoders = MappingProxyType({"last_layers": 1, "text_pieces": "mean", "region_stage": "layer4"})

    def __init__(
        self,
        *,
        pooled_dim: int,
        region_dim: int,
        text_dim: int,
        behavior: Behavior = "corrected",
        temperature: float = 0.1,
        image_weight: float = 0.75,
        projection_dim: int = 512,
    ) -> None:
        super().__init__(behavior)
        if temperature <= 0 or not 0 <= image_weight <= 1:
            raise ValueError("temperature must be positive and image_weight in [0, 1]")
        self.temperature, self.image_weight = temperature, image_weight
        self.same_width = region_dim == pooled_dim
        self.image_head = MLPHead(pooled_dim, projection_dim)
        self.text_head = MLPHead(text_dim, projection_dim)

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B pairs. Raises ValueError where images and texts differ in number."""
        to_text, to_image = contrastive_terms(self.similarity(images, texts) / self.temperature)
        total = self.image_weight * to_text + (1 - self.image_weight) * to_image
        return ObjectiveOutput(total=total, terms={"image_to_text": to_text, "text_to_image": to_image})

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N) cosines of the projected vectors."""
        return cosine_matrix(*self.global_embeddings(images, texts))

    def global_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor]:
        """Projected image (B, P) and text (N, P) vectors, unnormalised."""
        tokens = texts.tokens.masked_fill(~texts.token_mask[..., None], torch.finfo(texts.tokens.dtype).min)
        return self.image_head(images.pooled), self.text_head(tokens.amax(dim=1))

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Projected regions (B, h, w, P), words (N, W, P) and the mask (N, W) of words; never trained locally.

        Raises NotImplementedError where regions are of another stage than the pooled vector.
        """
        if not self.same_width:
            raise NotImplementedError(
                'ConVIRT projects the vectors of the last stage only: build the model with region_stage="layer4"'
            )
        words = texts.word_mask & ~texts.special_mask
        return self.image_head(images.regions), self.text_head(texts.words), words
