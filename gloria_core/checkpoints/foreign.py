"""Read other people's checkpoint files without their libraries and without running what is inside.

A Lightning file holds more than tensors: a configuration pickled as omegaconf objects, callbacks pickled by class.
PyTorch's restricted unpickler refuses these names. Here each of them is listed beforehand, which executes nothing,
and replaced by an empty class of ours (`stand_ins`); a name that is neither known data nor from one of these libraries
is refused, and so is a file that would unpack to far more than it is.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from gloria_core.checkpoints.native import CheckpointError
from gloria_core.checkpoints.stand_ins import UnknownNameError, larger_than_stored, plain, stand_in
from gloria_core.models.weights import WeightsError, compare, read_tensors

STATE_KEYS = ("state_dict", "model_state_dict", "model")
CONFIG_KEYS = ("hyper_parameters", "config")
CONTAINER = "__container__"
"""Key of `stored` under which `read_state` tells the file's other top-level entries (plain ones with their value)."""
EXPANSION = 16
"""How many times its own size a file may unpack to. torch.save does not compress at all."""
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.PickleError,
    zipfile.BadZipFile,
)  # whatever a damaged file can make an unpickler do, and nothing that a user's interrupt could


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
    """Tensors of a published checkpoint, and its stored configuration as plain values.

    Takes Lightning files ("state_dict", "hyper_parameters"), files with "model_state_dict", or with "model" and
    "config", bare state dicts, all of them also in PyTorch's format before 1.6, and safetensors. The configuration
    also has `CONTAINER`: the other entries of the file's top level, with their value where it is a plain one.
    Raises CheckpointError for a missing or truncated file, and for one that holds anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        content = _safetensors(path) if path.suffix == ".safetensors" else _unpickled(path)
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
        key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        tensors = {
            str(name): value
            for name, value in (content if key is None else content[key]).items()
            if isinstance(value, Tensor)
        }
        stored = _configuration(content, key)
    except CheckpointError:
        raise
    except _FAILURES as error:
        raise _unreadable(path, error) from error
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors under {', '.join(STATE_KEYS)} or at its top level")
    for name, tensor in tensors.items():
        if larger_than_stored(tensor):
            raise CheckpointError(f"{path}: tensor {name} {tuple(tensor.shape)} is larger than what the file stores")
    return tensors, stored


def _configuration(content: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    found = next((plain(content[name]) for name in CONFIG_KEYS if name in content), None)
    stored = dict(found) if isinstance(found, dict) else {}
    if key is not None:
        others = {str(name): value for name, value in content.items() if name not in (key, *CONFIG_KEYS)}
        simple = {n: v if isinstance(v, str | int | float | bool) else None for n, v in others.items()}
        stored[CONTAINER] = {"tensors": key, **simple}
    return stored


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(path)
    except WeightsError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error


def _unpickled(path: Path) -> object:
    """The content of a torch.save file, with stand-ins for what is no tensor."""
    try:
        allowed = {name: stand_in(name) for name in _pickled_names(path)}
    except UnknownNameError as error:
        raise _refused(path, str(error)) from error
    with torch.serialization.safe_globals([(found, name) for name, found in allowed.items() if found is not None]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path} asks for '{name}', which is neither a tensor nor known data: loading could run code, so it is "
        "refused. If you trust where it came from, save its state dict alone with its own program and load that"
    )


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    """What PyTorch says of a file, without its advice to load the file unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return _refused(path, found[1])
    text = text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return CheckpointError(
        f"checkpoint {path} cannot be read, it is truncated or no checkpoint: {text.splitlines()[0]}"
    )


def _pickled_names(path: Path) -> Iterator[str]:
    """Every "module.attribute" that the file's pickles name, by reading their instructions, not by following them."""
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            yield from _names(BytesIO(_zipped_pickle(path)))
            return
        file.seek(0)
        for _ in range(4):  # the format before PyTorch 1.6: magic number, version, machine, content; then raw numbers
            if file.read(1):
                file.seek(-1, 1)
                yield from _names(file)


def _names(file: IO[bytes]) -> Iterator[str]:
    for code, argument, _ in pickletools.genops(file):
        if code.name == "GLOBAL":
            pair = tuple(argument.split(" ", 1))
            module, name = NAME_MAPPING.get(pair) or (IMPORT_MAPPING.get(pair[0], pair[0]), pair[1])  # Python 2's
            yield f"{module}.{name}"
        elif code.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise UnknownNameError(f"a name made by the instruction {code.name}")


def _zipped_pickle(path: Path) -> bytes:
    """The main pickle of a zip file, which neither is a program nor unpacks to much more than it is."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(f"{path} is a TorchScript archive: it holds a program. Save its state dict instead")
        unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if unpacked > EXPANSION * size + 2**20:
            raise CheckpointError(f"{path} has {size} bytes and would unpack to {unpacked}: refused")
        main = [entry for entry in entries if entry.filename.endswith("/data.pkl") or entry.filename == "data.pkl"]
        if len(main) != 1:
            raise CheckpointError(f"{path} is a zip file with {len(main)} entries named data.pkl, not a checkpoint")
        return archive.read(main[0])


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
