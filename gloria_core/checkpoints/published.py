"""Whole pretrained models in the formats that the papers' repositories published.

`load_gloria` reads the Lightning 1.1 files of github.com/marshuang80/gloria (`chexpert_resnet50.ckpt`). The
architecture is taken from the shapes of the tensors, never from the file's name; temperatures and text rules from the
stored configuration where it has them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BertConfig, PreTrainedTokenizerBase

from gloria_core.checkpoints.foreign import LoadReport, fill_reported, lookup, read_state
from gloria_core.checkpoints.model import ConfigError, ModelConfig, VisionLanguageModel, assemble
from gloria_core.checkpoints.native import CheckpointError

__all__ = ["LoadReport", "load_gloria", "read_state"]

PREFIXES = (  # their names -> ours
    ("img_encoder.model.", "image_encoder.trunk."),
    ("img_encoder.global_embedder.", "objective.global_embedder."),
    ("img_encoder.local_embedder.", "objective.local_embedder."),
    ("text_encoder.model.", "text_encoder.bert."),
)
WITHOUT_PLACE = ("text_encoder.bert.embeddings.position_ids", "text_encoder.bert.pooler.")
"""A buffer that current transformers no longer store, and BERT's pooler, which GLoRIA never uses."""
HEAD_WIDTH = 64  # of every published BERT; the number of heads cannot be read from shapes


def load_gloria(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, allow_partial: bool = False
) -> VisionLanguageModel:
    """A published GLoRIA, with `behavior="published"`, in evaluation mode (the released loader forgets the latter).

    `tokenizer`: that of Bio_ClinicalBERT (`load_tokenizer`); without it the model takes token ids only.
    `model.load_report` says what became of each tensor.
    Raises CheckpointError for a file that is truncated, holds code, is not a GLoRIA, or does not fit exactly;
    `allow_partial` turns the last into a warning, and what is missing keeps random values.
    """
    path = Path(path)
    tensors, stored = read_state(path)
    renamed, ignored = _rename(tensors)
    shapes = {name: tuple(value.shape) for name, (_, value) in renamed.items()}
    try:
        architecture = _text_architecture(shapes)
        config = _config(shapes, stored)
        model = assemble(config, architecture, tokenizer)
    except KeyError as error:
        raise CheckpointError(f"{path} is not a GLoRIA checkpoint: it has no tensor {error}") from error
    except ValueError as error:  # ConfigError, or an encoder that refuses what the file asks for
        raise CheckpointError(f"{path}: {error}") from error
    report = fill_reported(model, renamed, ignored, path=path, allow_partial=allow_partial)
    if not report.complete:
        warnings.warn(f"{path} was loaded in part: {report}", stacklevel=2)
    model.load_report = report
    return model.eval()


def _rename(tensors: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, Tensor]], list[str]]:
    """Our name -> (their name, tensor), and the names that have no place here."""
    renamed, ignored = {}, []
    for theirs, value in tensors.items():
        name = theirs.removeprefix("module.").removeprefix("gloria.")
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
    return renamed, ignored


def _text_architecture(shapes: Mapping[str, tuple[int, ...]]) -> BertConfig:
    bert = "text_encoder.bert."
    vocabulary, width = shapes[f"{bert}embeddings.word_embeddings.weight"]
    if width % HEAD_WIDTH:
        raise ConfigError(f"a BERT of width {width} has no heads of width {HEAD_WIDTH}")
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=_count(shapes, f"{bert}encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=shapes[f"{bert}encoder.layer.0.intermediate.dense.weight"][0],
        max_position_embeddings=shapes[f"{bert}embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes[f"{bert}embeddings.token_type_embeddings.weight"][0],
    )


def _image_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    trunk = "image_encoder.trunk."
    stages = tuple(_count(shapes, f"{trunk}layer{stage}.") for stage in (1, 2, 3, 4))
    bottleneck = f"{trunk}layer1.0.conv3.weight" in shapes
    name = {(False, (2, 2, 2, 2)): "resnet18", (False, (3, 4, 6, 3)): "resnet34", (True, (3, 4, 6, 3)): "resnet50"}.get(
        (bottleneck, stages)
    )
    if name is None:
        kind = "bottleneck" if bottleneck else "basic"
        raise ConfigError(f"its image encoder has {stages} {kind} blocks a stage: no ResNet-18, -34 or -50")
    widths = {(512 if bottleneck else 128) * 2**step: f"layer{step + 2}" for step in range(3)}
    width = shapes["objective.local_embedder.weight"][1]
    if width not in widths:
        raise ConfigError(
            f"its region vectors have {width} channels; stages of {name} have {', '.join(map(str, widths))}"
        )
    return {"image_encoder": name, "region_stage": widths[width]}


def _config(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any]) -> ModelConfig:
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


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbered modules follow a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in shapes if name.startswith(prefix)})
