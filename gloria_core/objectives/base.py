"""The contract that every objective keeps, and what those without a local loss share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict, validate_call
from torch import Tensor, nn

from gloria_core.models.heads import cosine_matrix
from gloria_core.types import AttentionRows, Batch, Behavior, ImageFeatures, Needs, ObjectiveOutput, TextFeatures


class Objective(nn.Module, ABC):
    """One paper's loss with the heads, temperatures and memories that belong to it.

    A subclass is called with the widths of the encoders it sits on, then its own options by keyword:
    `__init__(self, *, pooled_dim: int, region_dim: int, text_dim: int, behavior="corrected", ...)`. It calls
    `super().__init__(behavior)`. Options are checked by their type hints (`temperature: PositiveFloat`); a wrong one
    raises pydantic's ValidationError, a ValueError that names it.

    Attributes:
        needs: what the loader and the encoders provide; rows: what `attention` gives, None without local attention
        attention_formula: the rows of `attention` in LaTeX, for whoever shows them
        has_local_embeddings: whether `local_embeddings` is there for these encoders and options
        encoders: fields of `ModelConfig` that the paper sets otherwise than the study's defaults; notebook 02 begins
            with them
    """

    needs: ClassVar[Needs] = Needs()
    rows: ClassVar[AttentionRows | None] = None
    attention_formula: ClassVar[str] = ""
    has_local_embeddings: bool = False
    encoders: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = validate_call(config=ConfigDict(strict=True, allow_inf_nan=False))(cls.__init__)

    def __init__(self, behavior: Behavior = "corrected") -> None:
        super().__init__()
        self.behavior = behavior

    @abstractmethod
    def forward(self, images: ImageFeatures, texts: TextFeatures, batch: Batch | None = None) -> ObjectiveOutput:
        """Loss of B images paired with N = B texts. Random numbers come from torch's generators, which resuming puts
        back, and from no other."""

    def similarity(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(B, N) scores, higher is more alike; zero-shot, retrieval and figures all call this one.

        Unless the paper says otherwise, the cosine of `global_embeddings`.
        """
        return cosine_matrix(*self.global_embeddings(images, texts))

    def attention(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        """(N, W, h, w): the maps that the loss uses, image n with text n; rows of unused words are zero."""
        raise NotImplementedError(f"{type(self).__name__} has no word-region attention")

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Projected regions (B, h, w, D), words (N, W, D) and the mask (N, W) of the words that count."""
        raise NotImplementedError(f"{type(self).__name__} has no local embeddings")

    @staticmethod
    def one_image_a_text(regions: Tensor, n_texts: int) -> Tensor:
        """Regions of N images for N texts; those of one image serve all texts. Raises ValueError for other numbers."""
        if len(regions) not in (1, n_texts):
            raise ValueError(f"attention pairs images with texts: got {len(regions)} images and {n_texts} texts")
        return regions.expand(n_texts, *regions.shape[1:])

    @abstractmethod
    def embed_images(self, images: ImageFeatures) -> Tensor:
        """Projected, unnormalised global vectors (B, D)."""

    @abstractmethod
    def embed_texts(self, texts: TextFeatures) -> Tensor:
        """Projected, unnormalised global vectors (N, D)."""

    def global_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor]:
        """`embed_images` and `embed_texts`."""
        return self.embed_images(images), self.embed_texts(texts)

    @torch.no_grad()
    def on_epoch(self, epoch: int) -> None:
        """Told the number of the epoch about to start, from 0: stages, frozen prototypes, decays.

        Must depend on `epoch` and what `plan` was told alone, so that a resumed run can repeat it.
        """

    def plan(self, epochs: int) -> tuple[int, ...]:
        """Told before training how many epochs there will be; answers with the epochs at which a stage begins, 0 first.

        For every stage the optimiser and its schedule start afresh, and the best checkpoint is chosen anew, because
        the loss of another stage is another loss.
        """
        return (0,)

    def stage_rates(self) -> tuple[float, ...]:
        """Learning rate of each stage of the plan, as a share of the configured one; () is all ones."""
        return ()


class GlobalObjective(Objective):
    """An objective that contrasts whole images with whole texts, each through one head, without a local loss."""

    image_head: nn.Module
    text_head: nn.Module

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return self.image_head(images.pooled)

    def local_embeddings(self, images: ImageFeatures, texts: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Regions (B, h, w, D) and words (N, W, D) through the heads of the whole, and the mask (N, W) of words.

        For cosine maps; the heads were **never trained locally**. Raises NotImplementedError where regions are of
        another stage than the pooled vector.
        """
        if images.regions.shape[-1] != images.pooled.shape[-1]:
            fault = f"{type(self).__name__} projects the last stage only"
            raise NotImplementedError(f'{fault}: build the model with region_stage="layer4"')
        return self.image_head(images.regions), self.text_head(texts.words), texts.word_mask & ~texts.special_mask
