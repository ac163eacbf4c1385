"""What the tests against golden numbers share: their files, the calls that they spell, comparison within tolerance."""

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import seeded
import torch

from gloria_core.checkpoints.published import load_pretrained
from gloria_core.data.tokenizer import text_batch_from_ids
from gloria_core.models.key_maps import JOINED

HERE = Path(__file__).parent
RTOL_GRADIENT, RTOL_FIRST_CONVOLUTION = 1e-3, 5e-3  # the latter's gradient is float32 noise up to 0.3 %


def golden_files(method: str, pattern: str = "golden_seed*.json") -> list[Path]:
    """The files of this folder, and those of the further folder `PARITY_DIR` that are not the same."""
    files = sorted((HERE / method).glob(pattern))
    if further := os.environ.get("PARITY_DIR"):
        known = {path.read_bytes() for path in files}
        files += [path for path in sorted((Path(further) / method).glob(pattern)) if path.read_bytes() not in known]
    return files


def read_json(method: str, name: str) -> dict:
    """`<method>/<name>.json`, such as keys or layout."""
    return json.loads((HERE / method / f"{name}.json").read_text())


def call(text: str):
    """What the first call in a sentence gives, such as "rows of seeded.captions(5, 256, 100, shortest=4)"."""
    tree = ast.parse(re.search(r"seeded\.\w+\([^()]*\)", text)[0], mode="eval").body
    arguments = [ast.literal_eval(argument) for argument in tree.args]
    return getattr(seeded, tree.func.attr)(*arguments, **{k.arg: ast.literal_eval(k.value) for k in tree.keywords})


def text_batch(arrays: dict[str, np.ndarray]):
    """A `TextBatch` of seeded captions, with their words."""
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    return text_batch_from_ids(**tensors, vocabulary=seeded.vocabulary())


def check(actual, expected, *, rtol: float, atol: float, name: str = "") -> None:
    """Same shape, and equal within a tolerance whose relative part refers to the largest magnitude of the list."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, name
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol + rtol * np.abs(expected).max(), err_msg=name)


class Tolerance:
    """`check` with the tolerances that a golden file recommends for named fields, or with those given."""

    def __init__(self, golden: dict | None = None, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
        default = {"rtol": rtol, "atol": atol}
        recommended = (golden or {}).get("tolerance", {}).get("recommended", {"default": default})
        self.limits = {name: limit for names, limit in recommended.items() for name in names.split(" and ")}

    def __call__(self, actual, expected, name: str = "default", **limit: float) -> None:
        check(actual, expected, **({**self.limits.get(name, self.limits["default"]), **limit}), name=name)

    def vectors(self, actual, golden: dict, name: str = "default") -> None:
        """Rows, or rows at (row, index), whose first eight values are stored, with lengths or mean and deviation."""
        assert list(actual.shape) == golden["shape"]
        if "positions" in golden:
            self(torch.stack([actual[row, index, :8] for row, index in golden["positions"]]), golden["first8"], name)
            self.moments(actual, golden, name)
        else:
            self(actual[:, :8], golden["first8"], name)
            self(actual.norm(dim=1), golden["l2"], name)

    def moments(self, actual, golden: dict, name: str = "default") -> None:
        """Mean, and deviation of the population."""
        self(actual.mean(), golden["mean"], name)
        self(actual.std(correction=0), golden["std"], name)

    def gradient(self, gradient: torch.Tensor, expected: float, name: str) -> None:
        """Length of the gradient of the tensor of this name in the file."""
        first = name.endswith(".conv1.weight") and ".layer" not in name
        check(gradient.norm(), expected, rtol=RTOL_FIRST_CONVOLUTION if first else RTOL_GRADIENT, atol=1e-6, name=name)


def numbers_in(name: str) -> list[int]:
    """[1, 3, 6] of "image1_row3_col6"."""
    return [int(number) for number in re.findall(r"\d+", name)]


def golden_params(*methods: str) -> list:
    """Parameters of a fixture, one for each golden file of the methods."""
    files = [path for method in methods for path in golden_files(method)]
    prefix = "parity-{parent}-{stem}" if len(methods) > 1 else "parity-{stem}"
    return [pytest.param(path, id=prefix.format(parent=path.parent.name, stem=path.stem)) for path in files]


def load(layout, path: Path, state: dict[str, torch.Tensor], stored: dict, **options) -> tuple[torch.nn.Module, dict]:
    """The model of a published file, which is then deleted, and for each name in the file the place in the model."""
    places = {}
    for ours, (theirs, _) in layout.LAYOUTS[0].translate(state, stored).tensors.items():
        names = theirs.split(JOINED)
        places |= {name: (ours, part, len(names)) for part, name in enumerate(names)}
    model = load_pretrained(path, **options)
    path.unlink()
    return model, places


def gradient(model: torch.nn.Module, places: dict, name: str) -> torch.Tensor:
    """The gradient of the tensor of this name in the file, which may be a part of one in the model."""
    ours, part, parts = places[name]
    whole = model.get_parameter(ours).grad
    return whole if parts == 1 else whole.chunk(parts)[part]
