import pytest
import torch

from gloria_core.training import precision
from gloria_core.training.precision import autocast, choose_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False}, False),
    ],
)
def test_cpu_question_by_capabilities(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.cpu_multiplies_bfloat16() is expected
    assert choose_precision("cpu") == ("bfloat16" if expected else "float32")


@pytest.mark.parametrize("tile", [True, False])
def test_cpu_question_by_single_functions(monkeypatch, tile):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tile, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert precision.cpu_multiplies_bfloat16() is tile


def test_a_torch_that_cannot_say_gets_float32(monkeypatch):
    for name in ("get_capabilities", "_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert choose_precision("cpu") == "float32"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_cuda(monkeypatch, supported, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_precision("cuda") == expected
    assert choose_precision("cuda", "float32") == "float32"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_products_are_computed_in_the_chosen_format(name):
    with autocast("cpu", name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == getattr(torch, name)


def test_what_is_asked_for_is_what_is_used():
    assert choose_precision("cpu", "bfloat16") == "bfloat16"


def test_bad_requests():
    with pytest.raises(ValueError, match="needs a GPU"):
        choose_precision("cpu", "float16")
    with pytest.raises(ValueError, match="'bf16' is unknown"):
        choose_precision("cpu", "bf16")
