"""Files that hold an image encoder alone: which network, how many channels, and the same features as its library's."""

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetModel, SwinConfig, SwinModel, ViTConfig, ViTModel

from gloria_core.checkpoints.layouts import image_only
from gloria_core.checkpoints.published import load_pretrained
from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.weights import WeightsError


def seeded(module: nn.Module) -> nn.Module:
    """Values that no two tensors share, large enough for attention to be sharp, with statistics that matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point():
                continue
            if value.ndim > 1:
                spread = 1.0 if "bias_table" in name else 2.0 / value[0].numel() ** 0.5
                value.normal_(0, spread, generator=generator)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.1, generator=generator)
            else:
                value.uniform_(0.5, 1.0, generator=generator)
    return module.eval()


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768)


def timm_class_token(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model.forward_features(pixels)[:, 0]


def torchvision_class_token(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    model.heads = nn.Identity()
    return model(pixels)


def without(attribute: str):
    def pooled(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        setattr(model, attribute, nn.Identity())
        return model(pixels)

    return pooled


VIT = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
CASES = {  # network -> (its library's model, its pooled feature, our name, side of the image)
    "torchvision resnet18": (torchvision.models.resnet18, without("fc"), "resnet18", 64),
    "torchvision resnet50": (torchvision.models.resnet50, without("fc"), "resnet50", 64),
    "timm resnet34": (lambda: timm.create_model("resnet34"), without("fc"), "resnet34", 64),
    "transformers resnet50": (
        lambda: ResNetModel(ResNetConfig()),
        lambda model, pixels: model(pixels).pooler_output.flatten(1),
        "resnet50",
        64,
    ),
    "torchvision densenet121": (torchvision.models.densenet121, without("classifier"), "densenet121", 64),
    "timm densenet121": (
        lambda: timm.create_model("densenet121"),
        lambda model, pixels: model.forward_features(pixels).mean((2, 3)),
        "densenet121",
        64,
    ),
    "timm efficientnet_lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0"),
        lambda model, pixels: model.forward_features(pixels).mean((2, 3)),
        "efficientnet_lite0",
        64,
    ),
    "timm vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), timm_class_token, "vit_tiny_patch16", 224),
    "torchvision vit": (torchvision_vit, torchvision_class_token, "vit_tiny_patch16", 224),
    "transformers vit": (
        lambda: ViTModel(ViTConfig(**VIT, layer_norm_eps=1e-6)),
        lambda model, pixels: model(pixels).last_hidden_state[:, 0],
        "vit_tiny_patch16",
        224,
    ),
    "timm swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        lambda model, pixels: model.forward_features(pixels).mean((1, 2)),
        "swin_tiny",
        224,
    ),
    "torchvision swin_t": (torchvision.models.swin_t, without("head"), "swin_tiny", 224),
    "transformers swin": (
        lambda: SwinModel(SwinConfig()),
        lambda model, pixels: model(pixels).pooler_output,
        "swin_tiny",
        224,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_features_are_the_library_s(case, tmp_path):
    build, pooled, name, side = CASES[case]
    torch.manual_seed(0)
    theirs = seeded(build())
    torch.save(theirs.state_dict(), tmp_path / "encoder.pth")
    encoder = load_pretrained(tmp_path / "encoder.pth")
    assert isinstance(encoder, ImageEncoder)
    assert not encoder.training
    assert (encoder.name, encoder.in_channels, encoder.behavior) == (name, 3, "published")
    assert encoder.origin == image_only.ENCODER
    assert encoder.load_report.complete
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)) - 0.5
    with torch.no_grad():
        expected, found = pooled(theirs, pixels), encoder(pixels).pooled
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def gray_resnet() -> dict[str, torch.Tensor]:
    """As PRIOR publishes it: one input channel, no classifier."""
    state = seeded(torchvision.models.resnet50()).state_dict()
    state["conv1.weight"] = state["conv1.weight"].sum(dim=1, keepdim=True)
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def test_input_channels_come_from_the_file(tmp_path):
    torch.save(gray_resnet(), tmp_path / "prior_resnet50.pt")
    encoder = load_pretrained(tmp_path / "prior_resnet50.pt")
    assert (encoder.name, encoder.in_channels) == ("resnet50", 1)
    assert len(encoder.load_report.matched) == 318
    assert encoder.load_report.ignored == ()
    with torch.no_grad():
        features = encoder(torch.zeros(1, 1, 64, 64))
    assert features.pooled.shape == (1, 2048)
    assert features.regions.shape == (1, 4, 4, 1024)


@pytest.fixture(scope="module")
def tiny() -> dict[str, torch.Tensor]:
    return seeded(ImageEncoder("resnet_tiny").trunk).state_dict()


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "backbone.", "resnet."])
def test_prefixes_and_classifiers(tiny, prefix, tmp_path):
    state = {prefix + name: value for name, value in tiny.items()} | {"fc.weight": torch.zeros(3, 128)}
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    encoder = load_pretrained(tmp_path / "a.pth.tar")
    assert encoder.load_report.ignored == ("fc.weight",)
    assert torch.equal(encoder.trunk.conv1.weight, tiny["conv1.weight"])


def test_safetensors_and_the_old_format_of_pytorch(tiny, tmp_path):
    save_file({name: value.contiguous() for name, value in tiny.items()}, tmp_path / "a.safetensors")
    torch.save(tiny, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "old.pth"):
        assert torch.equal(load_pretrained(tmp_path / name).trunk.bn1.bias, tiny["bn1.bias"])
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"cut\.safetensors cannot be read"):
        load_pretrained(tmp_path / "cut.safetensors")


def test_files_without_counters_of_batches(tiny, tmp_path):
    """PyTorch before 0.4.1 did not count; torchvision's first ResNets are such files."""
    torch.save({name: value for name, value in tiny.items() if "num_batches" not in name}, tmp_path / "a.pth")
    encoder = load_pretrained(tmp_path / "a.pth")
    assert encoder.load_report.complete
    assert encoder.trunk.bn1.num_batches_tracked == 0


def test_faults_of_encoder_files(tiny, tmp_path):
    def write(state):
        torch.save(state, tmp_path / "a.pth")
        return tmp_path / "a.pth"

    with pytest.raises(WeightsError, match=r"1 missing: trunk\.layer4\.0\.bn2\.bias"):
        load_pretrained(write({name: value for name, value in tiny.items() if name != "layer4.0.bn2.bias"}))
    with pytest.raises(WeightsError, match=r"1 unexpected: extra\.weight"):
        load_pretrained(write({**tiny, "extra.weight": torch.zeros(1)}))
    with pytest.raises(WeightsError, match=r"in_channels\n.*1 or 3"):
        load_pretrained(write({**tiny, "conv1.weight": torch.zeros(64, 2, 7, 7)}))
    with pytest.raises(WeightsError, match=r"ViT of the sizes \(64, 16, 1\); known: .*vit_tiny_patch16"):
        state = timm.create_model("vit_tiny_patch16_224", embed_dim=64, depth=1, num_heads=1).state_dict()
        load_pretrained(write(state))
    with pytest.raises(WeightsError, match="tokenizer is of no use"):
        load_pretrained(write(tiny), object())
    with pytest.warns(UserWarning, match="in part"):
        model = load_pretrained(write({**tiny, "extra.weight": torch.zeros(1)}), allow_partial=True)
    assert model.load_report.unexpected == ("extra.weight",)


def test_loading_leaves_the_global_random_state(tiny, tmp_path):
    torch.save(tiny, tmp_path / "a.pth")
    before = torch.get_rng_state()
    load_pretrained(tmp_path / "a.pth")
    assert torch.equal(before, torch.get_rng_state())
