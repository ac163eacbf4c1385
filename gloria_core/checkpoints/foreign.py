"""Read other people's checkpoint files without their libraries and without running what is inside.

A Lightning file holds more than tensors: a configuration pickled as omegaconf objects, callbacks pickled by class.
PyTorch's restricted unpickler refuses these names. Here each of them is listed beforehand, which executes nothing,
and replaced by an empty class of ours; a name that is neither known data nor from one of these libraries is refused.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gloria_core.checkpoints.native import CheckpointError
from gloria_core.models.weights import compare

CONTAINERS = {f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, int, float, str, bool)} | {
    "collections.defaultdict": collections.defaultdict,
    "collections.OrderedDict": collections.OrderedDict,
}
STUBBED_LIBRARIES = ("omegaconf", "pytorch_lightning", "lightning", "typing")
STATE_KEYS = ("state_dict", "model_state_dict", "model")


class Stub:
    """Stands for an object of a library that is not needed; keeps its attributes and does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


@dataclass(frozen=True)
class LoadReport:
    """What became of each tensor of a file: names in the file's spelling, except `missing`, which is the model's."""

    matched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model came from the file, and nothing was left over unexplained."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} matched", f"{len(self.ignored)} ignored (no place in the model)"]
        for name in ("missing", "unexpected", "mismatched"):
            values = getattr(self, name)
            shown = f": {', '.join(values[:4])}{', ...' if len(values) > 4 else ''}" if values else ""
            parts.append(f"{len(values)} {name}{shown}")
        return "; ".join(parts)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a published checkpoint, and its stored configuration as plain values ({} where there is none).

    Takes Lightning files, files with "model_state_dict", and bare state dicts.
    Raises CheckpointError for a missing or truncated file, and for one that holds anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_stand_in(name, path), name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as e:
        raise CheckpointError(f"checkpoint {path} cannot be read, it is truncated or no such file: {e}") from e
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    config = plain(content.get("hyper_parameters", {}))
    for key in STATE_KEYS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under {', '.join(STATE_KEYS)} or at its top level")
    return tensors, config if isinstance(config, dict) else {}


def _stand_in(name: str, path: Path) -> type:
    """The harmless class that a pickled name becomes. Raises CheckpointError for a name that could run code."""
    if name in CONTAINERS:
        return CONTAINERS[name]
    if name.partition(".")[0] in STUBBED_LIBRARIES:
        return type(name.rpartition(".")[2], (Stub,), {})
    raise CheckpointError(
        f"{path} asks for {name!r}, which is neither a tensor nor known data: loading could run code, so it is refused"
    )


def plain(value: object) -> Any:
    """An omegaconf container (as stubs) or plain value -> dicts, lists and scalars; other objects become None."""
    if isinstance(value, Stub):
        inside = vars(value)
        return plain(inside["_content"] if "_content" in inside else inside.get("_val"))
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def lookup(config: Mapping[str, Any], *paths: str, default: Any) -> Any:
    """The first of several dotted names that a stored configuration has, else the default."""
    for path in paths:
        node: Any = config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            return node
    return default


def fill_reported(
    model: nn.Module, renamed: Mapping[str, tuple[str, Tensor]], ignored: list[str], *, path: Path, allow_partial: bool
) -> LoadReport:
    """Load tensors given as our name -> (their name, tensor), and say what became of each.

    Raises CheckpointError where the two do not fit exactly, unless `allow_partial`.
    """
    tensors = {ours: value.float() if value.is_floating_point() else value for ours, (_, value) in renamed.items()}
    missing, unexpected, mismatched = compare(model, tensors)
    bad = {name.partition(" ")[0] for name in mismatched}
    fitting = {name: value for name, value in tensors.items() if name not in bad and name not in unexpected}
    report = LoadReport(
        matched=tuple(renamed[name][0] for name in fitting),
        ignored=tuple(ignored),
        missing=tuple(missing),
        unexpected=tuple(renamed[name][0] for name in unexpected),
        mismatched=tuple(mismatched),
    )
    if not report.complete and not allow_partial:
        raise CheckpointError(f"{path} does not fit the model: {report}. allow_partial=True loads what fits")
    model.load_state_dict(fitting, strict=False)
    return report
