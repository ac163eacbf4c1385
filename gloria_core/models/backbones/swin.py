"""Swin transformer of `transformers` (Liu et al. 2021), the second image encoder of CXR-CLIP (You et al. 2023)."""

from __future__ import annotations

from torch import Tensor, nn

from gloria_core.models.backbones.base import Backbone, fetching
from gloria_core.models.weights import WeightsError
from gloria_core.types import ImageFeatures

HUB_NAME = "microsoft/swin-tiny-patch4-window7-224"
STAGE_NUMBER = {"layer2": 1, "layer3": 2, "layer4": 3}
RENAMED = (
    ("attention.self.query.", "attention.q_proj."),
    ("attention.self.key.", "attention.k_proj."),
    ("attention.self.value.", "attention.v_proj."),
    ("attention.self.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),  # after attention.output.dense, which ends alike
)


class Swin(Backbone):
    """Regions: blocks of the second ("layer2", stride 8), third ("layer3", 16) and last stage ("layer4", 32).

    The first two are taken before the patch merging that follows them; "layer4" is the last hidden state with the
    final LayerNorm, as the published model returns it.
    Pooled: "default" and "mean" the mean of the final tokens; "first_token" the token of the top left, which the
    released training code of CXR-CLIP calls its class token.

    Images of any size: the grid is padded with zeros at the right and at the bottom where patches, mergings or
    windows do not fill it. Windows stay 7 x 7 and are not shifted where they cover a side of the grid.
    """

    NAMES = ("swin_tiny",)
    POOLINGS = ("default", "mean", "first_token")
    CLASSIFIERS = ("classifier.",)

    def build(self) -> nn.Module:
        from transformers import SwinConfig, SwinModel

        return SwinModel._from_config(SwinConfig(), attn_implementation="sdpa", add_pooling_layer=False)

    def widths(self, trunk: nn.Module) -> dict[str, int]:
        widths = {stage: trunk.config.embed_dim * 2**number for stage, number in STAGE_NUMBER.items()}
        return {**widths, "pooled": trunk.num_features}

    def first_layer(self, trunk: nn.Module) -> nn.Conv2d:
        return trunk.embeddings.patch_embeddings.projection

    def features(
        self, trunk: nn.Module, pixels: Tensor, *, stage: str, pooling: str, cls_attention: bool
    ) -> ImageFeatures:
        hidden, grid = trunk.embeddings(pixels)
        maps = []
        for layer in trunk.encoder.layers:
            _set_windows(layer, grid, trunk.config.window_size)
            hidden, before_merging, _ = layer(
                hidden, grid, always_partition=True, output_hidden_states_before_downsampling=True
            )
            maps.append(before_merging)
            if layer.downsample is not None:
                grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        tokens = trunk.layernorm(hidden)
        final = tokens.reshape(len(tokens), *grid, -1)
        return ImageFeatures(
            pooled=tokens[:, 0] if pooling == "first_token" else tokens.mean(dim=1),
            regions=final if stage == "layer4" else maps[STAGE_NUMBER[stage]].permute(0, 2, 3, 1),
        )

    def translate(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {new_name(name): value for name, value in tensors.items() if not is_constant(name)}

    def imagenet(self) -> dict[str, Tensor]:
        from transformers import SwinModel

        with fetching(f"{self.name} ({HUB_NAME})"):
            model, report = SwinModel.from_pretrained(HUB_NAME, add_pooling_layer=False, output_loading_info=True)
        faults = [*report["missing_keys"], *report["mismatched_keys"]]
        if faults:  # transformers would leave them random
            raise WeightsError(f"{HUB_NAME} lacks {len(faults)} tensors of {self.name}, such as {faults[0]}")
        return model.float().state_dict()


def new_name(name: str) -> str:
    """Name of a Swin tensor in transformers 5, from that of version 4 or 5, with or without "swin." before it."""
    name = name.removeprefix("swin.")
    for old, new in RENAMED:
        if old in name:
            return name.replace(old, new)
    return name


def is_constant(name: str) -> bool:
    """Whether a stored tensor is no weight: version 4 kept the table of window positions in its files."""
    return name.endswith("relative_position_index")


def _set_windows(stage: nn.Module, grid: tuple[int, int], window: int) -> None:
    """Window and shift of a stage for this grid.

    Left to itself the network sets them once, at the first small image, and keeps them for the larger ones after.
    """
    for number, block in enumerate(stage.blocks):
        block.window_size = window
        block.shift_size = window // 2 if number % 2 and min(grid) > window else 0
