"""Lightning 1.1 files of github.com/marshuang80/gloria (`chexpert_resnet50.ckpt`).

The architecture is taken from the shapes of the tensors, never from the file's name; temperatures and text rules from
the stored configuration where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts.key_maps import Shapes, Translation, bert_architecture, resnet_name
from gloria_core.checkpoints.model import ConfigError, ModelConfig
from gloria_core.checkpoints.untrusted import CONTAINER, lookup

NAME = "GLoRIA (Lightning)"
PREFIXES = (  # their names -> ours
    ("img_encoder.model.", "image_encoder.trunk."),
    ("img_encoder.global_embedder.", "objective.global_embedder."),
    ("img_encoder.local_embedder.", "objective.local_embedder."),
    ("text_encoder.model.", "text_encoder.bert."),
)
WITHOUT_PLACE = ("text_encoder.bert.embeddings.position_ids", "text_encoder.bert.pooler.")
"""A buffer that current transformers no longer store, and BERT's pooler, which GLoRIA never uses."""


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """GLoRIA's tensors, in any container but the one of its fork."""
    return has_names(shapes) and lookup(stored, f"{CONTAINER}.tensors", default="") != "model_state_dict"


def has_names(shapes: Shapes) -> bool:
    """A BERT beside one of the two embedders of the image encoder, with or without wrappers' prefixes."""
    names = {_bare(name) for name in shapes}
    embedders = {"img_encoder.global_embedder.weight", "img_encoder.local_embedder.weight"}
    return bool(embedders & names) and any(name.startswith("text_encoder.model.") for name in names)


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    renamed, ignored = {}, []
    for theirs, value in tensors.items():
        name = _bare(theirs)
        for old, new in PREFIXES:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        if name == "objective.local_embedder.weight" and value.ndim == 4:
            value = value[:, :, 0, 0]  # a 1x1 convolution is a Linear over channels
        if name.startswith(WITHOUT_PLACE):
            ignored.append(theirs)
        else:
            renamed[name] = (theirs, value)
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    return Translation(_config(shapes, stored), bert_architecture(shapes, "text_encoder.bert."), renamed, ignored)


def _bare(name: str) -> str:
    return name.removeprefix("module.").removeprefix("gloria.")


def _image_architecture(shapes: Shapes) -> dict[str, str]:
    trunk = "image_encoder.trunk."
    name = resnet_name(shapes, trunk)
    bottleneck = f"{trunk}layer1.0.conv3.weight" in shapes
    widths = {(512 if bottleneck else 128) * 2**step: f"layer{step + 2}" for step in range(3)}
    width = shapes["objective.local_embedder.weight"][1]
    if width not in widths:
        raise ConfigError(
            f"its region vectors have {width} channels; stages of {name} have {', '.join(map(str, widths))}"
        )
    return {"image_encoder": name, "region_stage": widths[width]}


def _config(shapes: Shapes, stored: Mapping[str, Any]) -> ModelConfig:
    """The stored configuration, in its first and its later spelling, with the released defaults for what it lacks."""
    if not lookup(stored, "model.text.agg_tokens", default=True):
        raise ConfigError("it was trained on word pieces (agg_tokens: false), which is not supported")
    gloria = "model.gloria."
    return ModelConfig.from_dict(
        {
            "objective": "gloria",
            "behavior": "published",
            "objective_options": {
                "temp_attention": lookup(stored, f"{gloria}temp1", f"{gloria}temp_attention", default=4.0),
                "temp_similarity": lookup(stored, f"{gloria}temp2", f"{gloria}temp_similarity", default=5.0),
                "temp_loss": lookup(stored, f"{gloria}temp3", f"{gloria}temp_loss", default=10.0),
                "local_weight": lookup(stored, f"{gloria}local_loss_weight", default=1.0),
                "global_weight": lookup(stored, f"{gloria}global_loss_weight", default=1.0),
            },
            **_image_architecture(shapes),
            "resize_to": 299,
            "text_encoder": lookup(stored, "model.text.bert_type", default="emilyalsentzer/Bio_ClinicalBERT"),
            "last_layers": lookup(stored, "model.text.last_n_layers", default=4),
            "text_layers": lookup(stored, "model.text.aggregate_method", default="sum"),
            "text_norm": lookup(stored, "model.text.norm", default=False),
            "image_size": lookup(stored, "data.image.imsize", default=256),
            "crop": lookup(stored, "transforms.random_crop.crop_size", default=224),
            "norm": lookup(stored, "transforms.norm", default="half"),
            "max_tokens": lookup(stored, "data.text.word_num", default=97),
        }
    )
