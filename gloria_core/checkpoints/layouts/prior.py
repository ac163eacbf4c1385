"""Whole models of github.com/QtacierP/PRIOR (`total_prior.ckpt`): bare tensors, or a Lightning file of them.

The released loader takes what fits and says nothing of the rest; here a name too few or too many is an error. The
projections were once sequences of one layer, so both `X_projection.weight` and `X_projection.0.weight` are read.

The file does not say how pixels were normalised: by mean 0.4755 and deviation 0.3011 for pretraining, by 0.50627 and
0.28947 for zero-shot (released code). The model asks for the former, `norm="prior"`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import Shapes, Translation, bert_architecture, count, resnet_name
from gloria_core.checkpoints.model import ConfigError, ModelConfig
from gloria_core.models.attention_pool import PUBLISHED_SIDE

NAME = "PRIOR"
PREFIXES = (  # their names -> ours, as regular expressions
    (r"text_encoder\.encoder\.", "text_encoder.bert."),
    (r"image_encoder\.encoder\.", "image_encoder.trunk."),
    (r"image_encoder\.atten_pool\.", "objective.image_heads.pool."),
    (r"global_text_attention\.", "objective.text_pool."),
    (r"global_image_projection\.(0\.)?", "objective.image_heads.whole."),
    (r"local_image_projection\.(0\.)?", "objective.image_heads.local."),
    (r"local_text_projection\.(0\.)?", "objective.text_head."),
    (r"predictor\.", "objective.predictor."),
    (r"local_cross_attention\.", "objective.cross_attention."),
    (r"sentence_bank\.embed\.weight$", "objective.bank.prototypes"),
    (r"sentence_decoder\.", "objective.report_decoder.bert."),
    (r"prototype_queries$", "objective.report_decoder.queries"),
    (r"image_decoder\.output_head\.0\.", "objective.image_decoder.head."),
    (r"image_decoder\.blocks\.(?P<block>\d+)\.conv(?P<half>[12])\.(?P<layer>[01])\.", ""),
    (r"(?=(local_)?logit_scale$)", "objective."),
)
WITHOUT_PLACE = (
    r"(text_encoder\.encoder|sentence_decoder)\.embeddings\.position_ids$",  # no longer stored by transformers
    r"global_text_projection\.",  # made and never used: texts are pooled from their sentences
    r"sentence_decoder\.embeddings\.word_embeddings\.",  # the decoder is given vectors, never words
    r"text_encoder\.encoder\.pooler\.",  # BERT's, computed and then ignored
)


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """A bank of sentence prototypes beside an image decoder."""
    names = {_bare(name) for name in shapes}
    return "sentence_bank.embed.weight" in names and "image_decoder.output_head.0.weight" in names


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    renamed, ignored = {}, []
    for theirs, value in tensors.items():
        name = _bare(theirs)
        if any(re.match(pattern, name) for pattern in WITHOUT_PLACE):
            ignored.append(theirs)
        else:
            renamed[_ours(name)] = (theirs, value)
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    text = bert_architecture(shapes, "text_encoder.bert.")
    return Translation(_config(shapes), text, renamed, ignored)


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _ours(name: str) -> str:
    for pattern, new in PREFIXES:
        found = re.match(pattern, name)
        if found and "block" in found.groupdict():  # twice convolution (0), norm (1), ReLU; we number them 0 to 5
            layer = 3 * (int(found["half"]) - 1) + int(found["layer"])
            new = f"objective.image_decoder.blocks.{found['block']}.{layer}."
        if found:
            return new + name[found.end() :]
    return name


def _config(shapes: Shapes) -> ModelConfig:
    """Everything that shapes tell; the rest is the released configuration."""
    trunk, queries = "image_encoder.trunk.", shapes["objective.report_decoder.queries"]
    n_prototypes, dim = shapes["objective.bank.prototypes"]
    regions = shapes["objective.image_heads.pool.positional_embedding"][0] - 1
    if regions != PUBLISHED_SIDE**2:
        raise ConfigError(
            f"its attention pool has {regions} positions; only {PUBLISHED_SIDE} x {PUBLISHED_SIDE} are known"
        )
    return ModelConfig(
        objective="prior",
        behavior="published",
        objective_options={
            "embed_dim": dim,
            "n_prototypes": n_prototypes,
            "n_queries": queries[1],
            "decoder_layers": count(shapes, "objective.report_decoder.bert.encoder.layer."),
        },
        image_encoder=resnet_name(shapes, trunk),
        region_stage="layer4",
        text_encoder="emilyalsentzer/Bio_ClinicalBERT",
        last_layers=1,
        image_size=224,
        crop=224,
        norm="prior",
        channels=shapes[f"{trunk}conv1.weight"][1],
        max_tokens=256,
        text_section="both",
    )
