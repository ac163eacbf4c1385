"""Whole models of github.com/QtacierP/PRIOR (`total_prior.ckpt`): bare tensors, or a Lightning file of them.

The released loader takes what fits and says nothing of the rest; here a name too few or too many is an error. The
projections were once sequences of one layer, so both `X_projection.weight` and `X_projection.0.weight` are read.

The file does not say how pixels were normalised: by mean 0.4755 and deviation 0.3011 for pretraining, by 0.50627 and
0.28947 for zero-shot (released code). The model asks for the former, `norm="prior"`.
"""

from typing import Any

from gloria_core.checkpoints.layouts.base import TRUNK, Stored, shapes_of, whole_model
from gloria_core.checkpoints.model import ConfigError
from gloria_core.models.heads import PUBLISHED_SIDE
from gloria_core.models.key_maps import Named, count

# A bank of sentence prototypes beside an image decoder.
MARKS = (r"sentence_bank\.embed\.weight$", r"image_decoder\.output_head\.0\.weight$")
RULES = (
    (r"(text_encoder\.encoder|sentence_decoder)\.embeddings\.position_ids$", None),  # no longer stored by transformers
    (r"global_text_projection\.", None),  # made and never used: texts are pooled from their sentences
    (r"sentence_decoder\.embeddings\.word_embeddings\.", None),  # the decoder is given vectors, never words
    (r"text_encoder\.encoder\.pooler\.", None),  # BERT's, computed and then ignored
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
    # twice convolution (0), norm (1), ReLU; we number them 0 to 5
    (r"image_decoder\.blocks\.(\d+)\.conv1\.([01])\.", r"objective.image_decoder.blocks.\1.\2."),
    (r"image_decoder\.blocks\.(\d+)\.conv2\.0\.", r"objective.image_decoder.blocks.\1.3."),
    (r"image_decoder\.blocks\.(\d+)\.conv2\.1\.", r"objective.image_decoder.blocks.\1.4."),
    (r"(?=(local_)?logit_scale$)", "objective."),
)


def _config(named: Named, stored: Stored) -> dict[str, Any]:
    """Everything that shapes tell; the rest is the released configuration."""
    shapes = shapes_of(named)
    n_prototypes, dim = shapes["objective.bank.prototypes"]
    regions = shapes["objective.image_heads.pool.positional_embedding"][0] - 1
    if regions != PUBLISHED_SIDE**2:
        raise ConfigError(
            f"its attention pool has {regions} positions; only {PUBLISHED_SIDE} x {PUBLISHED_SIDE} are known"
        )
    return {
        "objective": "prior",
        "objective_options": {
            "embed_dim": dim,
            "n_prototypes": n_prototypes,
            "n_queries": shapes["objective.report_decoder.queries"][1],
            "decoder_layers": count(shapes, "objective.report_decoder.bert.encoder.layer."),
        },
        "region_stage": "layer4",
        "last_layers": 1,
        "image_size": 224,
        "crop": 224,
        "norm": "prior",
        "channels": shapes[f"{TRUNK}conv1.weight"][1],
        "max_tokens": 256,
        "text_section": "both",
    }


LAYOUTS = (whole_model("PRIOR", MARKS, lambda names, stored: RULES, _config),)
