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

from gloria_core.checkpoints.layouts.base import BERT, Translation, bert_architecture, image_encoder_name, renamed
from gloria_core.checkpoints.model import ModelConfig
from gloria_core.checkpoints.untrusted import lookup
from gloria_core.models.key_maps import Named, Shapes

NAME = "MGCA (Lightning)"
RULES = (
    (r"text_encoder(_q)?\.model\.(embeddings\.position_ids$|.*\.crossattention\.)", None),
    (r"img_encoder(_q)?\.model\.", "image_encoder.trunk."),
    (r"img_encoder(_q)?\.global_embed\.head\.", "objective.image_head."),
    (r"img_encoder(_q)?\.local_embed\.head\.", "objective.region_head."),
    (r"text_encoder(_q)?\.model\.", "text_encoder.bert."),
    (r"text_encoder(_q)?\.global_embed\.head\.", "objective.text_head."),
    (r"text_encoder(_q)?\.local_embed\.head\.", "objective.word_head."),
    (r"word_local_atten_layer\.", "objective.word_attention."),
    (r"patch_local_atten_layer\.", "objective.patch_attention."),
    (r"prototype_layer\.", "objective.prototypes."),
)
NO_TYPES = "(zeros, for the token types that the released encoder lacks)"


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """Both encoders with projection heads of their own, with or without the suffix `_q`."""
    names = {name.replace("_encoder_q.", "_encoder.") for name in shapes}
    return {"img_encoder.global_embed.head.0.weight", "text_encoder.global_embed.head.0.weight"} <= names


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    named, ignored = renamed(tensors, RULES)
    options = _options(named, stored)
    unused = tuple(f"objective.{part}." for part in _unused_parts(options))
    ignored += [theirs for name, (theirs, _) in named.items() if name.startswith(unused)]
    named = {name: pair for name, pair in named.items() if not name.startswith(unused)}
    text = bert_architecture(named, token_types=2)
    named[f"{BERT}embeddings.token_type_embeddings.weight"] = (NO_TYPES, torch.zeros(2, text.hidden_size))
    return Translation(NAME, _config(named, stored, options, text.num_hidden_layers), text, named, ignored)


def _unused_parts(options: Mapping[str, Any]) -> list[str]:
    """Parts of the objective that these options do not build."""
    unused = []
    if not options["use_local_attention"]:
        unused += ["word_attention", "patch_attention"]
    if not options["bidirectional"]:
        unused += ["patch_attention"]
    if not options["weights"]["cta"]:
        unused += ["region_head", "word_head"]
    if not options["weights"]["cpa"]:
        unused += ["prototypes"]
    return unused


def _options(named: Named, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the objective; the widths from shapes, the rest as stored, else as released."""
    hidden, dim = (len(named[f"objective.image_head.{layer}.weight"][1]) for layer in (0, 3))
    widths = {"dim": dim, "hidden": hidden}
    temperature = lookup(stored, "softmax_temperature", default=0.07)
    if "objective.prototypes.weight" not in named:  # the ConVIRT baseline
        return {
            **widths,
            "temperatures": {"ita": temperature},
            "weights": {"ita": 1.0, "cta": 0.0, "cpa": 0.0},
            "use_local_attention": False,
            "bidirectional": True,
        }
    return {
        **widths,
        "n_prototypes": len(named["objective.prototypes.weight"][1]),
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


def _config(named: Named, stored: Mapping[str, Any], options: dict[str, Any], depth: int) -> ModelConfig:
    encoder = image_encoder_name(named)
    return ModelConfig.from_dict(
        {
            "objective": "mgca",
            "behavior": "published",
            "objective_options": options,
            "image_encoder": encoder,
            "region_stage": "layer3",
            "resize_to": None if encoder.startswith("vit") else 299,
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
