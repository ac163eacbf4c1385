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

from collections.abc import Iterable
from typing import Any

from gloria_core.checkpoints.layouts.base import CLINICAL_BERT, TRUNK, Rules, Stored, shapes_of, whole_model
from gloria_core.checkpoints.untrusted import lookup
from gloria_core.models.key_maps import Named, count

# Both encoders with projection heads of their own.
MARKS = (r"img_encoder(_q)?\.global_embed\.head\.0\.weight$", r"text_encoder(_q)?\.global_embed\.head\.0\.weight$")
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


def _rules(names: Iterable[str], stored: Stored) -> Rules:
    """Parts that these options do not build have no place; the ConVIRT baseline is a file without prototypes."""
    words, both = lookup(stored, "use_local_atten", default=False), lookup(stored, "bidirectional", default=True)
    convirt = not any(name.startswith("prototype_layer.") for name in names)
    unused = {
        r"word_local_atten_layer\.": not words,
        r"patch_local_atten_layer\.": not (words and both),
        r"(img|text)_encoder(_q)?\.local_embed\.": convirt or lookup(stored, "lambda_2", default=1.0) == 0,
        r"prototype_layer\.": lookup(stored, "lambda_3", default=1.0) == 0,
    }
    return *((part, None) for part, is_unused in unused.items() if is_unused), *RULES


def _config(named: Named, stored: Stored) -> dict[str, Any]:
    """Widths from shapes, the rest as stored, else as released. The ConVIRT baseline has the first term alone."""
    shapes = shapes_of(named)
    convirt = not any(name.startswith(("objective.region_head.", "objective.prototypes.")) for name in named)
    options = {
        "dim": shapes["objective.image_head.3.weight"][0],
        "hidden": shapes["objective.image_head.0.weight"][0],
        "temperatures": {
            "ita": lookup(stored, "softmax_temperature", default=0.07),
            "cta": lookup(stored, "local_temperature", default=0.1),
            "cpa": lookup(stored, "proto_temperature", default=0.2),
        },
        "weights": {
            term: 0.0 if convirt and number > 1 else lookup(stored, f"lambda_{number}", default=1.0)
            for number, term in enumerate(("ita", "cta", "cpa"), start=1)
        },
        "freeze_prototypes_epochs": lookup(stored, "freeze_prototypes_epochs", default=1),
        "use_local_attention": lookup(stored, "use_local_atten", default=False),
        "bidirectional": lookup(stored, "bidirectional", default=True),
    }
    if "objective.prototypes.weight" in shapes:
        options["n_prototypes"] = shapes["objective.prototypes.weight"][0]
    return {
        "objective": "mgca",
        "objective_options": options,
        "region_stage": "layer3",
        "resize_to": None if f"{TRUNK}cls_token" in named else 299,
        "text_encoder": lookup(stored, "bert_type", default=CLINICAL_BERT),
        "last_layers": 1,
        "text_depth": count(named, "text_encoder.bert.encoder.layer."),
        "text_positions": "zero",
        "image_size": 256,
        "crop": 224,
        "norm": "half",
        "max_tokens": 112,
        "text_section": "both",
    }


LAYOUTS = (whole_model("MGCA (Lightning)", MARKS, _rules, _config, without_types=NO_TYPES),)
