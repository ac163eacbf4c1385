"""GLoRIA's functions of a model, images and texts: similarities, zero-shot classification, prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from gloria_core.data.prompts import PromptError, class_combinations, gloria_class_prompts, load_prompts
from gloria_core.gloria_api.model import GLoRIA, hidden
from gloria_core.tasks.zero_shot import Normalise, combine

SimilarityType = Literal["global", "local", "both"]
IDS = ("caption_ids", "attention_mask", "token_type_ids")


def get_similarities(
    gloria_model: GLoRIA,
    imgs: Tensor,
    txts: Mapping[str, Any],
    similarity_type: SimilarityType = "both",
    *,
    batch_size: int = 64,
    progress: bool | None = None,
) -> np.ndarray:
    """(B, N) similarities of images with texts; "both" is the mean of "local" (-5 to 5) and "global" (-1 to 1).

    `imgs` from `gloria_model.process_img`, `txts` from `gloria_model.process_text`, on any device.
    `batch_size` images are encoded at a time, each once. A model whose image encoder is in training mode, as the
    released loader leaves it, gets all of them at once, because what it gives for one depends on the others.
    `progress`: a bar over the images; None shows it in a terminal or notebook when there are more than one batch.
    Raises RuntimeError for inputs that were not processed, and for an unknown type.
    """
    if similarity_type not in ("global", "local", "both"):
        raise RuntimeError(f'similarity type should be "global", "local" or "both", not {similarity_type!r}')
    if isinstance(txts, str | list | tuple):
        raise RuntimeError("texts are not processed: use gloria_model.process_text")
    if isinstance(imgs, str | list | tuple):
        raise RuntimeError("images are not processed: use gloria_model.process_img")
    if gloria_model.img_encoder.training:
        batch_size = len(imgs)
    device = gloria_model.model.device
    rows = []
    with torch.no_grad():
        texts = [
            gloria_model.text_encoder_forward(*(txts[name][part].to(device) for name in IDS))[:2]
            for part in torch.arange(len(txts["caption_ids"])).split(batch_size)
        ]
        words, sentences = (torch.cat(parts) for parts in zip(*texts, strict=True))
        bar = tqdm(total=len(imgs), desc="compare images", disable=hidden(progress, len(imgs), few=batch_size))
        with bar:
            for part in imgs.split(batch_size):
                regions, whole = gloria_model.image_encoder_forward(part.to(device))
                found = []
                if similarity_type != "global":
                    found.append(gloria_model.get_local_similarities(regions, words, txts["cap_lens"]))
                if similarity_type != "local":
                    found.append(gloria_model.get_global_similarities(whole, sentences))
                rows.append(torch.stack(found).mean(dim=0))
                bar.update(len(part))
    return torch.cat(rows).numpy()


def zero_shot_classification(
    gloria_model: GLoRIA,
    imgs: Tensor,
    cls_txt_mapping: Mapping[str, Mapping[str, Any]],
    *,
    normalise: Normalise = "cohort",
    batch_size: int = 64,
    progress: bool | None = None,
) -> pd.DataFrame:
    """B rows and a column for each class: the best of the class's prompts, standardised over the B images.

    With `normalise="cohort"`, the original's way, a score depends on all images of the call, two images score plus and
    minus one, a single image is left unstandardised, and a class that does not vary scores zero (there, NaN).
    "none" leaves the similarities as they are, so that calls can be compared. For other arguments and what is raised
    see `get_similarities`; images are encoded once, not once for every class.
    """
    if not cls_txt_mapping:
        raise ValueError("no class to score")
    sizes = {name: len(texts["caption_ids"]) for name, texts in cls_txt_mapping.items()}
    joined: dict[str, Any] = {name: torch.cat([t[name] for t in cls_txt_mapping.values()]) for name in IDS}
    joined["cap_lens"] = [length for texts in cls_txt_mapping.values() for length in texts["cap_lens"]]
    found = get_similarities(gloria_model, imgs, joined, "both", batch_size=batch_size, progress=progress)
    numbers = iter(range(found.shape[1]))
    prompts = {name: [str(next(numbers)) for _ in range(size)] for name, size in sizes.items()}
    names = [number for listed in prompts.values() for number in listed]
    way: Normalise = normalise if len(found) > 1 else "none"
    return pd.DataFrame(combine(found, names, prompts, scoring="max", normalise=way), columns=list(cls_txt_mapping))


def generate_chexpert_class_prompts(n: int = 5, *, seed: int | None = 6) -> dict[str, list[str]]:
    """n prompts for each of the five competition findings: what the original gives on its first call.

    The original draws from Python's global generator, which its import seeds with 6, so that later calls differ.
    `seed=None` draws from the global generator too (call `random.seed(6)` first for the same sequence).
    Raises PromptError (a ValueError) where a class has fewer than n prompts; Cardiomegaly has 15.
    """
    if seed is not None:
        return gloria_class_prompts(n, seed)
    prompts, result = load_prompts("chexpert_gloria"), {}
    for label in prompts.combinations:
        candidates = class_combinations(prompts, label)
        if not 0 < n <= len(candidates):
            raise PromptError(f"{label} has {len(candidates)} prompts, {n} are asked for")
        result[label] = random.sample(candidates, n)
    return result
