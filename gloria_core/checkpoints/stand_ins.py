"""Harmless stand-ins for what other people's checkpoints pickle beside tensors, and their values as plain Python.

A pickled name is one of three things here: data of Python or PyTorch, which is let through; a class of a library that
checkpoints are known to mention, which becomes an empty class of ours; or anything else, which is refused. Nothing is
imported on behalf of a file.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _new_dict(*_: object) -> OrderedDict:
    return OrderedDict()


def _new_list(*_: object) -> list:
    return []


KNOWN: dict[str, Callable] = {
    f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, frozenset, int, float, str, bool, complex)
} | {"collections.defaultdict": _new_dict, "collections.deque": _new_list}
"""Containers and numbers of Python, as themselves or as what PyTorch's unpickler can fill: building runs no code."""
OWN_BY_TORCH = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.bytearray")
"""Left to PyTorch's own list of what tensors need; it refuses every other name that begins like this."""
STUBBED_LIBRARIES = (
    "omegaconf",
    "antlr4",  # omegaconf's
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "typing",
    "enum",
    "pathlib",
    "datetime",
)
STUBBED_NAMES = re.compile(
    r"numpy(\._?core(\.multiarray|\.numeric|\._internal)?|\.dtypes|\.random\.(_pickle|_pcg64|_mt19937|bit_generator))?"
    r"\.(_reconstruct|scalar|_frombuffer|dtype|ndarray|bool_?|(u?int|float|complex)\d+|str_|bytes_|\w+DType"
    r"|__(bit_)?generator_ctor|__randomstate_ctor|__pyx_unpickle_SeedSequence|SeedSequence|PCG64|MT19937)"
    r"|argparse\.Namespace|types\.SimpleNamespace"
    r"|torch\.(optim\.|cuda\.amp\.grad_scaler\.|torch_version\.)\w[\w.]*"
)
DICTIONARIES = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric)\..*\.AttributeDict|easydict\.EasyDict|addict\.(addict\.)?Dict"
    r"|yacs\.config\.CfgNode|ml_collections\..*\.ConfigDict|box\.box\.Box"
)
"""Subclasses of dict: they keep what is set in them."""


class Stub:
    """Stands for an object of a library that is not needed; keeps what it was given and does nothing."""

    name = ""

    def __new__(cls, *arguments: object) -> Stub:
        self = super().__new__(cls)
        self.__dict__["arguments"] = arguments
        return self

    def __init__(self, *arguments: object) -> None:
        """Takes and forgets what `__new__` has kept."""

    def __setstate__(self, state: object) -> None:
        self.__dict__["state"] = state


class UnknownNameError(ValueError):
    """A pickled name that is neither data nor from a known library; the message is the name."""


def stand_in(name: str) -> Callable | None:
    """What the pickled name "module.attribute" becomes; None where PyTorch decides. Raises UnknownNameError."""
    if name in KNOWN:
        return KNOWN[name]
    if DICTIONARIES.fullmatch(name):
        return OrderedDict
    if name.partition(".")[0] in STUBBED_LIBRARIES or STUBBED_NAMES.fullmatch(name):
        return type(name.rpartition(".")[2], (Stub,), {"name": name})
    if name.startswith(OWN_BY_TORCH):
        return None
    raise UnknownNameError(name)


def plain(value: object) -> Any:
    """Stubs and containers -> dicts, lists and scalars.

    omegaconf's nodes give their content, NumPy's scalars and arrays their numbers, paths and types of PyTorch their
    names, `argparse.Namespace` a dict; other objects and tensors become None.
    Raises ValueError for a container that holds itself.
    """
    return _plain(value, {})


_OPEN = object()


def _plain(value: object, done: dict[int, Any]) -> Any:
    """`done` keeps what was seen, so that a small file cannot unfold into an endless value."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if not isinstance(value, Stub | Mapping | list | tuple | set | frozenset):
        return None
    if done.get(id(value)) is _OPEN:
        raise ValueError("its configuration holds itself")
    if id(value) not in done:
        done[id(value)] = _OPEN
        if isinstance(value, Stub):
            found = _unstubbed(value, done)
        elif isinstance(value, Mapping):
            found = {_key(key, done): _plain(item, done) for key, item in value.items()}
        else:
            found = [_plain(item, done) for item in value]
        done[id(value)] = found
    return done[id(value)]


def _key(key: object, done: dict[int, Any]) -> Any:
    found = _plain(key, done)
    return str(found) if isinstance(found, dict | list) else found


def _unstubbed(stub: Stub, done: dict[int, Any]) -> Any:
    state, arguments = getattr(stub, "state", None), getattr(stub, "arguments", ())
    library, _, kind = stub.name.partition(".")
    if library == "numpy":
        return _number(stub)
    if library == "pathlib":
        return str(PurePosixPath(*(part for part in arguments if isinstance(part, str))))
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, Mapping | None) for s in state) else None
    if not isinstance(state, Mapping):
        return None
    if kind.endswith("Namespace"):
        return _plain(dict(state), done)
    return _plain(state["_content"] if "_content" in state else state.get("_val"), done)


def _number(stub: Stub) -> Any:
    """Value of a pickled NumPy scalar or array of numbers; None for anything else."""
    state, arguments = getattr(stub, "state", None), getattr(stub, "arguments", ())
    kind = stub.name.rpartition(".")[2]
    if kind == "scalar" and len(arguments) == 2:
        shape, dtype, data = (), arguments[0], arguments[1]
    elif kind == "_reconstruct" and isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        if fortran:
            return None
    else:
        return None
    name = getattr(dtype, "arguments", ("",))[:1]
    if not name or not re.fullmatch(r"[fiub][1248]", str(name[0])) or not isinstance(data, bytes):
        return None
    details = getattr(dtype, "state", None)
    order = details[1] if isinstance(details, tuple) and len(details) > 1 and details[1] in ("<", ">") else "="
    try:
        return np.frombuffer(data, dtype=np.dtype(f"{order}{name[0]}")).reshape(shape).tolist()
    except (TypeError, ValueError):
        return None


def larger_than_stored(tensor: Tensor) -> bool:
    """Whether a tensor repeats a storage that is smaller than itself: a few bytes could ask for any memory."""
    return tensor.layout == torch.strided and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
