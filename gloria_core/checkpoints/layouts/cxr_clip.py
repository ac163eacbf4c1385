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

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import Shapes, Translation, bert_architecture, count, resnet_name
from gloria_core.checkpoints.model import ConfigError, ModelConfig
from gloria_core.checkpoints.untrusted import lookup
from gloria_core.models.backbones.swin import is_constant, new_name

NAME = "CXR-CLIP"
PREFIXES = (  # their names -> ours
    ("image_encoder.resnet.", "image_encoder.trunk."),
    ("image_encoder.image_encoder.", "image_encoder.trunk."),
    ("text_encoder.text_encoder.", "text_encoder.bert."),
    ("image_projection.projection.", "objective.image_projection."),
    ("text_projection.projection.", "objective.text_projection."),
    ("logit_scale", "objective.logit_scale"),
)
WITHOUT_PLACE = ("text_encoder.bert.embeddings.position_ids", "text_encoder.bert.pooler.")
"""A buffer that current transformers no longer store, and BERT's pooler, which the released code carries along and
never uses. A Swin's table of window positions is left out, too (`backbones.swin.is_constant`)."""

SWIN = "image_encoder.trunk.embeddings.patch_embeddings.projection.weight"
SWIN_TINY = {"width": 96, "patch": 4, "depths": (2, 2, 6, 2)}


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """A logit scale beside a linear projection of each modality."""
    return {"logit_scale", "image_projection.projection.weight", "text_projection.projection.weight"} <= {
        _bare(name) for name in shapes
    }


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    renamed, ignored = {}, []
    for theirs, value in tensors.items():
        name = _ours(_bare(theirs))
        if name.startswith(WITHOUT_PLACE) or is_constant(name):
            ignored.append(theirs)
        else:
            renamed[name] = (theirs, value)
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    text = bert_architecture(shapes, "text_encoder.bert.")
    return Translation(_config(shapes, stored), text, renamed, ignored)


def _bare(name: str) -> str:
    return name.removeprefix("module.")


def _ours(name: str) -> str:
    for old, new in PREFIXES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    return new_name(name) if name.startswith("image_encoder.trunk.encoder.layers.") else name


def _image_architecture(shapes: Shapes, stored: Mapping[str, Any]) -> dict[str, str]:
    """Encoder, pooling and the normalisation of pixels that goes with it."""
    if SWIN not in shapes:
        if "image_encoder.trunk.conv1.weight" not in shapes:
            raise ConfigError("its image encoder is neither a ResNet nor a Swin; other encoders are not supported")
        return {"image_encoder": resnet_name(shapes, "image_encoder.trunk."), "norm": "imagenet"}
    width, _, patch, _ = shapes[SWIN]
    layers = "image_encoder.trunk.encoder.layers."
    depths = tuple(count(shapes, f"{layers}{stage}.blocks.") for stage in range(count(shapes, layers)))
    found = {"width": width, "patch": patch, "depths": depths}
    if found != SWIN_TINY:
        raise ConfigError(f"its image encoder is a Swin of {found}; only Swin-Tiny {SWIN_TINY} is supported")
    pooling = "mean" if _is_fork(stored) else "first_token"
    return {"image_encoder": "swin_tiny", "image_pooling": pooling, "norm": "half"}


def _is_fork(stored: Mapping[str, Any]) -> bool:
    """Whether it was trained on the data set that only CXR-CLIP-CGMH has."""
    sets = [lookup(stored, part, default={}) for part in ("data_train", "data_valid")]
    return any(lookup(one, "name", default="") == "cgmh" for named in sets for one in _values(named))


def _values(node: Any) -> list[Any]:
    return [value for value in node.values() if isinstance(value, Mapping)] if isinstance(node, Mapping) else []


def _config(shapes: Shapes, stored: Mapping[str, Any]) -> ModelConfig:
    head = lookup(stored, "model.projection_head.name", default="linear")
    if head != "linear":
        raise ConfigError(
            f"its projection heads are {head!r}; only linear ones, as in the published files, are supported"
        )
    pooling = lookup(stored, "model.text_encoder.pooling", default="eos")
    side = lookup(stored, "base.image_size", default=224)
    return ModelConfig.from_dict(
        {
            "objective": "cxr_clip",
            "behavior": "published",
            "objective_options": {
                "icl_weight": lookup(stored, "loss.cxr_clip.i2i_weight", default=1.0),
                "tcl_weight": lookup(stored, "loss.cxr_clip.t2t_weight", default=0.5),
                "label_smoothing": lookup(stored, "loss.cxr_clip.label_smoothing", default=0.0),
                "projection_dim": shapes["objective.image_projection.weight"][0],
                "text_pooling": {"bos": "cls"}.get(pooling, pooling),
            },
            **_image_architecture(shapes, stored),
            "region_stage": "layer4",
            "text_encoder": lookup(stored, "model.text_encoder.name", default="emilyalsentzer/Bio_ClinicalBERT"),
            "last_layers": 1,
            "text_pieces": "mean",
            "image_size": side,
            "crop": side,
            "max_tokens": lookup(stored, "base.text_max_length", default=256),
            "text_section": "both",
        }
    )
