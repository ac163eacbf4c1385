"""Models of published files without a text encoder: a classifier or a U-Net on a pretrained image encoder."""

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from gloria_core.models.image_encoder import ImageEncoder


class StandardisedLinear(nn.Module):
    """A linear probe: features minus `mean`, divided by `scale`, then one linear layer in double precision.

    Shape: (B, D) -> (B, K) float64
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        for name in ("mean", "scale"):
            self.register_buffer(name, torch.zeros(width))
        self.register_buffer("weights", torch.zeros(classes, width, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(classes, dtype=torch.float64))

    def forward(self, pooled: Tensor) -> Tensor:
        return ((pooled.float() - self.mean) / self.scale).double() @ self.weights.T + self.bias


class ImageClassifier(nn.Module):
    """Image encoder and a new head of K = `classes` logits on its pooled feature (GLoRIA's, MGCA's, CXR-CLIP's).

    The head is one linear layer, with `hidden_dim` units MGCA's Linear, BatchNorm, ReLU, dropout, Linear, or with
    `probe` a `StandardisedLinear`.
    `frozen`: the encoder gets no gradient and stays in evaluation mode. `batch_statistics=True` lets its BatchNorm
    follow the mode of the whole all the same, and so move its statistics while "frozen": the released code of GLoRIA.

    Shape: pixels (B, C, H, W) -> logits (B, K). Raises ValueError for less than one class.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        classes: int,
        *,
        frozen: bool = True,
        batch_statistics: bool = False,
        hidden_dim: int = 0,
        dropout: float = 0.0,
        probe: bool = False,
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"a classifier needs at least one class, got {classes}")
        self.img_encoder, width, hidden = encoder, encoder.pooled_dim, []
        if hidden_dim:
            hidden = [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU()]
        last = nn.Linear(hidden_dim or width, classes)
        self.classifier = nn.Sequential(*hidden, nn.Dropout(dropout), last) if hidden or dropout else last
        if probe:
            self.classifier = StandardisedLinear(width, classes)
        self.options = {"classes": classes, "hidden_dim": hidden_dim, "probe": probe}
        self.frozen, self.batch_statistics, encoder.frozen = frozen, batch_statistics, False
        self.img_encoder.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Training mode, except that a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen and not self.batch_statistics:
            self.img_encoder.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pooled = self.img_encoder(pixels).pooled
        return self.classifier(pooled)


def unet(encoder: str, *, in_channels: int = 3, classes: int = 1) -> nn.Module:
    """segmentation-models-pytorch's U-Net with its default decoder, logits, and random values everywhere.

    Shape: (B, C, H, W), H and W divisible by 32 -> (B, K, H, W)
    """
    return smp.Unet(encoder, encoder_weights=None, activation=None, in_channels=in_channels, classes=classes)
