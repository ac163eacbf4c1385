"""GLoRIA's own model class over ours, with the same methods and shapes, and its functions of a model: similarities,
zero-shot classification, prompts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.data.geometry import Geometry, center_crop
from gloria_core.data.images import read_gray, to_tensor
from gloria_core.data.prompts import gloria_class_prompts
from gloria_core.data.reports import ReportError, clean_report, legacy_cap_len
from gloria_core.data.tokenizer import TokenizerError, load_tokenizer, text_batch_from_ids, tokenize, vocabulary_list
from gloria_core.models.heads import cosine_matrix
from gloria_core.models.word_region import attend, word_region_similarity
from gloria_core.objectives.gloria import PUBLISHED_INFERENCE
from gloria_core.tasks.zero_shot import Normalise, combine
from gloria_core.types import Behavior

SimilarityType = Literal["global", "local", "both"]
IDS = ("caption_ids", "attention_mask", "token_type_ids")


class GLoRIAModel(nn.Module):
    """A published GLoRIA with the methods of `gloria/models/gloria_model.py`; made by `load_gloria`.

    The original calls this class GLoRIA; here that is the objective (`gloria_core.objectives.gloria.GLoRIA`).

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

    def _device(self, device: torch.device | str | None) -> torch.device | str:
        return self.model.device if device is None else device

    # ------------------------------------------------------------------------------------------------ processing

    def process_text(self, text: str | Sequence[str], device: torch.device | str | None = None) -> dict[str, Any]:
        """One text or N -> `caption_ids`, `attention_mask`, `token_type_ids` (N, 97), and `cap_lens`, N window lengths.

        Words are lower-case runs of letters and digits, ASCII only. `device`: by default the model's.
        Raises ReportError for a text without a word ("published" encodes it as empty).
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, Iterable) or not (texts := list(texts)) or not all(isinstance(t, str) for t in texts):
            raise TypeError(f"process_text takes a text or a list of texts, got {_described(text)}")
        published, width = self.behavior == "published", self.model.config.max_tokens
        cleaned = [clean_report(one) if published else _ascii_words(one) for one in texts]
        if not published and not all(cleaned):
            raise ReportError(f"{texts[cleaned.index('')][:40]!r} has no word to compare with")
        batch = tokenize(self.tokenizer, cleaned, max_tokens=width, allow_empty=True)
        missing, fill = (0, width - batch.input_ids.shape[1]), self.tokenizer.pad_token_id
        ids = F.pad(batch.input_ids, missing, value=fill)
        masks = (F.pad(mask, missing) for mask in (batch.attention_mask, batch.token_type_ids))
        processed = {name: column.to(self._device(device)) for name, column in zip(IDS, (ids, *masks), strict=True)}
        lengths = [legacy_cap_len(one) for one in texts] if published else (batch.word_ids.amax(dim=1) - 1).tolist()
        return processed | {"cap_lens": lengths}

    def process_class_prompts(
        self, class_prompts: Mapping[str, str | Sequence[str]], device: torch.device | str | None = None
    ) -> dict[str, dict[str, Any]]:
        """`process_text` of each class's prompts, in the same order."""
        if not isinstance(class_prompts, Mapping):
            raise TypeError(f"class_prompts must be a dict, class -> texts, got {_described(class_prompts)}")
        return {name: self.process_text(prompts, device) for name, prompts in class_prompts.items()}

    def process_img(
        self,
        paths: str | Path | Sequence[str | Path],
        device: torch.device | str | None = None,
        *,
        progress: bool | None = None,
    ) -> Tensor:
        """One path or B of image files (PNG, JPEG, DICOM) -> (B, 3, 224, 224), padded to a square of 256, cropped and
        normalised: what `get_similarities` and `zero_shot_classification` take as `imgs`.

        `progress`: a bar over the files; None shows it in a terminal or notebook when there are more than 64.
        Raises ImageError that names the file, ValueError for no path.
        """
        wanted = "process_img takes the path of an image file, or a list of paths"
        given = paths if isinstance(paths, Iterable) and not isinstance(paths, str) else [paths]
        paths = list(given)
        if not all(isinstance(path, str | Path) for path in paths):
            raise TypeError(f"{wanted}, got {_described(given if len(paths) > 1 else paths[0])}")
        if not paths:
            raise ValueError(f"no image to process: {wanted}")
        config, crops = self.model.config, []
        for path in tqdm(paths, desc="read images", disable=hidden(progress, len(paths))):
            image = read_gray(path)
            placed = Geometry.fit(*image.shape, config.image_size, behavior=self.behavior).apply(image)
            crops.append(center_crop(placed, config.crop))
        return to_tensor(np.stack(crops), channels=config.channels, norm=config.norm).to(self._device(device))

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
        vocabulary, width = vocabulary_list(self.tokenizer), caption_ids.shape[1]
        batch = text_batch_from_ids(caption_ids, attention_mask, token_type_ids, vocabulary=vocabulary)
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
        images, texts = len(img_emb_l), len(text_emb_l)
        if images != texts:
            raise ValueError(f"maps are of image n with text n: got {images} images and {texts} texts")
        maps = []
        for regions, words, sent in zip(img_emb_l, text_emb_l, sents, strict=True):
            length = 1 + sum(not word.startswith("[") for word in sent)
            scores = (regions.flatten(1).T @ words[:, :length])[None]
            mask = torch.ones(1, 1, length, dtype=torch.bool, device=scores.device)
            weights = attend(scores, mask, self.model.objective.temp_attention)
            maps.append(weights.transpose(1, 2).reshape(1, length, *img_emb_l.shape[2:]))
        return maps


def _ascii_words(text: str) -> str:
    words = re.findall(r"\w+", text.lower())
    return " ".join(word for word in (word.encode("ascii", "ignore").decode() for word in words) if word)


def hidden(progress: bool | None, count: int, *, few: int = 64) -> bool | None:
    """tqdm's `disable` for the user's choice; None shows the bar in a terminal where there are more than `few`."""
    return not progress if progress is not None else count <= few or None


def get_similarities(
    gloria_model: GLoRIAModel,
    imgs: Tensor,
    txts: Mapping[str, Any],
    similarity_type: SimilarityType = "both",
    *,
    batch_size: int = 64,
    progress: bool | None = None,
) -> np.ndarray:
    """(B, N) similarities of images with texts; "both" is the mean of "local" (-5 to 5) and "global" (-1 to 1).

    `imgs`: tensor (B, 3, H, W) of `gloria_model.process_img`; `txts`: dict of `gloria_model.process_text`, with
    `caption_ids`, `attention_mask`, `token_type_ids` (N, 97) and `cap_lens`; on any device.
    `batch_size` images are encoded at a time, each once. A model whose image encoder is in training mode, as the
    released loader leaves it, gets all of them at once, because what it gives for one depends on the others.
    `progress`: a bar over the images; None shows it in a terminal or notebook when there are more than one batch.
    Raises RuntimeError for other inputs (paths, texts), and for an unknown type.
    """
    if similarity_type not in ("global", "local", "both"):
        raise RuntimeError(f'similarity type should be "global", "local" or "both", not {similarity_type!r}')
    if not isinstance(gloria_model, GLoRIAModel):
        raise RuntimeError(f"gloria_model must be what load_gloria returns, got {_described(gloria_model)}")
    if not isinstance(imgs, Tensor) or imgs.ndim != 4 or imgs.shape[1] != 3 or not imgs.is_floating_point():
        raise RuntimeError(f"imgs must be a tensor (B, 3, H, W), got {_described(imgs)}: use gloria_model.process_img")
    if not isinstance(txts, Mapping) or not {*IDS, "cap_lens"} <= set(txts):
        wanted = ", ".join((*IDS, "cap_lens"))
        raise RuntimeError(f"txts must have {wanted}, got {_described(txts)}: use gloria_model.process_text")
    if gloria_model.img_encoder.training:
        batch_size = len(imgs)
    device = gloria_model.model.device
    rows = []
    with torch.no_grad(), tqdm(total=len(imgs), disable=hidden(progress, len(imgs), few=batch_size)) as bar:
        texts = [
            gloria_model.text_encoder_forward(*(txts[name][part].to(device) for name in IDS))[:2]
            for part in torch.arange(len(txts["caption_ids"])).split(batch_size)
        ]
        words, sentences = (torch.cat(parts) for parts in zip(*texts, strict=True))
        for part in imgs.split(batch_size):
            regions, pooled = gloria_model.image_encoder_forward(part.to(device))
            parts = []
            if similarity_type != "global":
                parts.append(gloria_model.get_local_similarities(regions, words, txts["cap_lens"]))
            if similarity_type != "local":
                parts.append(gloria_model.get_global_similarities(pooled, sentences))
            rows.append(torch.stack(parts).mean(dim=0))
            bar.update(len(part))
    return torch.cat(rows).numpy()


def zero_shot_classification(
    gloria_model: GLoRIAModel,
    imgs: Tensor,
    cls_txt_mapping: Mapping[str, Mapping[str, Any]],
    *,
    normalise: Normalise = "cohort",
    batch_size: int = 64,
    progress: bool | None = None,
) -> pd.DataFrame:
    """B rows and a column for each class: the best of the class's prompts, standardised over the B images.

    `imgs`: tensor (B, 3, H, W) of `gloria_model.process_img`; `cls_txt_mapping`: class -> dict of
    `gloria_model.process_text`, as `gloria_model.process_class_prompts` gives them.

    With `normalise="cohort"`, the original's way, a score depends on all images of the call, two images score plus and
    minus one, a single image is left unstandardised, and a class that does not vary scores zero (there, NaN).
    "none" leaves the similarities as they are, so that calls can be compared. For other arguments and what is raised
    see `get_similarities`; images are encoded once, not once for every class.
    """
    if not isinstance(cls_txt_mapping, Mapping):
        wanted = "cls_txt_mapping must be a dict, class -> processed texts"
        raise RuntimeError(f"{wanted}, got {_described(cls_txt_mapping)}: use gloria_model.process_class_prompts")
    if not cls_txt_mapping:
        raise ValueError("no class to score")
    raw = [name for name, texts in cls_txt_mapping.items() if not isinstance(texts, Mapping)]
    if raw:
        raise RuntimeError(f"the texts of class {raw[0]!r} are not processed: use gloria_model.process_class_prompts")
    joined: dict[str, Any] = {name: torch.cat([texts[name] for texts in cls_txt_mapping.values()]) for name in IDS}
    joined["cap_lens"] = [length for texts in cls_txt_mapping.values() for length in texts["cap_lens"]]
    similarity = get_similarities(gloria_model, imgs, joined, "both", batch_size=batch_size, progress=progress)
    names, counts = list(cls_txt_mapping), [len(texts["caption_ids"]) for texts in cls_txt_mapping.values()]
    best = [part.max(axis=1) for part in np.split(similarity, np.cumsum(counts)[:-1], axis=1)]
    scaled: Normalise = normalise if len(imgs) > 1 else "none"
    best = pd.DataFrame(dict(zip(names, best, strict=True)))
    return combine(best, {name: [name] for name in names}, normalise=scaled)


def generate_chexpert_class_prompts(n: int = 5, *, seed: int | None = 6) -> dict[str, list[str]]:
    """n prompts for each of the five competition findings: what the original gives on its first call.

    The original draws from Python's global generator, which its import seeds with 6, so that later calls differ.
    `seed=None` draws from the global generator too (call `random.seed(6)` first for the same sequence).
    Raises PromptError (a ValueError) where a class has fewer than n prompts; Cardiomegaly has 15.
    """
    return gloria_class_prompts(n, seed)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    inside = {type(item).__name__ for item in value} if isinstance(value, list | tuple) else ()
    return f"a {type(value).__name__}" + (f" of {', '.join(sorted(inside))}" if inside else "")
