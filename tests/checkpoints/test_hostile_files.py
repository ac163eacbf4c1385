"""Files that would run code, or take all memory, are refused with a clear error; what is harmless is read."""

import argparse
import functools
import io
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch

from gloria_core.checkpoints.untrusted import CONTAINER, plain, read_state
from gloria_core.models.weights import WeightsError


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Named:
    """Pickles as the name `module.attribute` alone, which need not exist, called with the arguments."""

    def __init__(self, module, attribute, *arguments):
        self.name, self.arguments = (module, attribute), arguments


class NamingPickler(pickle._Pickler):
    """Writes `Named`; protocol 2, as torch.save."""

    def save(self, value, save_persistent_id=True):
        if not isinstance(value, Named):
            return super().save(value, save_persistent_id)
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*value.name).encode())
        super().save(value.arguments)
        return self.write(pickle.REDUCE)


def put(path, content, *, form):
    """Write content as torch.save does now, as it did before 1.6, or as a bare pickle."""
    buffer = io.BytesIO()
    NamingPickler(buffer, protocol=2).dump(content)
    if form == "bare":
        path.write_bytes(buffer.getvalue())
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", buffer.getvalue())
            archive.writestr("a/version", "3\n")
            archive.writestr("a/byteorder", "little")
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(
            b"".join(pickle.dumps(one, protocol=2) for one in head) + buffer.getvalue() + pickle.dumps([], protocol=2)
        )
    return path


FORMS = ["zip", "old", "bare"]


def attacks(trace):
    """Things that leave a file behind when they are run."""
    touch, write = f"touch {trace}", f"open({str(trace)!r}, 'w').close()"
    inner = pickle.dumps(Calls(os.system, touch), protocol=2)
    buffer = io.BytesIO()
    torch.save(Calls(os.system, touch), buffer)
    return {
        "os.system": Calls(os.system, touch),
        "posix.system": Named("posix", "system", touch),
        "nt.system": Named("nt", "system", touch),
        "eval": Calls(eval, write),
        "exec": Calls(exec, write),
        "python 2's eval": Named("__builtin__", "eval", write),
        "compile": Calls(compile, write, "x", "exec"),
        "getattr": Named("builtins", "getattr", Named("posix", "x"), "system"),
        "__import__": Calls(__import__, "this"),
        "open": Calls(open, str(trace), "w"),
        "partial": Named("functools", "partial", touch),
        "reduce": Calls(functools.reduce, Named("builtins", "eval"), [write]),
        "subprocess": Calls(subprocess.call, ["touch", str(trace)]),
        "Popen": Named("subprocess", "Popen", ["touch", str(trace)]),
        "runpy": Named("runpy", "_run_code", write, {}),
        "torch.load": Named("torch", "load", str(trace)),
        "torch.hub.load": Named("torch.hub", "load", "a/b", "c"),
        "_load_from_bytes": Named("torch.storage", "_load_from_bytes", buffer.getvalue()),
        "nested pickle": Calls(pickle.loads, inner),
        "numpy.load": Named("numpy", "load", str(trace)),
        "numpy run": Named("numpy.testing._private.utils", "runstring", write, {}),
        "torch run": Named("torch.distributions.utils", "eval", write),
        "bound name": Named("torch._utils", "os.system", touch),
        "copyreg": Named("copyreg", "_reconstructor", Named("builtins", "eval"), object, None),
        "pip": Named("pip", "main", ["install", "x"]),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", attacks("x"))
def test_code_is_refused_and_not_run(attack, form, tmp_path):
    trace = tmp_path / "trace"
    content = {"state_dict": {"a": 1}, "hyper_parameters": attacks(trace)[attack]}
    path = put(tmp_path / "evil.ckpt", content, form=form)
    with pytest.raises(WeightsError, match=r"evil\.ckpt asks for '[\w.]+', .* could run code, so it is refused"):
        read_state(path)
    assert not trace.exists()


def test_the_attacks_would_work(tmp_path):
    """The files of this test are real: Python's own unpickler runs them."""
    for attack in ("os.system", "posix.system", "eval", "nested pickle", "subprocess", "python 2's eval"):
        trace = tmp_path / "trace"
        path = put(tmp_path / "evil.ckpt", attacks(trace)[attack], form="bare")
        with path.open("rb") as file:
            pickle.load(file)
        assert trace.exists(), attack
        trace.unlink()


def test_a_name_made_while_unpickling_is_refused(tmp_path):
    """Protocol 4 takes module and name from the stack, where reading the instructions does not show them."""
    path = tmp_path / "four.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Calls(os.system, f"touch {tmp_path / 'trace'}"), protocol=4))
    with pytest.raises(WeightsError, match="made by the instruction STACK_GLOBAL"):
        read_state(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("form", ["zip", "old"])
def test_known_libraries_become_stubs_that_do_nothing(form, tmp_path, monkeypatch):
    """Even a library of that name that is installed and does harm is never imported."""
    trace = tmp_path / "trace"
    (tmp_path / "omegaconf.py").write_text(f"open({str(trace)!r}, 'w').close()\nxyz = eval\n")
    monkeypatch.syspath_prepend(tmp_path)
    touch = f"__import__('os').system('touch {trace}')"
    content = {
        "epoch": 3,
        "hyper_parameters": {
            "a": Named("omegaconf", "xyz", touch),
            "b": Named("omegaconf.os", "system", touch),
            "c": Named("typing", "eval", touch),
            "d": Named("pytorch_lightning.callbacks", "Evil", os.devnull),
            "kept": 1.5,
        },
    }
    path = tmp_path / "f.ckpt"
    put(path, content, form=form)
    with pytest.raises(WeightsError, match="holds no tensors"):  # so it was read to its end
        read_state(path)
    assert not trace.exists()
    assert "omegaconf" not in sys.modules


def test_innocent_objects_of_real_checkpoints_are_read(tmp_path):
    hyper = {
        "lr": np.float64(5e-5),
        "steps": np.int32(7),
        "flag": np.bool_(True),
        "widths": np.arange(6, dtype=np.float32).reshape(2, 3),
        "path": pathlib.PurePosixPath("data/a.csv"),
        "arguments": argparse.Namespace(img_encoder="vit_base", emb_dim=128, nested=argparse.Namespace(a=[1, (2, 3)])),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "shape": torch.Size([2, 3]),
        "ordered": OrderedDict(a=1),
        "by_default": defaultdict(dict, {"x": {"y": 2}}),
        "recent": deque([1, 2]),
        "some": {1, 2},
        "nothing": None,
        "tensor": torch.ones(2),
        "object": np.array(["text"], dtype=object),
        "generator": np.random.default_rng(0).bit_generator.state,
    }
    hyper["rng"] = np.random.default_rng(0)
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)]), 1).state_dict()
    content = {"state_dict": {"a": torch.zeros(2)}, "hyper_parameters": hyper, "lr_schedulers": [scheduler], "epoch": 4}
    torch.save(content, tmp_path / "a.ckpt")
    tensors, stored = read_state(tmp_path / "a.ckpt")
    assert list(tensors) == ["a"]
    assert stored.pop(CONTAINER) == {"tensors": "state_dict", "lr_schedulers": None, "epoch": 4}
    assert stored["lr"] == 5e-5
    assert (stored["steps"], stored["flag"]) == (7, True)
    assert stored["widths"] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert stored["path"] == "data/a.csv"
    assert stored["arguments"] == {"img_encoder": "vit_base", "emb_dim": 128, "nested": {"a": [1, [2, 3]]}}
    assert (stored["dtype"], stored["device"], stored["shape"]) == ("torch.float16", "cpu", [2, 3])
    assert (stored["ordered"], stored["by_default"], stored["recent"]) == ({"a": 1}, {"x": {"y": 2}}, [1, 2])
    assert stored["some"] == [1, 2]
    assert stored["nothing"] is stored["tensor"] is stored["object"] is stored["rng"] is None


def test_settings_beside_model_are_stored(tmp_path):
    """CXR-CLIP's container."""
    torch.save({"model": {"a": torch.zeros(1)}, "config": {"base": {"seed": 1}}, "epoch": 2}, tmp_path / "a.tar")
    _, stored = read_state(tmp_path / "a.tar")
    assert stored == {"base": {"seed": 1}, CONTAINER: {"tensors": "model", "epoch": 2}}


def test_torchscript_is_named(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(WeightsError, match="TorchScript archive"):
        read_state(tmp_path / "script.pt")


def test_archives_that_unpack_to_far_more_are_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", bytes(2**25))
    assert path.stat().st_size < 2**17
    with pytest.raises(WeightsError, match=r"would unpack to 335544\d\d: refused"):
        read_state(path)


def test_tensors_larger_than_their_storage_are_refused(tmp_path):
    torch.save({"state_dict": {"a.weight": torch.zeros(1).expand(10**12)}}, tmp_path / "wide.ckpt")
    with pytest.raises(WeightsError, match=r"a\.weight \(1000000000000,\) is larger than what the file stores"):
        read_state(tmp_path / "wide.ckpt")
    shared = torch.arange(6.0)
    torch.save({"whole": shared, "part": shared[2:4]}, tmp_path / "shared.ckpt")
    assert read_state(tmp_path / "shared.ckpt")[0]["part"].tolist() == [2.0, 3.0]


def test_values_that_unfold_without_end(tmp_path):
    wide: list = [1]
    for _ in range(60):
        wide = [wide, wide]
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": {"x": wide}}, tmp_path / "wide.ckpt")
    assert "x" in read_state(tmp_path / "wide.ckpt")[1]  # 2**60 leaves, read once each
    loop: dict = {}
    loop["self"] = loop
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hyper_parameters": loop}, tmp_path / "loop.ckpt")
    with pytest.raises(WeightsError, match=r"loop\.ckpt.*recursion"):
        read_state(tmp_path / "loop.ckpt")
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(RecursionError):
        plain(deep)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"not a checkpoint at all", b"\x80\x02."]
)
def test_what_is_no_checkpoint(content, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match=r"a\.ckpt"):
        read_state(tmp_path / "a.ckpt")


def test_zip_files_of_other_things(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"0 entries named data\.pkl"):
        read_state(tmp_path / "a.zip")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9, 0.999])
def test_truncated_files_of_the_old_format(kept, tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(WeightsError, match=r"old\.pth"):
        read_state(path)
