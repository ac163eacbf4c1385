"""CXR-CLIP: contrast of whole studies, each with two images and two texts.

You, Gu, Ham, Park, Kim, Hong, Baek, Roh: "CXR-CLIP: Toward Large Scale Chest X-ray Language-Image Pre-training",
MICCAI 2023, arXiv 2310.13292. Released code: github.com/Soombit-ai/cxr-clip (`loss/cxr_clip.py`, `model/clip.py`).
With unit vectors I^a (B, D) of view a and T^c (B, D) of text c of the same B studies, one learnt scale s, and CE(Z) the
mean cross-entropy of the rows of Z against its diagonal:

    MVS  = mean over views a and texts c of  ( CE(s I^a T^c') + CE(s T^c I^a') ) / 2      multi-view supervision
    ICL  = ( CE(s I^1 I^2') + CE(s I^2 I^1') ) / 2                                        images of one study
    TCL  = ( CE(s T^1 T^2') + CE(s T^2 T^1') ) / 2                                        texts of one study
    loss = MVS + 1.0 ICL + 0.5 TCL

ICL and TCL contrast one view with the other only: I^1 is never a negative of I^1.
"""

import math
from itertools import permutations, product
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from gloria_core.models.heads import contrastive_terms, cosine_matrix
from gloria_core.objectives.base import GlobalObjective
from gloria_core.types import Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures

LARGEST_LOG_SCALE = math.log(100.0)  # where CLIP holds its logit scale (Radford et al. 2021, section 2.5)


class CXRCLIP(GlobalObjective):
    """Linear projections of both modalities to one space, and the contrast of all views with all texts.

    `icl_weight`, `tcl_weight`: of the image-image and the text-text term; 1.0 and 0.5 in the released configuration.
        Both 0 is its `loss=clip`, which still averages the four pairings. Plain CLIP is one view and one text a study.
    `label_smoothing`: of the image-text terms, in training mode only; ICL and TCL are never smoothed.
    `projection_dim`: D, 512.
    `text_pooling`: "eos" the last token that is not padding, i.e. `[SEP]`; "cls" the first one (`bos` in the released
        code); "mean" of all tokens, specials included. The paper takes BERT's last layer: `last_layers=1`.
    `temperature`: start of 1 / s; log s is a parameter.
    `behavior`:
    - "corrected": s is held at 100 or less while training.
    - "published": s is not limited (quirk L5 of `loss/cxr_clip.py`).

    V views and T texts a study are those of the batch; without a batch both are 1. With V = 1 there is no ICL, with
    T = 1 no TCL; their terms are then absent, and the total has the others only. More than two are averaged over all
    ordered pairs. In a validation set of single images two views are the same picture, and ICL says little there.

    Both behaviors differ from the released code where a number should not depend on an accident:
    - All views pass through the image encoder together, so BatchNorm sees B * V images; the released code makes one
      pass for each view, each with its own statistics. In evaluation mode there is no difference.
    - Logits are float32 under autocast; the released ones are float16 (spacing 0.03 at 50).
    - Missing projections (two encoders of one width; the released code then takes text 1 for text 2, `clip.py`) and a
      missing temperature (scale e instead of 1) are no options here.
    - How views and texts are drawn is the dataset's business (`data/dataset.py`), which does what the paper says. The
      released dataset never pairs two different views once a study has three or more view names, shuffles sentences
      without effect, and takes single characters where a report is no list; these are faults of reading its tables,
      not choices of the method, and are not offered.
    - Studies with the same text are negatives of each other, as they are there.

    `similarity` is the cosine of the projections, without the scale.

    Shape: images B * V and texts B * T, study by study
    """

    needs = Needs(views=2, texts=2, sentence=False)
    encoders = MappingProxyType(
        {"last_layers": 1, "text_pieces": "mean", "region_stage": "layer4", "max_tokens": 256, "text_section": "both"}
    )

    def __init__(
        self,
        *,
        pooled_dim: int,
        region_dim: int,
        text_dim: int,
        behavior: Behavior = "corrected",
        icl_weight: NonNegativeFloat = 1.0,
        tcl_weight: NonNegativeFloat = 0.5,
        label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        projection_dim: PositiveInt = 512,
        text_pooling: Literal["eos", "cls", "mean"] = "eos",
        temperature: PositiveFloat = 0.07,
    ) -> None:
        super().__init__(behavior)
        self.text_pooling, self.label_smoothing = text_pooling, label_smoothing
        self.icl_weight, self.tcl_weight = icl_weight, tcl_weight
        self.has_local_embeddings = region_dim == pooled_dim
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.image_head = nn.Linear(pooled_dim, projection_dim)
        self.text_head = nn.Linear(text_dim, projection_dim)

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B studies. Raises ValueError where images, texts and the batch's V and T do not fit together."""
        views, per_study = (1, 1) if batch is None else (batch.views, batch.texts_per_study)
        n_images, n_texts = len(images.pooled), len(texts.tokens)
        if n_images % views or n_texts % per_study or n_images // views != n_texts // per_study:
            both = f"{n_images} images with {views} a study and {n_texts} texts with {per_study} a study"
            raise ValueError(f"{both} are not the same studies")
        image, text = self.global_embeddings(images, texts)
        # one matrix a pair of views instead of B x B blocks of a larger one: every block is its own softmax
        image_views = image.unflatten(0, (-1, views)).unbind(1)
        text_views = text.unflatten(0, (-1, per_study)).unbind(1)
        scale, smoothing = self._scale(), self.label_smoothing if self.training else 0.0
        pairs = product(image_views, text_views)
        both = [contrastive_terms(scale * cosine_matrix(i, t), label_smoothing=smoothing) for i, t in pairs]
        to_text, to_image = (torch.stack(terms).mean() for terms in zip(*both, strict=True))
        terms = {"image_to_text": to_text, "text_to_image": to_image}
        total = (to_text + to_image) / 2
        for name, weight, vectors in (("icl", self.icl_weight, image_views), ("tcl", self.tcl_weight, text_views)):
            if len(vectors) > 1:
                ordered = [scale * cosine_matrix(one, other) for one, other in permutations(vectors, 2)]
                terms[name] = torch.stack([contrastive_terms(logits)[0] for logits in ordered]).mean()
                total = total + weight * terms[name]
        return ObjectiveOutput(total=total, terms=terms)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return self.text_head(self._pooled_text(texts))

    def _pooled_text(self, texts: TextFeatures) -> Tensor:
        """(N, L, Dt) -> (N, Dt) by `text_pooling`."""
        tokens, mask = texts.tokens, texts.token_mask
        if self.text_pooling == "cls":
            return tokens[:, 0]
        if self.text_pooling == "mean":
            return (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]

    def _scale(self) -> Tensor:
        """The factor of the cosines, s."""
        if self.behavior == "corrected":
            if not self.training:
                return self.logit_scale.clamp(max=LARGEST_LOG_SCALE).exp()
            # the parameter itself is put back, as CLIP does: behind a clamp it would get no gradient to come down by
            with torch.no_grad():
                self.logit_scale.clamp_(max=LARGEST_LOG_SCALE)
        return self.logit_scale.exp()
