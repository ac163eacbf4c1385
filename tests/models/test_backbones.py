"""Transformers and DenseNet behind ImageEncoder: shapes, and what their features mean."""

import pytest
import timm
import torch
from torch.nn import functional as F

from gloria_core.models.image_encoder import ImageEncoder

NEW = ("vit_tiny_patch16", "swin_tiny", "densenet121")


def encoder_of(name: str, **options) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(name, **options).eval()


def enlarge(module: torch.nn.Module) -> None:
    """Values at which attention is far from uniform and every norm has a bias, unlike those of a new network."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.15)


# shapes


@pytest.mark.parametrize(
    ("name", "pooled", "stages"),
    [
        ("vit_tiny_patch16", 192, {"layer2": (16, 192), "layer3": (16, 192), "layer4": (16, 192)}),
        ("vit_small_patch16", 384, {"layer3": (16, 384)}),
        ("swin_tiny", 768, {"layer2": (8, 192), "layer3": (16, 384), "layer4": (32, 768)}),
        ("densenet121", 1024, {"layer2": (8, 512), "layer3": (16, 1024), "layer4": (32, 1024)}),
    ],
)
def test_shapes_at_224_and_at_another_size(name, pooled, stages):
    for stage, (stride, width) in stages.items():
        encoder = encoder_of(name, region_stage=stage)
        assert (encoder.pooled_dim, encoder.region_dim, encoder.region_stride) == (pooled, width, stride)
        for height, columns in ((224, 224), (64, 96)):
            with torch.no_grad():
                features = encoder(torch.randn(1, 3, height, columns))
            assert features.pooled.shape == (1, pooled)
            assert features.regions.shape == (1, height // stride, columns // stride, width)
            assert features.cls_attention is None
            assert features.regions.isfinite().all()


@pytest.mark.parametrize("name", NEW)
def test_regions_are_row_major_from_the_top_left(name):
    """Another patch in row 4, column 1 changes the region there most."""
    encoder = encoder_of(name)
    before = torch.randn(1, 3, 96, 96)
    after = before.clone()
    after[:, :, 64:80, 16:32] = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        change = (encoder(after).regions - encoder(before).regions).norm(dim=-1)[0]
    assert divmod(int(change.argmax()), 6) == (4, 1)


@pytest.mark.parametrize("name", NEW)
def test_one_channel_equals_three_equal_channels(name):
    three, one, gray = encoder_of(name), encoder_of(name, in_channels=1), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        ours, theirs = one(gray), three(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours.pooled, theirs.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.regions, theirs.regions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NEW)
def test_memory_order_and_resize(name):
    encoder, pixels = encoder_of(name), torch.randn(1, 3, 50, 40)
    encoder.resize_to = 96
    with torch.no_grad():
        fast = encoder(pixels).regions
        encoder.channels_last = False
        plain = encoder(pixels).regions
        encoder.resize_to = None
        direct = encoder(F.interpolate(pixels, size=(96, 96), mode="bilinear", align_corners=True)).regions
    assert fast.shape[1:3] == (6, 6)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(direct, plain)


@pytest.mark.parametrize("name", NEW)
def test_every_parameter_learns_and_a_frozen_one_never(name):
    encoder, pixels = encoder_of(name, cls_attention=True), torch.randn(2, 3, 64, 64)
    features = encoder.train()(pixels)
    (features.pooled.square().sum() + features.regions.square().sum()).backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None] == []
    frozen = encoder_of(name, frozen=True)
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    first, second = frozen.train()(pixels), frozen(pixels)  # Swin drops whole blocks at random in training mode
    assert not first.pooled.requires_grad
    assert torch.equal(first.pooled, second.pooled)
    assert all(torch.equal(before[name], value) for name, value in frozen.state_dict().items())


# vision transformer


def full_attention(attention: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """All of it, head by head and query by query. Shape: (1 + R, D) -> (heads, 1 + R, 1 + R)"""
    width = tokens.shape[1]
    query, key, _ = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(width, dim=1)
    size = width // attention.num_heads
    heads = []
    for head in range(attention.num_heads):
        mine = slice(head * size, (head + 1) * size)
        rows = [((query[i, mine] * key[:, mine]).sum(1) / size**0.5).exp() for i in range(len(tokens))]
        heads.append(torch.stack([row / row.sum() for row in rows]))
    return torch.stack(heads)


def test_class_attention_is_a_row_of_the_full_attention():
    encoder = encoder_of("vit_tiny_patch16", cls_attention=True)
    enlarge(encoder)
    trunk, seen = encoder.trunk, {}
    attention = trunk.blocks[-1].attn
    with torch.no_grad():
        attention.qkv.weight.mul_(8)
    attention.fused_attn = False  # timm then shows its own attention to the dropout
    attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(timm=output))
    attention.register_forward_pre_hook(lambda module, inputs: seen.update(tokens=inputs[0]))
    features = encoder(torch.randn(2, 3, 64, 96))
    ours = features.cls_attention
    assert ours.shape == (2, 4, 6)
    assert not ours.requires_grad
    assert features.pooled.requires_grad
    torch.testing.assert_close(ours.flatten(1), seen["timm"][:, :, 0, 1:].mean(1).detach(), rtol=1e-4, atol=1e-6)
    for n in range(2):
        naive = full_attention(attention, seen["tokens"][n])[:, 0, 1:].mean(0).detach()
        torch.testing.assert_close(ours[n].flatten(), naive, rtol=1e-4, atol=1e-6)
    assert ours.flatten(1).max() > 3 / 25  # far from uniform, or the comparison would prove little
    assert bool((ours.flatten(1).sum(1) < 1).all())
    assert len(attention._forward_pre_hooks) == 1  # the test's own hook alone is left


@pytest.mark.parametrize("name", ["resnet_tiny", "swin_tiny"])
def test_no_class_token_no_class_attention(name):
    with torch.no_grad():
        assert encoder_of(name, cls_attention=True)(torch.randn(1, 3, 64, 64)).cls_attention is None


def test_poolings_of_a_vit():
    encoder, pixels = encoder_of("vit_tiny_patch16"), torch.randn(2, 3, 64, 64)
    enlarge(encoder)
    with torch.no_grad():
        tokens = encoder.trunk.forward_features(pixels)
        pooled = {}
        for encoder.pooling in ("default", "first_token", "mean"):
            pooled[encoder.pooling] = encoder(pixels).pooled
        regions = encoder(pixels).regions
    torch.testing.assert_close(pooled["default"], tokens[:, 0])
    torch.testing.assert_close(pooled["first_token"], tokens[:, 0])
    torch.testing.assert_close(pooled["mean"], regions.mean(dim=(1, 2)))
    torch.testing.assert_close(regions.flatten(1, 2), tokens[:, 1:])


def test_position_embeddings_are_interpolated():
    """As if the network had been made for 96 pixels and given the shrunk grid of positions."""
    encoder, pixels = encoder_of("vit_tiny_patch16"), torch.randn(1, 3, 96, 96)
    enlarge(encoder)
    state = encoder.trunk.state_dict()
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    small = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], small], dim=1)
    made_for_96 = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=96).eval()
    made_for_96.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels).pooled, made_for_96(pixels), rtol=1e-4, atol=1e-4)


def test_a_vit_names_the_sizes_it_can_take():
    with pytest.raises(ValueError, match=r"multiples of 16 pixels, got 64 x 100.*resize_to"):
        encoder_of("vit_tiny_patch16")(torch.randn(1, 3, 64, 100))


def test_names_of_vit_base_are_timms():
    with torch.device("meta"):
        ours = ImageEncoder("vit_base_patch16").state_dict()
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
    assert len(ours) == 150
    assert {name: value.shape for name, value in ours.items()} == {
        f"trunk.{name}": value.shape for name, value in theirs.items()
    }


# swin


def test_swin_depends_on_no_image_seen_before():
    encoder = encoder_of("swin_tiny", region_stage="layer4")
    enlarge(encoder)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = encoder(pixels)
        for side in (64, 256):
            assert encoder(torch.randn(1, 3, side, side)).regions.isfinite().all()
        after = encoder(pixels)
        encoder.pooling = "first_token"
        first = encoder(pixels).pooled
    assert torch.equal(before.pooled, after.pooled)
    torch.testing.assert_close(before.pooled, before.regions.mean(dim=(1, 2)))
    assert torch.equal(first, before.regions[:, 0, 0])


def test_swin_regions_of_earlier_stages_come_before_the_merging():
    encoder, pixels = encoder_of("swin_tiny"), torch.randn(1, 3, 224, 224)
    enlarge(encoder)
    with torch.no_grad():
        maps = {}
        for number, layer in enumerate(encoder.trunk.layers):
            layer.blocks[-1].register_forward_hook(lambda module, inputs, output, n=number: maps.update({n: output}))
        for encoder.region_stage, number in (("layer2", 1), ("layer3", 2)):
            assert torch.equal(encoder(pixels).regions, maps[number])


def test_swin_takes_odd_sizes():
    encoder = encoder_of("swin_tiny", region_stage="layer4")
    with torch.no_grad():
        assert encoder(torch.randn(1, 3, 75, 130)).regions.shape == (1, 3, 5, 768)


# densenet


def test_densenet_equals_torchvision_and_its_blocks():
    encoder, pixels = encoder_of("densenet121"), torch.randn(2, 3, 64, 64)
    layers = encoder.trunk.features
    with torch.no_grad():
        pooled = encoder.trunk(pixels)  # torchvision's own forward pass; its classifier is the identity here
        for encoder.region_stage, last in (("layer2", "denseblock2"), ("layer3", "denseblock3")):
            position = [name for name, _ in layers.named_children()].index(last)
            features = encoder(pixels)
            torch.testing.assert_close(features.pooled, pooled, rtol=1e-4, atol=1e-5)
            expected = layers[: position + 1](pixels).permute(0, 2, 3, 1)
            torch.testing.assert_close(features.regions, expected, rtol=1e-4, atol=1e-4)
        encoder.region_stage = "layer4"
        torch.testing.assert_close(encoder(pixels).regions.mean(dim=(1, 2)), pooled, rtol=1e-4, atol=1e-5)
        assert encoder(pixels).regions.min() >= 0


# options


def test_unknown_options_are_named():
    for options, error, message in (
        ({"name": "vit_huge"}, ValueError, "name\n.*'resnet_tiny'.*'vit_base_patch16'.*'swin_tiny'"),
        ({"pooling": "max"}, ValueError, "pooling\n.*'default', 'mean' or 'first_token'"),
        ({"pooling": "first_token"}, ValueError, "resnet18 has no pooling 'first_token'; available: default, mean"),
        ({"name": "densenet121", "pooling": "first_token"}, ValueError, "densenet121 has no pooling"),
        ({"cls_attention": 1}, ValueError, "cls_attention\n.*valid boolean"),
    ):
        with pytest.raises(error, match=message):
            ImageEncoder(**options)
