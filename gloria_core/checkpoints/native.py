"""Our own checkpoint file: written atomically, read without running code, complete without any other file."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

import gloria_core
from gloria_core.checkpoints.model import ConfigError, ModelConfig, VisionLanguageModel, assemble
from gloria_core.data.files import atomic_file
from gloria_core.data.tokenizer import tokenizer_from_json, tokenizer_to_json
from gloria_core.models.weights import WeightsError, checked_file, fill

FORMAT = "gloria_core checkpoint"
NOT_ARCHITECTURE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
VERSION = 2  # 2: the Swin's tensors have timm's names, CXR-CLIP's projections are heads


def save(
    path: str | Path,
    model: VisionLanguageModel,
    *,
    training_state: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write model, configuration, tokenizer and package version, all or nothing.

    A reader sees the old file or the new one (`atomic_file`).
    `training_state` (optimizer, schedule, random states) and `extra` (notes) may hold tensors, numbers, strings,
    None, and lists, tuples and dicts of them; anything else raises TypeError that names where it is.
    """
    bert = model.text_encoder.config.to_dict()
    return write(
        path,
        config=model.config.to_dict(),
        text_architecture={name: value for name, value in bert.items() if name not in NOT_ARCHITECTURE},
        tokenizer=None if model.tokenizer is None else tokenizer_to_json(model.tokenizer),
        model=model.state_dict(),
        training_state=None if training_state is None else dict(training_state),
        extra=dict(extra or {}),
    )


def write(path: str | Path, *, model: Mapping[str, Tensor], **content: Any) -> Path:
    """Write tensors and plain values as a checkpoint of this package. Raises TypeError naming what is not plain."""
    for name, value in content.items():
        _check_plain(value, name)
    about = {"format": FORMAT, "version": VERSION, "package_version": gloria_core.__version__}
    with atomic_file(path) as file:
        torch.save({**about, **content, "model": model}, file)
    return Path(path)


def load(path: str | Path, *, map_location: str | torch.device | None = None) -> VisionLanguageModel:
    """The model of a file written by `save`, in evaluation mode; nothing is fetched from anywhere.

    `map_location`: the device of the model; None is the GPU if there is one, else the CPU.
    Raises WeightsError for a missing, truncated or foreign file, and for tensors that do not fit.
    """
    content = read(path)
    if "network" in content:
        raise WeightsError(f"{path} is a fine-tuned model: read it with gloria_core.load, or give it as `model`")
    tokenizer = tokenizer_from_json(content["tokenizer"]) if content["tokenizer"] else None
    try:
        config = ModelConfig.from_dict(content["config"])
        architecture = BertConfig.from_dict(content["text_architecture"])
        model = assemble(config, architecture, tokenizer)
        fill(model, content["model"], source=str(path))
    except (ConfigError, WeightsError) as error:
        raise WeightsError(f"{path} (package version {content['package_version']}): {error}") from error
    if map_location is None:
        map_location = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(map_location).eval()


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file as plain values and CPU tensors. Raises WeightsError."""
    if not str(path):
        raise WeightsError("`checkpoint` is blank: run notebook 02 first and give the best.pt that it writes")
    path = checked_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"checkpoint {path} cannot be read, it is truncated or no checkpoint of gloria_core; "
            "published weights are read by load_pretrained"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise WeightsError(f"{path} was not written by gloria_core: read published weights with load_pretrained")
    if content["version"] > VERSION:
        raise WeightsError(f"{path} has format version {content['version']}, this package reads {VERSION}: update it")
    return content


def _check_plain(value: object, where: str) -> None:
    """Only what `torch.load(weights_only=True)` gives back."""
    if value is None or type(value) in (bool, int, float, str, bytes) or isinstance(value, Tensor):
        return
    if isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_plain(item, f"{where}[{number}]")
    elif isinstance(value, Mapping) and type(value) is dict:
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain values only")
