"""ConVIRT: contrast of whole radiographs with whole texts, the global-only baseline.

Zhang, Jiang, Miura, Manning, Langlotz: "Contrastive Learning of Medical Visual Representations from Paired Images and
Text", arXiv 2010.00747, MLHC 2022. With projections v = g_v(h_v), u = g_u(h_u) and temperature tau:

    l(v->u) = -log exp(cos(v_i, u_i) / tau) / sum_k exp(cos(v_i, u_k) / tau)        (eq. 2; eq. 3 is l(u->v))
    loss    = mean over pairs of  lambda l(v->u) + (1 - lambda) l(u->v)            (eq. 4)

The authors released no code, so "published" and "corrected" are the same here.
"""

from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from gloria_core.models.heads import MLPHead, contrastive_terms
from gloria_core.objectives.base import GlobalObjective
from gloria_core.types import Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures


class ConVIRT(GlobalObjective):
    """Two non-linear projection heads and a bidirectional contrastive loss (section 2.2 and 2.3 of the paper).

    `temperature` 0.1, `image_weight` (lambda) 0.75 and `projection_dim` 512 are the paper's. The text vector is the
    maximum over the token vectors; the paper takes those of BERT's last layer: `last_layers=1` of the text encoder.
    `similarity` is the cosine of the projections.

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
        temperature: PositiveFloat = 0.1,
        image_weight: Annotated[float, Field(ge=0, le=1)] = 0.75,
        projection_dim: PositiveInt = 512,
    ) -> None:
        super().__init__(behavior)
        self.temperature, self.image_weight = temperature, image_weight
        self.has_local_embeddings = region_dim == pooled_dim
        self.image_head = MLPHead(pooled_dim, projection_dim)
        self.text_head = MLPHead(text_dim, projection_dim)

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B pairs. Raises ValueError where images and texts differ in number."""
        to_text, to_image = contrastive_terms(self.similarity(images, texts) / self.temperature)
        total = self.image_weight * to_text + (1 - self.image_weight) * to_image
        return ObjectiveOutput(total=total, terms={"image_to_text": to_text, "text_to_image": to_image})

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        tokens = texts.tokens.masked_fill(~texts.token_mask[..., None], torch.finfo(texts.tokens.dtype).min)
        return self.text_head(tokens.amax(dim=1))
