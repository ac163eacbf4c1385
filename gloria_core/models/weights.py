"""Where pretrained tensors come from, and how they enter a module: all of them or an error, never some of them."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

# What `DistributedDataParallel` and `torch.compile` put before or between names.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
# Names shown in an error.
SHOWN = 5


class WeightsError(ValueError):
    """A file of weights or a checkpoint could not be found, read or fitted; the message names file and remedy."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a `torch.save` file opened with `weights_only=True` (runs no code).

    A file that has its tensors one level down under "state_dict" or "model" is unwrapped; names are those of
    `plain_names`. Raises WeightsError for a missing or truncated file, and for one that holds anything else.
    """
    path = checked_file(path)
    try:
        content = read_safetensors(path)
        if content is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot read weights from {path}: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no plain state dict (names -> tensors)")
    return plain_names(content)


def first_line(error: Exception) -> str:
    """The first line of an error's message, without PyTorch's advice to load unsafely; its class where it has none."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return (text.splitlines() or [type(error).__name__])[0]


def checked_file(path: str | Path) -> Path:
    """The path of a file that exists and is not what failed downloads leave: a Git LFS pointer, a web page, a message.

    Raises WeightsError for all others.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"file {path.absolute()} does not exist" + (": it is a folder" if path.is_dir() else ""))
    with path.open("rb") as file:
        start = file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        remedy = "run `git lfs pull` in its repository, or download the file itself"
        raise WeightsError(f"{path} is a Git LFS pointer and not the weights: {remedy}")
    if start.startswith((b"<!doctype html", b"<?xml")) or b"<html" in start:
        remedy = "it may be a sign-in or quota page, download the file again"
        raise WeightsError(f"{path} is a web page (HTML) and not the weights: {remedy}")
    if start.startswith((b'{"', b"[")) and start.isascii():
        raise WeightsError(f"{path} is a text and not the weights ({start[:60].decode()}): download the file again")
    return path


def read_safetensors(path: Path) -> dict[str, Tensor] | None:
    """Tensors of a safetensors file, whatever its ending; None for another format. Raises ValueError for a bad one."""
    with path.open("rb") as file:
        length, bracket = int.from_bytes(file.read(8), "little"), file.read(1)
    if path.suffix != ".safetensors" and (bracket != b"{" or length > path.stat().st_size):
        return None
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"safetensors: {error}") from error


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the wrappers `module.` and `_orig_mod.`, and with `weight` and `bias` of BERT's old LayerNorm.

    Names that would then occur twice are left as they are.
    """
    renamed = {}
    for name, value in tensors.items():
        plain = WRAPPERS.sub("", name)
        plain = re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", plain)
        plain = re.sub(r"(LayerNorm)\.beta$", r"\1.bias", plain)
        renamed[plain] = value
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, or of another shape, if `tensors` were loaded into `module`."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    pairs = {name: (tuple(tensors[name].shape), tuple(wanted[name].shape)) for name in wanted if name in tensors}
    mismatched = [f"{name} (file {file}, model {model})" for name, (file, model) in pairs.items() if file != model]
    return missing, unexpected, mismatched


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load `tensors` into `module`, all of them exactly.

    Raises WeightsError with the number and the first names of missing, unexpected and mismatched tensors.
    """
    faults = zip(("missing", "unexpected", "mismatched"), compare(module, tensors), strict=True)
    listed = [f"{len(names)} {fault}: {', '.join(names[:SHOWN])}" for fault, names in faults if names]
    if listed:
        raise WeightsError(f"{source} does not fit {type(module).__name__} ({'; '.join(listed)})")
    module.load_state_dict(tensors)
