"""GLoRIA's loaders: the pretrained model, and a classifier or a U-Net on its image encoder."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from gloria_core.checkpoints.image_models import ImageClassifier, unet
from gloria_core.checkpoints.model import VisionLanguageModel
from gloria_core.checkpoints.published import PublishedModel, load_pretrained
from gloria_core.data.tokenizer import load_tokenizer
from gloria_core.gloria_api.model import GLoRIAModel
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.types import Behavior

FILES = {"gloria_resnet50": "chexpert_resnet50.ckpt", "gloria_resnet18": "chexpert_resnet18.ckpt"}
FOLDER_VARIABLE = "GLORIA_PRETRAINED"
SOURCE = "https://stanfordmedicine.box.com/s/j5h7q99f3pfi7enc0dom73m4nsm6yzvh"

Device = torch.device | str | None
Tokenizer = PreTrainedTokenizerFast | str | Path | None


class ModelNotFoundError(RuntimeError):
    """Weights are not where they should be; the message says what to download from where, and where to put it."""


def available_models() -> list[str]:
    """Names that `load_gloria` and `load_img_classification_model` take besides a path."""
    return list(FILES)


def available_segmentation_models() -> list[str]:
    """Names that `load_img_segmentation_model` takes besides a path."""
    return ["gloria_resnet50"]


def load_gloria(
    name: str | Path = "gloria_resnet50",
    device: Device = None,
    *,
    tokenizer: Tokenizer = None,
    behavior: Behavior = "corrected",
    batch_statistics: bool = False,
) -> GLoRIAModel:
    """A published GLoRIA in evaluation mode.

    `name`: one of `available_models()`, whose files are looked for in the folder that the environment variable
    GLORIA_PRETRAINED names, else in `./pretrained`; or the path of a checkpoint of GLoRIA or gloria-Extended. The
    architecture is read from the file, whatever its name says.
    `device`: the GPU where there is one, by default.
    `tokenizer`: a tokenizer, or a folder, `vocab.txt` or `tokenizer.json` to read it from, or a name of the hub. None
    takes the one that the checkpoint names from the hub, when it is first needed.
    `behavior`: see `gloria_core.gloria_api`.
    `batch_statistics`: leave the image encoder in training mode, as the released loader does: what it gives for an
    image then depends on the batch, and its stored statistics move with every call.
    Raises ModelNotFoundError (a RuntimeError), WeightsError, TokenizerError.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    model = _load(name, available_models())
    published = isinstance(model, VisionLanguageModel) and model.behavior == "published"
    if not published or model.config.objective != "gloria":
        raise ModelNotFoundError(f"{name} holds no published GLoRIA ({_kind(model)}); use gloria_core.load_pretrained")
    gloria = GLoRIAModel(model, tokenizer=tokenizer, behavior=behavior).to(_device(device)).eval()
    if batch_statistics:
        gloria.img_encoder.train()
    return gloria


def load_img_classification_model(
    name: str | Path = "gloria_resnet50",
    device: Device = None,
    num_cls: int = 1,
    freeze_encoder: bool = True,
    *,
    batch_statistics: bool = False,
) -> ImageClassifier:
    """The pretrained image encoder with a new linear head of `num_cls` logits on its pooled feature.

    A frozen encoder gets no gradient and stays in evaluation mode; `batch_statistics=True` lets its BatchNorm follow
    `.train()` as in the released code. `name` may also be a file that holds an image encoder alone. `device` and what
    is raised: see `load_gloria`. Returned in evaluation mode.
    """
    encoder = _load_image_encoder(name, available_models())
    model = ImageClassifier(encoder, num_cls, frozen=freeze_encoder, batch_statistics=batch_statistics)
    return model.to(_device(device)).eval()


def load_img_segmentation_model(name: str | Path = "gloria_resnet50", device: Device = None) -> torch.nn.Module:
    """segmentation-models-pytorch's U-Net (one class, logits) with the pretrained encoder and a new decoder.

    It reads images at their own size: the 299-pixel resize is no part of it. `name` may also be a file that holds an
    image encoder alone. `device` and what is raised: see `load_gloria`, and ValueError for an encoder that is no
    ResNet. Returned in evaluation mode: call `.train()` before training it.
    """
    encoder = _load_image_encoder(name, available_segmentation_models())
    if encoder.name not in ("resnet18", "resnet34", "resnet50"):
        raise ValueError(f"{name} holds a {encoder.name}; the U-Net is made for ResNets")
    model = unet(encoder.name, in_channels=encoder.in_channels)
    model.encoder.load_state_dict(encoder.trunk.state_dict())
    return model.to(_device(device)).eval()


def _load(name: str | Path, available: list[str]) -> PublishedModel:
    """The model of a name or a file. Raises ModelNotFoundError for an unknown name and for a file that is not there."""
    path = Path(name)
    if str(name) in available:
        path = Path(os.environ.get(FOLDER_VARIABLE, "pretrained")) / FILES[str(name)]
    if not path.is_file():
        here = f"{str(name)!r}: no file {path.absolute()}. Available models: {', '.join(available)}"
        if str(name) not in available:
            raise ModelNotFoundError(f"{here}, or the path of a checkpoint")
        raise ModelNotFoundError(
            f"{here}. Download {path.name} from {SOURCE} and put it there, or name its folder in the environment "
            f"variable {FOLDER_VARIABLE}, or give its path as the name"
        )
    return load_pretrained(path)


def _load_image_encoder(name: str | Path, available: list[str]) -> ImageEncoder:
    model = _load(name, available)
    encoder = getattr(model, "image_encoder", model)
    if not isinstance(encoder, ImageEncoder):
        raise ModelNotFoundError(f"{name} holds no pretrained image encoder ({_kind(model)})")
    return encoder


def _device(device: Device) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _kind(model: PublishedModel) -> str:
    return f"{type(model).__name__}, {getattr(model, 'origin', 'of unknown origin')}"
