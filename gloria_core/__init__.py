"""Vision-language pretraining on chest radiographs: a notebook-first, reproducible study.

The common entries are found here (`gloria_core.load(path)`), each imported on first use, so that
`import gloria_core` stays fast and pulls in no deep-learning library. The usage snippets of GLoRIA's README run with
`import gloria_core as gloria`: see `gloria_core.gloria_api`.
"""

import importlib

__version__ = "0.1.0"

_ENTRIES = {
    "ModelConfig": ("gloria_core.checkpoints.model", "ModelConfig"),
    "VisionLanguageModel": ("gloria_core.checkpoints.model", "VisionLanguageModel"),
    "build_model": ("gloria_core.checkpoints.model", "build_model"),
    "load": ("gloria_core.tasks.finetuned", "load"),
    "save": ("gloria_core.tasks.finetuned", "save"),
    "load_pretrained": ("gloria_core.checkpoints.published", "load_pretrained"),
    "available_models": ("gloria_core.gloria_api.loading", "available_models"),
    "available_segmentation_models": ("gloria_core.gloria_api.loading", "available_segmentation_models"),
    "constants": ("gloria_core.gloria_api.constants", None),
    "generate_chexpert_class_prompts": ("gloria_core.gloria_api.model", "generate_chexpert_class_prompts"),
    "get_similarities": ("gloria_core.gloria_api.model", "get_similarities"),
    "load_gloria": ("gloria_core.gloria_api.loading", "load_gloria"),
    "load_img_classification_model": ("gloria_core.gloria_api.loading", "load_img_classification_model"),
    "load_img_segmentation_model": ("gloria_core.gloria_api.loading", "load_img_segmentation_model"),
    "zero_shot_classification": ("gloria_core.gloria_api.model", "zero_shot_classification"),
}
"""Name -> the module it is in, and what it is called there; None for the module itself."""

__all__ = ["__version__", *_ENTRIES]


def __getattr__(name: str) -> object:
    if name not in _ENTRIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ENTRIES[name]
    imported = importlib.import_module(module)
    return imported if attribute is None else getattr(imported, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ENTRIES])
