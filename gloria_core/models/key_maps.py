"""Names of the tensors of image networks in torchvision, timm and transformers (4 and 5) -> timm's, which are ours.

The names are in key_maps.yaml.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from ruamel.yaml import YAML
from torch import Tensor

from gloria_core.models.weights import WeightsError

JOINED = " + "  # between the names of tensors that are one of ours
Shapes = Mapping[str, tuple[int, ...]]
Rules = dict[str, str]  # regular expressions, and what they become in timm's names, one after the other
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

_TABLES = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml"))
KEY_MAPS = [(set(row["marks"]), row.get("rules", {}) | row.get("then", {})) for row in _TABLES["key_maps"]]
NETWORKS = {tuple(sizes): name for name, sizes in _TABLES["networks"].items()}


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
    prefix, rules = key_map(named) or ("", {})
    renamed, unused = {}, []
    for name, (theirs, value) in named.items():
        bare = name.removeprefix(prefix)
        if NO_WEIGHTS.fullmatch(bare):
            unused.append(theirs)
            continue
        for pattern, ours in rules.items():
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
    row = next((row for row in _TABLES["families"] if row["mark"] in shapes), None)
    if row is None:
        raise WeightsError(f"its image encoder is none that is known; its first tensors: {', '.join(list(shapes)[:3])}")
    measured = [shapes[row["tensor"]][axis] for axis in row.get("axes", ())]
    sizes = (row["family"], *measured, *(count(shapes, prefix) for prefix in row.get("counted", ())))
    if sizes not in NETWORKS:
        known = ", ".join(f"{name} {known[1:]}" for known, name in NETWORKS.items() if known[0] == sizes[0])
        raise WeightsError(f"its image encoder is a {sizes[0]} of the sizes {sizes[1:]}; known: {known or 'none'}")
    return NETWORKS[sizes]


def count(shapes: Iterable[str], prefix: str) -> int:
    """How many numbered modules follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})
