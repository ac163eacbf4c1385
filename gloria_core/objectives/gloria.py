"""GLoRIA: global and word-region contrastive learning of radiographs and reports.

Huang, Shen, Lungren, Yeung: "GLoRIA: A Multimodal Global-Local Representation Learning Framework for Label-efficient
Medical Image Recognition", ICCV 2021. Released code: github.com/marshuang80/gloria (`gloria_loss.py`,
`gloria_model.py`). With region vectors v_r, word vectors w_t and the sum over the words t of one text:

    s_rt = v_r . w_t                                        scores, unscaled                    (eq. 3)
    a_rt = softmax_r( temp_attention * softmax_t(s_rt) )    words compete, then regions         (released code)
    c_t  = sum_r a_rt v_r                                   the text's word seen in the image   (eq. 4)
    Z    = log sum_t exp( temp_similarity * cos(w_t, c_t) ) similarity of image and text        (eq. 5)
    loss = InfoNCE(temp_loss * Z) + InfoNCE(temp_loss * cos(global image, sentence)), both directions  (eqs. 1, 2, 6, 7)
"""

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn

from gloria_core.models.heads import contrastive_terms, cosine_matrix, widened
from gloria_core.models.word_region import Aggregation, attend, word_region_similarity
from gloria_core.objectives.base import Objective
from gloria_core.types import AttentionRows, Batch, Behavior, ImageFeatures, ObjectiveOutput, TextFeatures

TERMS = ("local_image_to_text", "local_text_to_image", "global_image_to_text", "global_text_to_image")
# fixed in `gloria_model.py`
PUBLISHED_INFERENCE = {"temp_attention": 4.0, "temp_similarity": 5.0, "aggregation": "max"}


class GLoRIA(Objective):
    """Global plus word-region contrast, on projections of the image to the text encoder's width.

    `temp_attention`, `temp_similarity`, `temp_loss`: the temperatures above (4, 5, 10 in the released configuration).
    `local_weight`, `global_weight`: of the two losses; each is the sum of its two directions.
    `aggregation`: over words; "sum" is eq. 5, "mean" subtracts log(number of words), "max" keeps the best word.
    `chunk_size`: texts handled at a time in the word-region term; 0 chooses by memory. Chunks that would not fit
    together are recomputed in the backward pass, so that memory does not grow with the number of texts.
    `behavior`:
    - "corrected": the words of a text are its words: no `[CLS]`, no `[SEP]`, unknown words included. Scores are divided
      by sqrt(D), as in scaled dot-product attention: large unscaled ones let one word win every region, and the
      maps are then flat whatever the image. No controlled comparison of the two has been made. `similarity` puts
      both parts on the cosine scale: the local one is log-mean-exp over words divided by `temp_similarity` (the best
      word's cosine with "max"), and both are averaged by their loss weights. It does not grow with text length.
    - "published": training uses columns 0..L-1, `[CLS]` first, where L = 1 + words that do not begin with "[": every
      unknown word cuts one word off the end. `similarity` is (local + global) / 2 with
      local = 5 * max over words 1..n, so its range is -3 to 3, whatever the options.

    Shape: images B, texts N; projections have the text encoder's width D
    """

    rows = AttentionRows(unit="word", normalisation="softmax")
    has_local_embeddings = True
    attention_formula = r"a_{rt} = \mathrm{softmax}_r\,(4\,\mathrm{softmax}_t\, v_r \cdot w_t)"

    def __init__(
        self,
        *,
        pooled_dim: int,
        region_dim: int,
        text_dim: int,
        behavior: Behavior = "corrected",
        temp_attention: PositiveFloat = 4.0,
        temp_similarity: PositiveFloat = 5.0,
        temp_loss: PositiveFloat = 10.0,
        local_weight: NonNegativeFloat = 1.0,
        global_weight: NonNegativeFloat = 1.0,
        aggregation: Aggregation = "sum",
        chunk_size: NonNegativeInt = 0,
    ) -> None:
        super().__init__(behavior)
        if local_weight + global_weight == 0:
            raise ValueError("the loss weights are both zero")
        self.temp_attention, self.temp_loss, self.chunk_size = temp_attention, temp_loss, chunk_size
        temperatures = {"temp_attention": temp_attention, "temp_similarity": temp_similarity}
        self.settings = temperatures | {"aggregation": aggregation}
        self.local_weight, self.global_weight = local_weight, global_weight
        self.global_embedder = nn.Linear(pooled_dim, text_dim)
        self.local_embedder = nn.Linear(region_dim, text_dim, bias=False)  # a 1x1 convolution, channels last

    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B pairs. Raises ValueError where images and texts differ in number or a text has no words."""
        regions, words, mask = self.local_embeddings(images, texts)
        local = word_region_similarity(regions, words, mask, chunk_size=self.chunk_size, **self.settings)
        local_terms = contrastive_terms(self.temp_loss * local)
        global_terms = contrastive_terms(self.temp_loss * cosine_matrix(*self.global_embeddings(images, texts)))
        total = self.local_weight * sum(local_terms) + self.global_weight * sum(global_terms)
        terms = dict(zip(TERMS, (*local_terms, *global_terms), strict=True))
        with torch.no_grad():
            attention = self._paired_attention(regions, words, mask)
        return ObjectiveOutput(total=total, terms=terms, attention=attention)

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N), in [-1, 1] for "corrected" and [-3, 3] for "published"; see the class."""
        local, whole = self.local_similarity(images, texts), self.global_similarity(images, texts)
        if self.behavior == "published":
            return (local + whole) / 2
        return (self.local_weight * local + self.global_weight * whole) / (self.local_weight + self.global_weight)

    def global_similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N) cosine of pooled image and sentence."""
        return cosine_matrix(*self.global_embeddings(images, texts))

    def local_similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N) word-region similarity as at inference, of the words 1..n.

        The released code passes the number of *characters* of a text for n, so that `[SEP]` and zero columns take
        part: `gloria_api.GLoRIAModel.get_local_similarities` takes such numbers.
        """
        published, (regions, words, _) = self.behavior == "published", self.local_embeddings(images, texts)
        best = {"aggregation": "max" if self.settings["aggregation"] == "max" else "mean"}
        settings = PUBLISHED_INFERENCE if published else self.settings | best
        mask = texts.word_mask & ~texts.special_mask
        scores = word_region_similarity(regions, words, mask, chunk_size=self.chunk_size, **settings)
        return scores if published else scores / settings["temp_similarity"]

    def attention(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(N, W, h, w): a_rt of image n and text n, or of one image and N texts; rows outside the window are zero."""
        regions, words, mask = self.local_embeddings(images, texts)
        return self._paired_attention(self.one_image_a_text(regions, len(words)), words, mask)

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Projected regions (B, h, w, D), words (N, W, D), and the mask (N, W) of the words in the training window."""
        regions = self.local_embedder(images.regions)
        if self.behavior == "corrected":
            # cosines do not feel it; the scores are then those of scaled dot-product attention
            regions = regions / texts.words.shape[-1] ** 0.5
        return regions, texts.words, self._training_window(texts)

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self.global_embedder(images.pooled)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return texts.sentence

    def _training_window(self, texts: TextFeatures) -> Tensor:
        words = texts.word_mask & ~texts.special_mask
        if self.behavior == "corrected":
            return words
        length = 1 + (words & ~texts.unknown_mask).sum(dim=1, keepdim=True)
        return torch.arange(words.shape[1], device=words.device) < length

    def _paired_attention(self, regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        n, height, width, dim = regions.shape
        scores = regions.reshape(n, height * width, dim) @ words.to(regions.dtype).transpose(1, 2)
        weights = attend(widened(scores), mask[:, None], self.temp_attention) * mask[:, None]
        return weights.transpose(1, 2).reshape(n, -1, height, width)
