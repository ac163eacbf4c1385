"""Small whole models in the papers' file formats: published names and containers, other widths, seeded values."""

from __future__ import annotations

import re
from pathlib import Path

import lightning_file
import torch
from torch import Tensor, nn
from transformers import BertConfig

from gloria_core.checkpoints.model import ModelConfig, assemble

# Our names -> the published ones, by how they begin.
NAMES = {
    "gloria": {
        "image_encoder.trunk.": "gloria.img_encoder.model.",
        "text_encoder.bert.": "gloria.text_encoder.model.",
        "objective.": "gloria.img_encoder.",
    },
    "mgca": {
        "image_encoder.trunk.": "img_encoder_q.model.",
        "objective.image_head.": "img_encoder_q.global_embed.head.",
        "objective.region_head.": "img_encoder_q.local_embed.head.",
        "text_encoder.bert.": "text_encoder_q.model.",
        "objective.text_head.": "text_encoder_q.global_embed.head.",
        "objective.word_head.": "text_encoder_q.local_embed.head.",
        "objective.prototypes.": "prototype_layer.",
        "objective.word_attention.": "word_local_atten_layer.",
        "objective.patch_attention.": "patch_local_atten_layer.",
    },
    "prior": {
        "image_encoder.trunk.": "image_encoder.encoder.",
        "text_encoder.bert.": "text_encoder.encoder.",
        "objective.image_heads.pool.": "image_encoder.atten_pool.",
        "objective.cross_attention.": "local_cross_attention.",
        "objective.text_pool.": "global_text_attention.",
        "objective.bank.prototypes": "sentence_bank.embed.weight",
        "objective.report_decoder.bert.": "sentence_decoder.",
        "objective.image_decoder.head.": "image_decoder.output_head.0.",
        "objective.image_heads.whole.": "global_image_projection.",
        "objective.image_heads.local.": "local_image_projection.",
        "objective.text_head.": "local_text_projection.",
        "objective.report_decoder.queries": "prototype_queries",
        "objective.": "",
    },
    "cxr_clip": {
        "image_encoder.trunk.": "image_encoder.resnet.",
        "text_encoder.bert.": "text_encoder.text_encoder.",
        "objective.image_head.": "image_projection.projection.",
        "objective.text_head.": "text_projection.projection.",
        "objective.": "",
    },
}
# A vision-language model of each kind that the papers' repositories published: what its configuration says.
MODELS = {
    "gloria": {"objective": "gloria", "image_encoder": "resnet18"},
    "gloria_extended": {"objective": "gloria", "image_encoder": "resnet18"},
    "mgca_resnet": {"objective": "mgca", "text_positions": "zero", "last_layers": 1},
    "mgca_vit": {"objective": "mgca", "text_positions": "zero", "last_layers": 1, "image_encoder": "vit_tiny_patch16"},
    "mgca_convirt": {
        "objective": "mgca",
        "text_positions": "zero",
        "last_layers": 1,
        "objective_options": {"weights": {"cpa": 0.0}},
    },
    "prior": {"objective": "prior", "region_stage": "layer4", "last_layers": 1, "channels": 1},
    "cxr_clip_resnet": {"objective": "cxr_clip", "region_stage": "layer4", "last_layers": 1},
    "cxr_clip_swin": {"objective": "cxr_clip", "image_encoder": "swin_tiny", "last_layers": 1},
}
OPTIONS = {
    "gloria": {},
    "mgca": {"dim": 6, "hidden": 9},
    "prior": {"embed_dim": 64, "n_prototypes": 5, "n_queries": 3, "decoder_layers": 1},
    "cxr_clip": {"projection_dim": 16},
}


def published_names(model: nn.Module, method: str) -> dict[str, Tensor]:
    """The tensors of one of our models under the names of the method's published files."""
    tensors = {}
    for name, value in model.state_dict().items():
        if block := re.match(r"objective\.image_decoder\.blocks\.(\d)\.(\d)\.", name):
            layer = int(block[2])
            theirs = f"image_decoder.blocks.{block[1]}.conv{1 + layer // 3}.{layer % 3}.{name[block.end() :]}"
        else:
            ours = next(ours for ours in NAMES[method] if name.startswith(ours))
            theirs = NAMES[method][ours] + name.removeprefix(ours)
        if method == "mgca" and "local_embed.head" in theirs and value.ndim == 2:
            value = value[..., None]  # a 1x1 convolution
        if method != "mgca" or "token_type" not in theirs:
            tensors[theirs] = value
    return tensors


def write(kind: str, path: Path, *, vocabulary: int) -> Path:
    """A file of a kind of `MODELS`, with seeded random values and as many word pieces."""
    settings = {"image_encoder": "resnet_tiny", "behavior": "published", "last_layers": 4, **MODELS[kind]}
    method = settings["objective"]
    settings["objective_options"] = {**OPTIONS[method], **settings.get("objective_options", {})}
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1, "intermediate_size": 64}
    model = assemble(ModelConfig(**settings), BertConfig(vocab_size=vocabulary, **shape), None)
    tensors = published_names(model, method)
    if kind == "gloria":
        return lightning_file.write(path, tensors, lightning_file.CONFIG)
    content = {
        "gloria_extended": {
            "model_state_dict": {n.removeprefix("gloria."): v for n, v in tensors.items()},
            "epochs": 4,
        },
        "mgca_convirt": {"state_dict": {name.replace("_q.", "."): value for name, value in tensors.items()}},
        "prior": tensors,
        "cxr_clip_resnet": {"model": tensors, "config": {"base": {"image_size": 64}}, "epoch": 1},
        "cxr_clip_swin": {
            "model": {name.replace(".resnet.", ".image_encoder."): value for name, value in tensors.items()},
            "config": {"base": {"image_size": 64}},
        },
    }
    torch.save(content.get(kind, {"state_dict": tensors, "hyper_parameters": {}}), path)
    return path
