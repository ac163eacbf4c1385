"""What people have in place of weights is said in words, or read: pointers, pages, other endings, wrapped names."""

import pytest
import torch
from safetensors.torch import save
from torch import nn

from gloria_core.checkpoints import native
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.weights import WeightsError, fill, plain_names, read_tensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 94321567\n"
NOT_WEIGHTS = {
    "Git LFS pointer": POINTER,
    "web page": b"\n  <!DOCTYPE html><html><body>Download quota exceeded</body></html>",
    "web page without a type": b"<HTML><head><title>Sign in</title></head></HTML>",
    "web page with a byte order mark": b"\xef\xbb\xbf<!doctype html>",
    "web page after a comment": b"<!-- saved from -->\n<html><body>quota</body></html>",
    "text of a hub": b'{"error": "Repository not found"}',
    "web page of an object store": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
@pytest.mark.parametrize("name", ["resnet18.pth", "model.safetensors", "best.ckpt"])
def test_what_a_failed_download_leaves_is_said_in_words(kind, name, tmp_path):
    (tmp_path / name).write_bytes(NOT_WEIGHTS[kind])
    words = next(words for words in ("Git LFS pointer", "web page", "text") if kind.startswith(words))
    for read, error in (
        (read_tensors, WeightsError),
        (load_pretrained, WeightsError),
        (native.load, WeightsError),
    ):
        with pytest.raises(error, match=f"{name} is a {words}.*(git lfs pull|download the file again)"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model"])
def test_safetensors_are_known_by_their_content(name, tmp_path):
    tensors = {key: value.contiguous() for key, value in ImageEncoder("resnet_tiny").trunk.state_dict().items()}
    (tmp_path / name).write_bytes(save(tensors))
    assert torch.equal(read_tensors(tmp_path / name)["conv1.weight"], tensors["conv1.weight"])
    assert torch.equal(load_pretrained(tmp_path / name).trunk.conv1.weight, tensors["conv1.weight"])


def test_wrappers_are_removed_wherever_they_stand():
    value = torch.zeros(1)
    for name in ("module.a.weight", "_orig_mod.a.weight", "module._orig_mod.module.a.weight", "a._orig_mod.weight"):
        assert list(plain_names({name: value})) == ["a.weight"]
    assert list(plain_names({"a.LayerNorm.gamma": value, "a.LayerNorm.beta": value})) == [
        "a.LayerNorm.weight",
        "a.LayerNorm.bias",
    ]
    for names in (["submodule.a", "a.gamma"], ["module.a", "a"]):  # no wrapper; and two names that would become one
        assert list(plain_names(dict.fromkeys(names, value))) == names


def test_our_reader_points_to_the_one_for_published_files(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "published.ckpt")
    with pytest.raises(WeightsError, match="load_pretrained"):
        native.load(tmp_path / "published.ckpt")


def test_long_lists_of_faults_are_cut():
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(WeightsError, match=r"8 missing: 0.weight, 0.bias, 1.weight, 1.bias, 2.weight\)"):
        fill(module, {}, source="empty")
