"""Writes files like those of Lightning 1.1 with an omegaconf configuration, without either library."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.models import resnet18
from transformers import BertConfig, BertModel

MODULES = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode",),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "pytorch_lightning.callbacks.model_checkpoint": ("ModelCheckpoint",),
    "pytorch_lightning.callbacks.early_stopping": ("EarlyStopping",),
}


CONFIG = {
    "model": {
        "gloria": {"local_loss_weight": 0.5, "temp1": 3.0, "temp2": 6.0, "temp3": 9.0},
        "text": {"bert_type": "some/bert", "last_n_layers": 2, "aggregate_method": "mean"},
    },
    "data": {"text": {"word_num": 97}, "image": {"imsize": 64}},
    "transforms": {"norm": "half", "random_crop": {"crop_size": 56}},
    "callbacks": ["a", "b"],
}


def small_gloria(*, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    """A small GLoRIA in the published names: ResNet-18, and a BERT of three layers, 64 wide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=96
        )
        parts = {
            "gloria.text_encoder.model.": BertModel(config).state_dict(),
            "gloria.img_encoder.model.": {k: v for k, v in resnet18().state_dict().items() if not k.startswith("fc.")},
        }
        tensors = {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}
        tensors["gloria.text_encoder.model.embeddings.position_ids"] = torch.arange(512)[None]
        tensors["gloria.img_encoder.global_embedder.weight"] = torch.randn(64, 512)
        tensors["gloria.img_encoder.global_embedder.bias"] = torch.randn(64)
        tensors["gloria.img_encoder.local_embedder.weight"] = torch.randn(64, 256, 1, 1)
    return tensors


@contextmanager
def fake_libraries() -> Iterator[dict[str, type]]:
    """Modules of these names exist inside the block only; gives their classes by name."""
    before = set(sys.modules)
    found = {}
    for path, names in MODULES.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        for name in names:
            found[name] = type(name, (), {"__module__": path})
            setattr(sys.modules[path], name, found[name])
    try:
        yield found
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def wrap(value: object, classes: dict[str, type], key: str | None = None) -> object:
    """A plain value as omegaconf 2.0 keeps it: containers with `_content`, leaves with `_val`, each with metadata."""
    import typing

    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    node, metadata = classes[kind](), classes["Metadata" if kind == "AnyNode" else "ContainerMetadata"]()
    metadata.__dict__.update(ref_type=typing.Any, object_type=dict, optional=True, key=key, flags={})
    node.__dict__["_metadata"] = metadata
    if isinstance(value, dict):
        node.__dict__["_content"] = {name: wrap(item, classes, name) for name, item in value.items()}
    elif isinstance(value, list):
        node.__dict__["_content"] = [wrap(item, classes) for item in value]
    else:
        node.__dict__["_val"] = value
    return node


def write(path: Path, state: dict[str, torch.Tensor], config: dict | None, *, weights_only: bool = False) -> Path:
    """A Lightning 1.1.4 file; `weights_only` leaves out what such a save leaves out."""
    with fake_libraries() as classes:
        content = {"epoch": 3, "global_step": 100, "pytorch-lightning_version": "1.1.4"}
        if not weights_only:
            content |= {
                "callbacks": {classes["ModelCheckpoint"]: {"best_model_score": torch.tensor(1.5)}},
                "optimizer_states": [],
                "lr_schedulers": [],
                "native_amp_scaling_state": {"scale": 1.0},
            }
        content["state_dict"] = state
        if config is not None:
            content |= {"hparams_name": "cfg", "hyper_parameters": wrap(config, classes)}
            content["hparams_type"] = classes["DictConfig"]
        torch.save(content, path)
    return path
