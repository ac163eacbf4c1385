"""GLoRIA's own model class, over ours: the same methods, the same shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.geometry import Geometry, center_crop
from gloria_core.data.images import read_gray, to_tensor
from gloria_core.data.reports import ReportError, clean_report, legacy_cap_len
from gloria_core.data.tokenizer import (
    TokenizerError,
    load_tokenizer,
    text_batch_from_ids,
    tokenize,
    vocabulary_list,
)
from gloria_core.models.heads import cosine_matrix
from gloria_core.models.word_region import attend, word_region_similarity
from gloria_core.objectives.gloria import PUBLISHED_INFERENCE
from gloria_core.types import Behavior

_WORDS = re.compile(r"\w+")


class GLoRIA(nn.Module):
    """A published GLoRIA with the methods of `gloria/models/gloria_model.py`; made by `load_gloria`.

    `behavior`: see `gloria_core.gloria_api`. `tokenizer` may be None: it is then looked for under the name that the
    checkpoint gives when a text is first processed.

    Shapes of the original's tensors: images (B, 3, H, W), their regions (B, D, 19, 19) and global vectors (B, D);
    texts' ids (N, L), their words (N, D, L) with `[CLS]` first and zero columns last, and sentence vectors (N, D).
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        tokenizer: PreTrainedTokenizerFast | None = None,
        behavior: Behavior = "corrected",
    ) -> None:
        super().__init__()
        if behavior not in ("published", "corrected"):
            raise ValueError(f'behavior must be "published" or "corrected", got {behavior!r}')
        self.model, self.behavior = model, behavior
        self._tokenizer = tokenizer if tokenizer is not None else model.tokenizer

    @property
    def img_encoder(self) -> nn.Module:
        return self.model.image_encoder

    @property
    def text_encoder(self) -> nn.Module:
        return self.model.text_encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Raises TokenizerError, which says what to give, where none was given and the hub has none for us."""
        if self._tokenizer is None:
            try:
                self._tokenizer = load_tokenizer(self.model.config.text_encoder)
            except TokenizerError as error:
                raise TokenizerError(f"{error}: load_gloria(..., tokenizer=<folder or vocab.txt>)") from error
        return self._tokenizer

    @property
    def ixtoword(self) -> dict[int, str]:
        return dict(enumerate(vocabulary_list(self.tokenizer)))

    # ------------------------------------------------------------------------------------------------ processing

    def process_text(self, text: str | Sequence[str], device: torch.device | str | None = None) -> dict[str, Any]:
        """One text or N -> `caption_ids`, `attention_mask`, `token_type_ids` (N, 97), and `cap_lens`, N window lengths.

        Words are lower-case runs of letters and digits, ASCII only. `device`: by default the model's.
        Raises ReportError for a text without a word ("published" encodes it as empty).
        """
        texts = [text] if isinstance(text, str) else list(text)
        published, width = self.behavior == "published", self.model.config.max_tokens
        cleaned = [clean_report(one) if published else _all_words(one) for one in texts]
        for original, words in zip(texts, cleaned, strict=True):
            if not words and not published:
                raise ReportError(f"{original[:40]!r} has no word to compare with")
        batch = tokenize(self.tokenizer, cleaned, max_tokens=width, allow_empty=True)
        missing = width - batch.input_ids.shape[1]
        lengths = [legacy_cap_len(one) for one in texts] if published else (batch.word_ids.amax(dim=1) - 1).tolist()
        where = self.model.device if device is None else device
        return {
            "caption_ids": F.pad(batch.input_ids, (0, missing), value=self.tokenizer.pad_token_id).to(where),
            "attention_mask": F.pad(batch.attention_mask, (0, missing)).to(where),
            "token_type_ids": F.pad(batch.token_type_ids, (0, missing)).to(where),
            "cap_lens": lengths,
        }

    def process_class_prompts(
        self, class_prompts: Mapping[str, str | Sequence[str]], device: torch.device | str | None = None
    ) -> dict[str, dict[str, Any]]:
        """`process_text` of each class's prompts, in the same order."""
        return {name: self.process_text(prompts, device) for name, prompts in class_prompts.items()}

    def process_img(
        self,
        paths: str | Path | Sequence[str | Path],
        device: torch.device | str | None = None,
        *,
        progress: bool | None = None,
    ) -> Tensor:
        """Image files (PNG, JPEG, DICOM) -> (B, C, 224, 224), padded to a square of 256, cropped and normalised.

        `progress`: a bar over the files; None shows it in a terminal or notebook when there are more than 64.
        Raises ImageError that names the file.
        """
        paths = [paths] if isinstance(paths, str | Path) else list(paths)
        if not paths:
            raise ValueError("no image to process")
        config, found = self.model.config, []
        for path in tqdm(paths, desc="read images", disable=hidden(progress, len(paths))):
            image = read_gray(path)
            placed = Geometry.fit(*image.shape, config.image_size, behavior=self.behavior).apply(image)
            found.append(center_crop(placed, config.crop))
        tensor = to_tensor(np.stack(found), channels=config.channels, norm=config.norm)
        return tensor.to(self.model.device if device is None else device)

    # -------------------------------------------------------------------------------------------------- encoding

    def image_encoder_forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        """Regions (B, D, h, w) and global vectors (B, D) of images, in this order."""
        features, objective = self.model.encode_images(imgs), self.model.objective
        regions = objective.local_embedder(features.regions).permute(0, 3, 1, 2)
        return regions, objective.global_embedder(features.pooled)

    def text_encoder_forward(
        self, caption_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor, list[list[str]]]:
        """Words (N, D, L), sentence vectors (N, D), and the words as text, padded with "[PAD]" to L."""
        tokenizer, width = self.tokenizer, caption_ids.shape[1]
        batch = text_batch_from_ids(
            caption_ids,
            attention_mask,
            token_type_ids,
            vocabulary=vocabulary_list(tokenizer),
        )
        features = self.model.encode_texts(batch)
        words = F.pad(features.words, (0, 0, 0, width - features.words.shape[1])).transpose(1, 2)
        return words, features.sentence, [[*row, *["[PAD]"] * (width - len(row))] for row in batch.words]

    def forward(self, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[list[str]]]:
        """Of a dict with `imgs` and the ids of `process_text`: both of the images, then all three of the texts."""
        texts = self.text_encoder_forward(x["caption_ids"], x["attention_mask"], x["token_type_ids"])
        return (*self.image_encoder_forward(x["imgs"]), *texts)

    # ------------------------------------------------------------------------------------------------- comparing

    @torch.no_grad()
    def get_global_similarities(self, img_emb_g: Tensor, text_emb_g: Tensor) -> Tensor:
        """(B, N) cosines, on the CPU."""
        return cosine_matrix(img_emb_g, text_emb_g).cpu()

    @torch.no_grad()
    def get_local_similarities(self, img_emb_l: Tensor, text_emb_l: Tensor, cap_lens: Sequence[int]) -> Tensor:
        """(B, N) five times the best word's cosine with the image as that word sees it, on the CPU.

        The words are columns 1 to `cap_lens`, the last column at most.
        """
        words = text_emb_l.transpose(1, 2)
        column = torch.arange(words.shape[1], device=words.device)
        last = torch.as_tensor(cap_lens, device=words.device).clamp(max=words.shape[1] - 1)
        mask = (column >= 1) & (column <= last[:, None])
        return word_region_similarity(img_emb_l.permute(0, 2, 3, 1), words, mask, **PUBLISHED_INFERENCE).cpu()

    @torch.no_grad()
    def get_attn_maps(self, img_emb_l: Tensor, text_emb_l: Tensor, sents: Sequence[Sequence[str]]) -> list[Tensor]:
        """For each image with its text the maps of training, (1, L_i, h, w): `[CLS]`, then words; each sums to one.

        Raises ValueError where images and texts differ in number.
        """
        if len(img_emb_l) != len(text_emb_l):
            raise ValueError(
                f"maps are of image n with text n: got {len(img_emb_l)} images and {len(text_emb_l)} texts"
            )
        height, width = img_emb_l.shape[2:]
        maps = []
        for regions, words, sent in zip(img_emb_l, text_emb_l, sents, strict=True):
            length = 1 + sum(not word.startswith("[") for word in sent)
            scores = (regions.flatten(1).T @ words[:, :length])[None]
            mask = torch.ones(1, 1, length, dtype=torch.bool, device=scores.device)
            weights = attend(scores, mask, self.model.objective.temp_attention)
            maps.append(weights.transpose(1, 2).reshape(1, length, height, width))
        return maps


def _all_words(text: str) -> str:
    words = (word.encode("ascii", "ignore").decode() for word in _WORDS.findall(text.lower()))
    return " ".join(word for word in words if word)


def hidden(progress: bool | None, count: int, *, few: int = 64) -> bool | None:
    """tqdm's `disable` for a choice of the user's, or none: then shown in a terminal when there are more than `few`."""
    if progress is None:
        return True if count <= few else None
    return not progress
