"""Lightning 1.1 files of github.com/marshuang80/gloria, and files of its plain-PyTorch fork gloria-Extended.

GLoRIA's `chexpert_resnet50.ckpt`: the architecture is taken from the shapes of the tensors, never from the file's name;
temperatures and text rules from the stored configuration where it has them.

github.com/tuhlnaa/gloria-Extended's `checkpoint_best.pth`: {"model_state_dict": ..., "best_metrics": ..., ...} with
GLoRIA's own tensor names, without a prefix and without any settings: temperatures and weights are those of the fork's
default configuration, which are GLoRIA's. The fork takes BERT's vocabulary, the words of a text and the 299-pixel
resize as GLoRIA does; it differs in its data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts.base import Translation, bert_architecture, image_encoder_name, renamed
from gloria_core.checkpoints.model import ConfigError, ModelConfig
from gloria_core.checkpoints.untrusted import CONTAINER, lookup
from gloria_core.models.key_maps import Named, Shapes

NAME = "GLoRIA (Lightning)"
EXTENDED = "gloria-Extended"
RULES = (
    # a buffer that current transformers no longer store, and BERT's pooler, which GLoRIA never uses
    (r"(gloria\.)?text_encoder\.model\.(embeddings\.position_ids|pooler\.)", None),
    (r"(gloria\.)?text_encoder\.model\.", "text_encoder.bert."),
    (r"(gloria\.)?img_encoder\.model\.", "image_encoder.trunk."),
    (r"(gloria\.)?img_encoder\.global_embedder\.", "objective.global_embedder."),
    (r"(gloria\.)?img_encoder\.local_embedder\.", "objective.local_embedder."),
)


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """A BERT beside one of the two embedders of the image encoder."""
    names = {name.removeprefix("gloria.") for name in shapes}
    embedders = {"img_encoder.global_embedder.weight", "img_encoder.local_embedder.weight"}
    return bool(embedders & names) and any(name.startswith("text_encoder.model.") for name in names)


def is_extended(stored: Mapping[str, Any]) -> bool:
    """Whether a file has the fork's container."""
    return lookup(stored, f"{CONTAINER}.tensors", default="") == "model_state_dict"


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    named, ignored = renamed(tensors, RULES)
    origin = EXTENDED if is_extended(stored) else NAME
    return Translation(origin, _config(named, stored), bert_architecture(named), named, ignored)


def _config(named: Named, stored: Mapping[str, Any]) -> ModelConfig:
    """The stored configuration, in its first and its later spelling, with the released defaults for what it lacks."""
    if not lookup(stored, "model.text.agg_tokens", default=True):
        raise ConfigError("it was trained on word pieces (agg_tokens: false), which is not supported")
    name, gloria = image_encoder_name(named), "model.gloria."
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
            "image_encoder": name,
            "region_stage": _region_stage(name, named["objective.local_embedder.weight"][1].shape[1]),
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


def _region_stage(name: str, width: int) -> str:
    """The stage of a ResNet whose maps have `width` channels."""
    widths = {(512 if name == "resnet50" else 128) * 2**step: f"layer{step + 2}" for step in range(3)}
    if width not in widths:
        raise ConfigError(
            f"its region vectors have {width} channels; stages of {name} have {', '.join(map(str, widths))}"
        )
    return widths[width]
