import copy

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

from gloria_core.models.image_encoder import ImageEncoder
from gloria_core.models.segmentation import SegmentationNet, SetrDecoder, decoder_inputs
from gloria_core.types import ImageFeatures


class Patches(nn.Module):
    """A stand-in for a vision transformer: a grid of patch vectors and no stages."""

    def __init__(self, width=12, patch=16):
        super().__init__()
        self.region_dim, self.in_channels, self.frozen, self.has_pyramid = width, 3, False, False
        self.embed = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels):
        grid = self.embed(pixels).permute(0, 2, 3, 1)
        return ImageFeatures(grid.mean(dim=(1, 2)), grid)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return moved_statistics(ImageEncoder("resnet_tiny"))


def moved_statistics(encoder):
    """BatchNorm with statistics of its own, as after training: a lost buffer would show."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_the_unet_of_the_library_with_the_same_tensors(name):
    torch.manual_seed(1)
    encoder = moved_statistics(ImageEncoder(name))
    net = SegmentationNet(encoder, 2).eval()
    reference = smp.Unet(name, encoder_weights=None, classes=2, activation=None).eval()
    assert set(encoder.trunk.state_dict()) == set(reference.encoder.state_dict())
    unused = {"fc.weight": None, "fc.bias": None}  # the library takes these out of every file
    reference.encoder.load_state_dict({**encoder.trunk.state_dict(), **unused})
    reference.decoder.load_state_dict(net.decoder.state_dict())
    reference.segmentation_head.load_state_dict(net.head.state_dict())
    pixels = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(pixels), reference(pixels), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["resnet_tiny", "resnet18", "resnet34", "efficientnet_lite0", "densenet121"])
def test_the_pyramid_is_the_encoders_own(name):
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for stage, place in (("layer2", 2), ("layer3", 3), ("layer4", 4)):
            torch.manual_seed(2)
            encoder = moved_statistics(ImageEncoder(name, region_stage=stage))
            features = decoder_inputs(encoder, pixels)
            assert [tuple(f.shape[2:]) for f in features] == [(64 // s, 96 // s) for s in (2, 4, 8, 16, 32)]
            regions = encoder(pixels).regions.permute(0, 3, 1, 2)
            torch.testing.assert_close(features[place], regions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(88, 88), (64, 64), (50, 41), (7, 9)])
def test_logits_have_the_size_of_the_input(encoder, size):
    net = SegmentationNet(encoder, 3, channels=(16, 16, 8, 8, 8)).eval()
    assert net(torch.randn(2, 3, *size)).shape == (2, 3, *size)


def test_padding_is_undone_in_place(encoder):
    """Where the input is cut out of a larger one with equal surroundings, the logits are cut out of the larger's."""
    net = SegmentationNet(encoder, 1, channels=(16, 16, 8, 8, 8)).eval()
    small = torch.randn(1, 3, 60, 56)
    large = nn.functional.pad(small, (4, 4, 2, 2), mode="replicate")
    assert large.shape[2:] == (64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(small), net(large)[..., 2:62, 4:60])


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_the_decoder_and_the_encoder_only_if_it_is_trained(encoder, frozen):
    net = SegmentationNet(encoder, 1, frozen=frozen, channels=(16, 16, 8, 8, 8)).train()
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in [*net.decoder.parameters(), *net.head.parameters()])
    assert all((p.grad is None) == frozen for p in net.encoder.parameters())


@pytest.mark.parametrize(("frozen", "batch_norm", "moves"), [(True, "eval", 0), (True, "train", 1), (False, "eval", 1)])
def test_what_batch_norm_does(encoder, frozen, batch_norm, moves):
    before = copy.deepcopy(encoder.state_dict())
    net = SegmentationNet(encoder, 1, frozen=frozen, batch_norm=batch_norm, channels=(16, 16, 8, 8, 8)).train()
    net(torch.randn(2, 3, 64, 64))
    changed = [name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) == bool(moves)
    assert all("running" in name or "num_batches" in name for name in changed)
    net.eval()
    before = copy.deepcopy(encoder.state_dict())
    net(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_an_encoder_that_was_frozen_in_pretraining_can_be_trained():
    net = SegmentationNet(ImageEncoder("resnet_tiny", frozen=True), 1, frozen=False, channels=(16, 16, 8, 8, 8)).train()
    assert all(module.training for module in net.encoder.modules())
    net(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is not None for p in net.encoder.parameters())


def test_setr_is_a_linear_layer_and_four_doublings():
    torch.manual_seed(0)
    decoder = SetrDecoder(12, 2, channels=(10, 9, 8, 7)).eval()
    grid = torch.randn(2, 3, 4, 12)
    x = (grid @ decoder.linear.weight.T + decoder.linear.bias).permute(0, 3, 1, 2)
    for number in range(4):
        conv, norm = decoder.steps[4 * number], decoder.steps[4 * number + 1]
        x = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        x = (norm(x)).clamp(min=0)
        x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
    x = nn.functional.conv2d(x, decoder.head.weight, decoder.head.bias, padding=1)
    assert x.shape == (2, 2, 48, 64)
    torch.testing.assert_close(decoder(grid), x)
    assert [m.out_channels for m in SetrDecoder(768, 1).modules() if isinstance(m, nn.Conv2d)] == [512, 256, 128, 64, 1]


def test_an_encoder_without_stages_gets_setr():
    net = SegmentationNet(Patches(), 2, channels=(10, 9, 8, 7)).train()
    assert isinstance(net.decoder, SetrDecoder)
    assert net(torch.randn(2, 3, 64, 48)).shape == (2, 2, 64, 48)
    assert net(torch.randn(2, 3, 70, 50)).shape == (2, 2, 70, 50)  # 16-pixel cells do not fill this one
    net(torch.randn(2, 3, 32, 32)).mean().backward()
    assert all(p.grad is None for p in net.encoder.parameters())
    with pytest.raises(ValueError, match="channels has 5 widths"):
        SegmentationNet(Patches(), 2, channels=(128, 64, 32, 16, 8))


@pytest.mark.parametrize(("name", "stage"), [("vit_tiny_patch16", "layer3"), ("swin_tiny", "layer2")])
def test_transformers_get_setr(name, stage):
    torch.manual_seed(0)
    net = SegmentationNet(ImageEncoder(name, region_stage=stage), 2, channels=(8, 8, 8, 8)).eval()
    assert isinstance(net.decoder, SetrDecoder)
    with torch.no_grad():
        assert net(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)
