"""Files of github.com/Soombit-ai/cxr-clip (`r50_mcc.tar`, `swint_mcc.tar`) and of its fork CXR-CLIP-CGMH.

A `torch.save` file in spite of its suffix: {"model": tensors, "config": the run's settings, "optimizer", ...}. The
image encoder is told from the tensors, pooling and loss weights from the settings where the file has them, with the
released defaults for what it lacks.

The image vector of a Swin is its first token in the original and the mean over tokens in the fork, for the same
tensors. A file whose settings name the data set "cgmh", which only the fork knows, is taken as the fork's. For any
other file with mean pooling, make the model anew around the same tensors:

    model = load_pretrained(path, tokenizer)
    config = dataclasses.replace(model.config, image_pooling="mean")
    again = assemble(config, model.text_encoder.config, tokenizer).eval()
    again.load_state_dict(model.state_dict())
"""

from collections.abc import Mapping
from typing import Any

from gloria_core.checkpoints.layouts.base import CLINICAL_BERT, Stored, image_encoder_name, whole_model
from gloria_core.checkpoints.model import ConfigError
from gloria_core.checkpoints.untrusted import lookup
from gloria_core.models.key_maps import Named

# A logit scale beside a linear projection of each modality.
MARKS = (r"logit_scale$", r"image_projection\.projection\.weight$", r"text_projection\.projection\.weight$")
RULES = (
    # a buffer that current transformers no longer store, and BERT's pooler, which the released code never uses
    (r"text_encoder\.text_encoder\.(embeddings\.position_ids|pooler\.)", None),
    (r"text_encoder\.text_encoder\.", "text_encoder.bert."),
    (r"image_encoder\.(resnet|image_encoder)\.", "image_encoder.trunk."),
    (r"image_projection\.projection\.", "objective.image_head."),
    (r"text_projection\.projection\.", "objective.text_head."),
    (r"(?=logit_scale$)", "objective."),
)


def _is_fork(stored: Stored) -> bool:
    """Whether it was trained on the data set that only CXR-CLIP-CGMH has."""
    parts = [lookup(stored, part, default={}) for part in ("data_train", "data_valid")]
    sets = [data for part in parts if isinstance(part, Mapping) for data in part.values()]
    return any(isinstance(data, Mapping) and data.get("name") == "cgmh" for data in sets)


def _config(named: Named, stored: Stored) -> dict[str, Any]:
    head = lookup(stored, "model.projection_head.name", default="linear")
    if head != "linear":
        raise ConfigError(
            f"its projection heads are {head!r}; only linear ones, as in the published files, are supported"
        )
    swin = image_encoder_name(named) == "swin_tiny"
    text_pooling = lookup(stored, "model.text_encoder.pooling", default="eos")
    side = lookup(stored, "base.image_size", default=224)
    return {
        "objective": "cxr_clip",
        "objective_options": {
            "icl_weight": lookup(stored, "loss.cxr_clip.i2i_weight", default=1.0),
            "tcl_weight": lookup(stored, "loss.cxr_clip.t2t_weight", default=0.5),
            "label_smoothing": lookup(stored, "loss.cxr_clip.label_smoothing", default=0.0),
            "projection_dim": len(named["objective.image_head.weight"][1]),
            "text_pooling": {"bos": "cls"}.get(text_pooling, text_pooling),
        },
        "image_pooling": "default" if not swin else "mean" if _is_fork(stored) else "first_token",
        "norm": "half" if swin else "imagenet",
        "region_stage": "layer4",
        "text_encoder": lookup(stored, "model.text_encoder.name", default=CLINICAL_BERT),
        "last_layers": 1,
        "text_pieces": "mean",
        "image_size": side,
        "crop": side,
        "max_tokens": lookup(stored, "base.text_max_length", default=256),
        "text_section": "both",
    }


LAYOUTS = (whole_model("CXR-CLIP", MARKS, lambda names, stored: RULES, _config),)
