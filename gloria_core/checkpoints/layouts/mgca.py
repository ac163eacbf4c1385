"""Lightning 1.5 files of github.com/HKU-MedAI/MGCA (`vit_base.ckpt`, `resnet_50.ckpt`), and of its ConVIRT baseline.

The architecture is taken from the shapes of the tensors, temperatures and weights of the losses from the stored
configuration where it has them. What the file does not hold and the model does: a table of token types, which is zero,
because the released text encoder has none. What the file holds and the model does not:

- cross-attention of the text encoder: made and never called;
- `word_local_atten_layer`, `patch_local_atten_layer`: only trained with `use_local_atten`, which the released command
  line cannot set. The attention figures of the released notebook were drawn from this layer all the same: if the
  published weights come from the released code, it was never trained, and the trained maps are softmax(t . p / 0.1);
- token heads of the ConVIRT baseline, which no loss of it reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import Shapes, Translation, bert_architecture, resnet_name
from gloria_core.checkpoints.model import ModelConfig
from gloria_core.checkpoints.untrusted import lookup

NAME = "MGCA (Lightning)"
TRUNK, BERT = "image_encoder.trunk.", "text_encoder.bert."
PREFIXES = {  # theirs, after `_bare` -> ours
    "img_encoder.model.": TRUNK,
    "img_encoder.global_embed.head.": "objective.image_head.",
    "img_encoder.local_embed.head.": "objective.region_head.",
    "text_encoder.model.": BERT,
    "text_encoder.global_embed.head.": "objective.text_head.",
    "text_encoder.local_embed.head.": "objective.word_head.",
    "word_local_atten_layer.": "objective.word_attention.",
    "patch_local_atten_layer.": "objective.patch_attention.",
    "prototype_layer.": "objective.prototypes.",
}
TYPES = f"{BERT}embeddings.token_type_embeddings.weight"
NO_TYPES = "(zeros, for the token types that the released encoder lacks)"


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """Both encoders with projection heads of their own, with or without the suffix `_q` and wrappers' prefixes."""
    names = {_bare(name) for name in shapes}
    return {"img_encoder.global_embed.head.0.weight", "text_encoder.global_embed.head.0.weight"} <= names


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    options = _options(tensors, stored)
    renamed, ignored = {}, []
    for theirs, value in tensors.items():
        name = _bare(theirs)
        for old, new in PREFIXES.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if name.startswith("objective.") and name.endswith(".weight") and value.ndim == 3:
            value = value[:, :, 0]  # a 1x1 convolution is a Linear over channels
        if _has_no_place(name, options):
            ignored.append(theirs)
        else:
            renamed[name] = (theirs, value)
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    text = bert_architecture(shapes, BERT, type_vocab_size=2)
    renamed[TYPES] = (NO_TYPES, torch.zeros(text.type_vocab_size, text.hidden_size))
    return Translation(_config(shapes, stored, options, text.num_hidden_layers), text, renamed, ignored)


def _bare(name: str) -> str:
    name = name.removeprefix("module.")
    for tower in ("img_encoder", "text_encoder"):
        if name.startswith(f"{tower}_q."):
            return tower + name.removeprefix(f"{tower}_q")
    return name


def _has_no_place(name: str, options: Mapping[str, Any]) -> bool:
    unused = []
    if not options["use_local_attention"]:
        unused += ["word_attention", "patch_attention"]
    if not options["bidirectional"]:
        unused += ["patch_attention"]
    if not options["weights"]["cta"]:
        unused += ["region_head", "word_head"]
    if not options["weights"]["cpa"]:
        unused += ["prototypes"]
    if name.startswith(BERT):
        return ".crossattention." in name or name == f"{BERT}embeddings.position_ids"
    return name.startswith(tuple(f"objective.{part}." for part in unused))


def _options(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the objective; the widths from shapes, the rest as stored, else as released."""
    shapes = {_bare(name): tuple(value.shape) for name, value in tensors.items()}
    hidden = shapes["img_encoder.global_embed.head.0.weight"][0]
    widths = {"dim": shapes["img_encoder.global_embed.head.3.weight"][0], "hidden": hidden}
    temperature = lookup(stored, "softmax_temperature", default=0.07)
    if "prototype_layer.weight" not in shapes:  # the ConVIRT baseline
        return {
            **widths,
            "temperatures": {"ita": temperature},
            "weights": {"ita": 1.0, "cta": 0.0, "cpa": 0.0},
            "use_local_attention": False,
            "bidirectional": True,
        }
    return {
        **widths,
        "n_prototypes": shapes["prototype_layer.weight"][0],
        "temperatures": {
            "ita": temperature,
            "cta": lookup(stored, "local_temperature", default=0.1),
            "cpa": lookup(stored, "proto_temperature", default=0.2),
        },
        "weights": {
            name: lookup(stored, f"lambda_{number}", default=1.0)
            for number, name in enumerate(("ita", "cta", "cpa"), start=1)
        },
        "freeze_prototypes_epochs": lookup(stored, "freeze_prototypes_epochs", default=1),
        "use_local_attention": lookup(stored, "use_local_atten", default=False),
        "bidirectional": lookup(stored, "bidirectional", default=True),
    }


def _config(shapes: Shapes, stored: Mapping[str, Any], options: dict[str, Any], depth: int) -> ModelConfig:
    vit = f"{TRUNK}cls_token" in shapes
    return ModelConfig.from_dict(
        {
            "objective": "mgca",
            "behavior": "published",
            "objective_options": options,
            "image_encoder": "vit_base_patch16" if vit else resnet_name(shapes, TRUNK),
            "region_stage": "layer3",
            "resize_to": None if vit else 299,
            "text_encoder": lookup(stored, "bert_type", default="emilyalsentzer/Bio_ClinicalBERT"),
            "last_layers": 1,
            "text_depth": depth,
            "text_positions": "zero",
            "image_size": 256,
            "crop": 224,
            "norm": "half",
            "max_tokens": 112,
            "text_section": "both",
        }
    )
