"""Where pretrained tensors come from, and how they enter a module: all of them or an error, never some of them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gloria_core.data.packages import installed_folder


class WeightsError(ValueError):
    """Pretrained weights could not be found, read or fitted; the message names the remedy."""


def package_file(package: str, pattern: str) -> Path:
    """The one file below an installed package that matches `pattern`. Raises WeightsError for none or several."""
    folder = _folder(package)
    found = sorted(folder.rglob(pattern))
    if len(found) != 1:
        raise WeightsError(f"package {package!r} holds {len(found)} files like {pattern!r}, expected one")
    return found[0]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a `torch.save` file opened with `weights_only=True` (runs no code).

    A file that keeps its tensors one level down under "state_dict" or "model" is unwrapped.
    Raises WeightsError for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot read weights from {path}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # safetensors raises its own class, which its bindings do not export everywhere
        if type(error).__name__ != "SafetensorError":
            raise
        raise WeightsError(f"cannot read weights from {path}: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no plain state dict (names -> tensors)")
    return dict(content)


def compare(module: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unexpected, or of another shape, if `tensors` were loaded into `module`."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    mismatched = [
        f"{name} (file {tuple(tensors[name].shape)}, model {tuple(wanted[name].shape)})"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    return missing, unexpected, mismatched


def fill(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str, ignore: Iterable[str] = ()) -> None:
    """Load `tensors` into `module`, all of them exactly; names that begin with an entry of `ignore` are left out.

    Raises WeightsError that lists missing, unexpected and mismatched tensors.
    """
    ignore = tuple(ignore)
    kept = {name: value for name, value in tensors.items() if not name.startswith(ignore)} if ignore else dict(tensors)
    missing, unexpected, mismatched = compare(module, kept)
    if missing or unexpected or mismatched:
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}: "
            f"{_listed('missing', missing)}; {_listed('unexpected', unexpected)}; {_listed('mismatched', mismatched)}"
        )
    module.load_state_dict(kept)


def fill_by_order(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load tensors whose names differ but whose order is the module's; every shape is checked.

    Raises WeightsError at the first pair that differs in shape, or where the counts differ.
    """
    wanted = module.state_dict()
    if len(tensors) != len(wanted):
        raise WeightsError(f"{source} holds {len(tensors)} tensors, {type(module).__name__} has {len(wanted)}")
    renamed = {}
    for (theirs, value), (ours, place) in zip(tensors.items(), wanted.items(), strict=True):
        if value.shape != place.shape or value.dtype != place.dtype:
            raise WeightsError(f"{source}: {theirs} {tuple(value.shape)} does not fit {ours} {tuple(place.shape)}")
        renamed[ours] = value
    module.load_state_dict(renamed)


def _listed(title: str, names: list[str], *, most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {title}" + (f" ({', '.join(names[:most])}{more})" if names else "")


def _folder(package: str) -> Path:
    try:
        return installed_folder(package)
    except ModuleNotFoundError as error:
        raise WeightsError(str(error)) from None
