"""Read other people's checkpoint files without their libraries and without running what is inside.

A Lightning file holds more than tensors: a configuration pickled as omegaconf objects, callbacks pickled by class.
PyTorch's restricted unpickler refuses these names. Here all names of a file are listed first, by reading its
instructions without following them. A name is one of three things: data of Python or PyTorch, which is let through; a
class of a library that checkpoints are known to mention, which becomes an empty class of ours; or anything else, which
is refused. Nothing is imported on behalf of a file. A file that would unpack to far more than it is is refused, too.
"""

import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gloria_core.models.weights import WeightsError, checked_file, first_line, plain_names, read_safetensors

# Containers and numbers of Python, as themselves or as what PyTorch's unpickler can fill: building runs no code.
KNOWN: dict[str, Callable] = {
    f"builtins.{kind.__name__}": kind for kind in (dict, list, tuple, set, frozenset, int, float, str, bool, complex)
} | {"collections.defaultdict": lambda *_: OrderedDict(), "collections.deque": lambda *_: []}
# Left to PyTorch's own list of what tensors need; it refuses every other name that begins like this.
DECIDED_BY_TORCH = ("torch.", "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.bytearray")
STUBBED_NAMES = re.compile(
    r"(omegaconf|antlr4|pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics)\..*"
    r"|(typing|enum|pathlib|datetime)\..*"
    r"|numpy(\._?core(\.multiarray|\.numeric|\._internal)?|\.dtypes|\.random\.(_pickle|_pcg64|_mt19937|bit_generator))?"
    r"\.(_reconstruct|scalar|_frombuffer|dtype|ndarray|bool_?|(u?int|float|complex)\d+|str_|bytes_|\w+DType"
    r"|__(bit_)?generator_ctor|__randomstate_ctor|__pyx_unpickle_SeedSequence|SeedSequence|PCG64|MT19937)"
    r"|argparse\.Namespace|types\.SimpleNamespace"
    r"|torch\.(optim\.|cuda\.amp\.grad_scaler\.|torch_version\.)\w[\w.]*"
)
# Subclasses of dict.
DICTIONARIES = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric)\..*\.AttributeDict|easydict\.EasyDict|addict\.(addict\.)?Dict"
    r"|yacs\.config\.CfgNode|ml_collections\..*\.ConfigDict|box\.box\.Box"
)
STATE_KEYS = ("state_dict", "model_state_dict", "model")
CONFIG_KEYS = ("hyper_parameters", "config")
# Key of `stored` under which `read_state` gives the file's other top-level entries (plain ones with their value).
CONTAINER = "__container__"
# How many times its own size a file may unpack to. torch.save does not compress at all.
EXPANSION = 16


class Stub:
    """An object of a library that is not needed: it stores what it was given and does nothing."""

    name = ""

    def __new__(cls, *arguments: object) -> "Stub":
        self = super().__new__(cls)
        self.__dict__["arguments"] = arguments
        return self

    def __init__(self, *arguments: object) -> None:
        """Nothing: `__new__` has stored the arguments."""

    def __setstate__(self, state: object) -> None:
        self.__dict__["state"] = state


class UnknownNameError(ValueError):
    """A pickled name that is neither data nor from a known library; the message is the name."""


def stub(name: str) -> Callable | None:
    """What the pickled name "module.attribute" becomes; None where PyTorch decides. Raises UnknownNameError."""
    if name in KNOWN:
        return KNOWN[name]
    if DICTIONARIES.fullmatch(name):
        return OrderedDict
    if STUBBED_NAMES.fullmatch(name):
        return type(name.rpartition(".")[2], (Stub,), {"name": name})
    if name.startswith(DECIDED_BY_TORCH):
        return None
    raise UnknownNameError(name)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a published checkpoint, and its stored configuration as plain values.

    Takes Lightning files ("state_dict", "hyper_parameters"), files with "model_state_dict", or with "model" and
    "config", bare state dicts, all of them also in PyTorch's format before 1.6, and safetensors whatever their ending.
    Names are those of `plain_names`: without wrappers. The configuration also has `CONTAINER`: the other entries of
    the file's top level, with their value where it is a plain one.
    Raises WeightsError for a missing or truncated file, and for one that holds anything but data.
    """
    path = checked_file(path)
    try:
        content = read_safetensors(path)
        content = _unpickled(path) if content is None else content
        if not isinstance(content, Mapping):
            raise WeightsError(f"{path} holds a {type(content).__name__}, not a checkpoint")
        key = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        values = content if key is None else content[key]
        tensors = plain_names({str(name): value for name, value in values.items() if isinstance(value, Tensor)})
        stored = _configuration(content, key)
    except WeightsError:
        raise
    except UnknownNameError as error:
        raise _refused(path, str(error)) from error
    except Exception as error:  # whatever a damaged file can make an unpickler do
        raise _unreadable(path, error) from error
    if not tensors:
        raise WeightsError(f"{path} holds no tensors under {', '.join(STATE_KEYS)} or at its top level")
    for name, tensor in tensors.items():
        # a few bytes could ask for any memory by repeating one number
        stored_bytes = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else float("inf")
        if tensor.numel() * tensor.element_size() > stored_bytes:
            raise WeightsError(f"{path}: tensor {name} {tuple(tensor.shape)} is larger than what the file stores")
    return tensors, stored


def _configuration(content: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    settings = next((plain(content[name]) for name in CONFIG_KEYS if name in content), None)
    stored = dict(settings) if isinstance(settings, dict) else {}
    if key is not None:
        others = {str(name): value for name, value in content.items() if name not in (key, *CONFIG_KEYS)}
        simple = {n: v if isinstance(v, str | int | float | bool) else None for n, v in others.items()}
        stored[CONTAINER] = {"tensors": key, **simple}
    return stored


def _unpickled(path: Path) -> object:
    """The content of a torch.save file, with stubs for what is no tensor."""
    stubs = {name: stub(name) for name in _pickled_names(path)}
    with torch.serialization.safe_globals([(made, name) for name, made in stubs.items() if made is not None]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _refused(path: Path, name: str) -> WeightsError:
    return WeightsError(
        f"{path} asks for '{name}', which is neither a tensor nor known data: loading could run code, so it is "
        "refused. If you trust where it came from, save its state dict alone with its own program and load that"
    )


def _unreadable(path: Path, error: Exception) -> WeightsError:
    """What PyTorch says of a file, without its advice to load the file unsafely."""
    if name := re.search(r"GLOBAL (\S+)", str(error)):
        return _refused(path, name[1])
    return WeightsError(f"checkpoint {path} cannot be read, it is truncated or no checkpoint: {first_line(error)}")


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
            raise WeightsError(f"{path} is a TorchScript archive: it holds a program. Save its state dict instead")
        unpacked, size = sum(entry.file_size for entry in entries), path.stat().st_size
        if unpacked > EXPANSION * size + 2**20:
            raise WeightsError(f"{path} has {size} bytes and would unpack to {unpacked}: refused")
        main = [entry for entry in entries if entry.filename.endswith("/data.pkl") or entry.filename == "data.pkl"]
        if len(main) != 1:
            raise WeightsError(f"{path} is a zip file with {len(main)} entries named data.pkl, not a checkpoint")
        return archive.read(main[0])


def plain(value: object, done: dict[int, tuple[object, Any]] | None = None) -> Any:
    """Stubs and containers -> dicts, lists and scalars.

    omegaconf's nodes give their content, NumPy's scalars and arrays their numbers, paths and types of PyTorch their
    names, `argparse.Namespace` a dict; other objects and tensors become None. `done` holds the containers seen so far
    by their `id`, so that a small file cannot unfold into an endless value.
    Raises RecursionError for a container that holds itself.
    """
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if not isinstance(value, Stub | Mapping | list | tuple | set | frozenset):
        return None
    done = {} if done is None else done
    if id(value) not in done:
        if isinstance(value, Stub):
            converted = _plain_stub(value, done)
        elif isinstance(value, Mapping):
            keys = [plain(key, done) for key in value]
            keys = [str(key) if isinstance(key, dict | list) else key for key in keys]
            converted = dict(zip(keys, [plain(item, done) for item in value.values()], strict=True))
        else:
            converted = [plain(item, done) for item in value]
        done[id(value)] = (value, converted)
    return done[id(value)][1]


def _plain_stub(stub: Stub, done: dict[int, tuple[object, Any]]) -> Any:
    state, arguments = getattr(stub, "state", None), getattr(stub, "arguments", ())
    library, _, kind = stub.name.partition(".")
    if library == "numpy":
        return _numbers(kind.rpartition(".")[2], arguments, state)
    if library == "pathlib":
        return str(PurePosixPath(*(part for part in arguments if isinstance(part, str))))
    if isinstance(state, tuple) and len(state) == 2:  # (attributes, slots)
        state = {**(state[0] or {}), **(state[1] or {})} if all(isinstance(s, Mapping | None) for s in state) else None
    if not isinstance(state, Mapping):
        return None
    if kind.endswith("Namespace"):
        return plain(state, done)
    return plain(state["_content"] if "_content" in state else state.get("_val"), done)


def _numbers(kind: str, arguments: tuple, state: Any) -> Any:
    """Value of a pickled NumPy scalar or array of numbers; None for anything else."""
    if kind == "scalar" and len(arguments) == 2:
        shape, (dtype, data) = (), arguments
    elif kind == "_reconstruct" and isinstance(state, tuple) and len(state) == 5 and not state[3]:
        _, shape, dtype, _, data = state  # state[3]: in Fortran's order
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


def lookup(config: Mapping[str, Any], *paths: str, default: Any) -> Any:
    """The first of several dotted names that a stored configuration has, else the default."""
    for path in paths:
        node: Any = config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if node is not None:
            return node
    return default
