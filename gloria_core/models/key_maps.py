"""Names of the tensors of image networks in torchvision, timm and transformers (4 and 5) -> timm's, which are ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gloria_core.models.weights import WeightsError

JOINED = " + "  # between the names of tensors that are one of ours
Shapes = Mapping[str, tuple[int, ...]]
Rules = tuple[tuple[str, str], ...]  # regular expressions, and what they become in timm's names
# Our name -> (name in the file, or the names of three joined tensors; tensor).
Named = dict[str, tuple[str, Tensor]]
# What may stand before all names of a file that holds one network.
PREFIXES = ("", "model.", "encoder.", "backbone.", "trunk.", "resnet.", "vit.", "swin.")
# What reads the image, whose second axis is its channels, in timm's names.
FIRST_FILTERS = {"conv1.weight", "features.conv0.weight", "conv_stem.weight", "patch_embed.proj.weight"}
# What an encoder has no place for: classifiers, poolers, and tables of counting numbers.
NO_WEIGHTS = re.compile(
    r"(fc|head|heads|head_dist|classifier|pooler|last_linear)\..*|.*\.(relative_position_index|attn_mask|position_ids)"
    r"|embeddings\.mask_token"
)


_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_TRANSFORMERS_RESNET = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    *((rf"^encoder\.stages\.{stage}\.layers\.", f"layer{stage + 1}.") for stage in range(4)),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
    *((rf"\.layer\.{step}\.convolution\.", f".conv{step + 1}.") for step in range(3)),
    *((rf"\.layer\.{step}\.normalization\.", f".bn{step + 1}.") for step in range(3)),
)
_TRANSFORMERS_BLOCK = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\.attention\.((attention|self)\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.((attention|self)\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.((attention|self)\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)
_TRANSFORMERS_VIT = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    *_TRANSFORMERS_BLOCK,
)
_TRANSFORMERS_SWIN = (
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    # timm merges patches at the start of a stage, transformers at the end of the one before
    *((rf"^encoder\.layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in range(3)),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.(self|relative_position_bias)\.(?=relative_position_bias_table$)", ".attn."),
    *_TRANSFORMERS_BLOCK,
)
_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
)
_TORCHVISION_SWIN = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    *((rf"^features\.{2 * stage + 1}\.", f"layers.{stage}.blocks.") for stage in range(4)),
    *((rf"^features\.{2 * stage + 2}\.", f"layers.{stage + 1}.downsample.") for stage in range(3)),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
# Swin as its authors saved it, and timm before its version 0.9
_AUTHORS_SWIN = tuple((rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in (2, 1, 0))
# How each library names a family: names that tell it from the others, and the rules for its names.
KEY_MAPS: tuple[tuple[set[str], Rules], ...] = (
    ({"conv1.weight", "layer1.0.conv1.weight"}, ()),  # ResNet of torchvision and timm
    ({"embedder.embedder.convolution.weight"}, _TRANSFORMERS_RESNET),
    # torchvision's download still has denselayer1.norm.1.weight, which its network calls norm1.weight
    ({"features.conv0.weight", "features.norm5.weight"}, ((r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2"),)),
    ({"conv_stem.weight", "conv_head.weight"}, ()),  # EfficientNet of timm
    ({"patch_embed.proj.weight", "cls_token"}, ()),  # ViT of timm, DeiT
    ({_PROJECTION, "embeddings.cls_token"}, _TRANSFORMERS_VIT),
    ({"conv_proj.weight", "class_token"}, _TORCHVISION_VIT),
    ({"patch_embed.norm.weight", "layers.0.downsample.reduction.weight"}, _AUTHORS_SWIN),
    ({"patch_embed.proj.weight", "patch_embed.norm.weight"}, ()),  # Swin of timm
    ({_PROJECTION, "embeddings.norm.weight"}, _TRANSFORMERS_SWIN),
    ({"features.0.0.weight", "features.1.0.attn.qkv.weight"}, _TORCHVISION_SWIN),
)
_STAGES = tuple(f"layer{number}." for number in (1, 2, 3, 4))
_DENSE_BLOCKS = tuple(f"features.denseblock{number}.denselayer" for number in (1, 2, 3, 4))
_SWIN_STAGES = tuple(f"layers.{number}.blocks." for number in (0, 1, 2, 3))
# A tensor that tells the family; its name; a tensor whose sizes count, and on which axes; prefixes of numbered modules.
FAMILIES = (
    ("layer1.0.conv3.weight", "ResNet of bottlenecks", "", (), _STAGES),
    ("layer1.0.conv1.weight", "ResNet of basic blocks", "", (), _STAGES),
    ("features.conv0.weight", "DenseNet", "", (), _DENSE_BLOCKS),
    ("blocks.0.0.se.conv_reduce.weight", "EfficientNet with squeeze-and-excitation", "conv_head.weight", (0, 1), ()),
    ("conv_stem.weight", "EfficientNet without squeeze-and-excitation", "conv_head.weight", (0, 1), ()),
    ("cls_token", "ViT", "patch_embed.proj.weight", (0, 2), ("blocks.",)),
    ("patch_embed.norm.weight", "Swin", "patch_embed.proj.weight", (0, 2), _SWIN_STAGES),
)
# Family and sizes: blocks of each stage; channels of EfficientNet's last convolution; width, patch (and depth).
NETWORKS = {
    ("ResNet of basic blocks", 1, 1, 1, 1): "resnet_tiny",
    ("ResNet of basic blocks", 2, 2, 2, 2): "resnet18",
    ("ResNet of basic blocks", 3, 4, 6, 3): "resnet34",
    ("ResNet of bottlenecks", 3, 4, 6, 3): "resnet50",
    ("DenseNet", 6, 12, 24, 16): "densenet121",
    ("EfficientNet without squeeze-and-excitation", 1280, 320): "efficientnet_lite0",
    ("ViT", 192, 16, 12): "vit_tiny_patch16",
    ("ViT", 384, 16, 12): "vit_small_patch16",
    ("ViT", 768, 16, 12): "vit_base_patch16",
    ("Swin", 96, 4, 2, 2, 6, 2): "swin_tiny",
}


def key_map(names: Iterable[str]) -> tuple[str, Rules] | None:
    """What stands before the names of a network's tensors, and its rules; None for an unknown network."""
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        for marks, rules in KEY_MAPS:
            if marks <= inside:
                return prefix, rules
    return None


def is_one_network(names: Iterable[str]) -> bool:
    """Whether all names are those of one known network, and perhaps of its classifier."""
    known = key_map(names)
    return known is not None and all(name.startswith(known[0]) or NO_WEIGHTS.fullmatch(name) for name in names)


def timm_names(named: Mapping[str, tuple[str, Tensor]]) -> tuple[Named, list[str]]:
    """The tensors of one network under timm's names, and the names in the file of those that have no place.

    A network that no key map knows keeps its names. Query, key and value of one attention are joined. Files from before
    PyTorch 0.4.1 lack BatchNorm's counters of batches, which nothing here reads: they are set to zero.
    """
    prefix, rules = key_map(named) or ("", ())
    renamed, unused = {}, []
    for name, (theirs, value) in named.items():
        bare = name.removeprefix(prefix)
        if NO_WEIGHTS.fullmatch(bare):
            unused.append(theirs)
            continue
        for pattern, ours in rules:
            bare = re.sub(pattern, ours, bare)
        renamed[bare] = (theirs, value)
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            pairs = [renamed.pop(part) for part in parts]
            joined = torch.cat([value for _, value in pairs])
            renamed[name.replace(".attn.q.", ".attn.qkv.")] = (JOINED.join(theirs for theirs, _ in pairs), joined)
    for name in [name for name in renamed if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        renamed.setdefault(counter, (f"(zero, for {counter})", torch.zeros((), dtype=torch.int64)))
    return renamed, unused


def network_name(shapes: Shapes) -> str:
    """Our name of the network with tensors of these timm names and shapes. Raises WeightsError for another one."""
    row = next((row for row in FAMILIES if row[0] in shapes), None)
    if row is None:
        raise WeightsError(f"its image encoder is none that is known; its first tensors: {', '.join(list(shapes)[:3])}")
    _, family, measured, axes, prefixes = row
    sizes = (family, *(shapes[measured][axis] for axis in axes), *(count(shapes, prefix) for prefix in prefixes))
    if sizes not in NETWORKS:
        known = ", ".join(f"{name} {known[1:]}" for known, name in NETWORKS.items() if known[0] == sizes[0])
        raise WeightsError(f"its image encoder is a {sizes[0]} of the sizes {sizes[1:]}; known: {known or 'none'}")
    return NETWORKS[sizes]


def count(shapes: Iterable[str], prefix: str) -> int:
    """How many numbered modules follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})
