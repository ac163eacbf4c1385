"""Lightning 1.1 files of github.com/marshuang80/gloria, and files of its plain-PyTorch fork gloria-Extended.

GLoRIA's `chexpert_resnet50.ckpt`: the architecture is taken from the shapes of the tensors, never from the file's name;
temperatures and text rules from the stored configuration where it has them.

github.com/tuhlnaa/gloria-Extended's `checkpoint_best.pth`: {"model_state_dict": ..., "best_metrics": ..., ...} with
GLoRIA's own tensor names, without a prefix and without any settings: temperatures and weights are those of the fork's
default configuration, which are GLoRIA's. The fork takes BERT's vocabulary, the words of a text and the 299-pixel
resize as GLoRIA does; it differs in its data.
"""

from typing import Any

from gloria_core.checkpoints.layouts.base import CLINICAL_BERT, Stored, image_encoder_name, whole_model
from gloria_core.checkpoints.model import ConfigError
from gloria_core.checkpoints.untrusted import CONTAINER, lookup
from gloria_core.models.key_maps import Named

# A BERT beside one of the two embedders of the image encoder.
MARKS = (r"(gloria\.)?text_encoder\.model\.", r"(gloria\.)?img_encoder\.(global|local)_embedder\.weight$")
RULES = (
    # a buffer that current transformers no longer store, and BERT's pooler, which GLoRIA never uses
    (r"(gloria\.)?text_encoder\.model\.(embeddings\.position_ids|pooler\.)", None),
    (r"(gloria\.)?text_encoder\.model\.", "text_encoder.bert."),
    (r"(gloria\.)?img_encoder\.model\.", "image_encoder.trunk."),
    (r"(gloria\.)?img_encoder\.global_embedder\.", "objective.global_embedder."),
    (r"(gloria\.)?img_encoder\.local_embedder\.", "objective.local_embedder."),
)


def _origin(stored: Stored) -> str:
    """The fork is told by its container."""
    extended = lookup(stored, f"{CONTAINER}.tensors", default="") == "model_state_dict"
    return "gloria-Extended" if extended else "GLoRIA (Lightning)"


def _config(named: Named, stored: Stored) -> dict[str, Any]:
    """The stored configuration, in its first and its later spelling, with the released defaults for what it lacks."""
    if not lookup(stored, "model.text.agg_tokens", default=True):
        raise ConfigError("it was trained on word pieces (agg_tokens: false), which is not supported")
    gloria = "model.gloria."
    return {
        "objective": "gloria",
        "objective_options": {
            "temp_attention": lookup(stored, f"{gloria}temp1", f"{gloria}temp_attention", default=4.0),
            "temp_similarity": lookup(stored, f"{gloria}temp2", f"{gloria}temp_similarity", default=5.0),
            "temp_loss": lookup(stored, f"{gloria}temp3", f"{gloria}temp_loss", default=10.0),
            "local_weight": lookup(stored, f"{gloria}local_loss_weight", default=1.0),
            "global_weight": lookup(stored, f"{gloria}global_loss_weight", default=1.0),
        },
        "region_stage": _region_stage(named),
        "resize_to": 299,
        "text_encoder": lookup(stored, "model.text.bert_type", default=CLINICAL_BERT),
        "last_layers": lookup(stored, "model.text.last_n_layers", default=4),
        "text_layers": lookup(stored, "model.text.aggregate_method", default="sum"),
        "text_norm": lookup(stored, "model.text.norm", default=False),
        "image_size": lookup(stored, "data.image.imsize", default=256),
        "crop": lookup(stored, "transforms.random_crop.crop_size", default=224),
        "norm": lookup(stored, "transforms.norm", default="half"),
        "max_tokens": lookup(stored, "data.text.word_num", default=97),
    }


def _region_stage(named: Named) -> str:
    """The stage of a ResNet whose maps have as many channels as the local embedder takes."""
    name, width = image_encoder_name(named), named["objective.local_embedder.weight"][1].shape[1]
    widths = {(512 if name == "resnet50" else 128) * 2**step: f"layer{step + 2}" for step in range(3)}
    if width not in widths:
        raise ConfigError(
            f"its region vectors have {width} channels; stages of {name} have {', '.join(map(str, widths))}"
        )
    return widths[width]


LAYOUTS = (whole_model("GLoRIA (Lightning)", MARKS, lambda names, stored: RULES, _config, origin=_origin),)
