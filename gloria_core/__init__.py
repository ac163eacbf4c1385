"""Vision-language pretraining on chest radiographs: a notebook-first, reproducible study.

The common entries are found here (`gloria_core.load(path)`), each imported when it is first asked for, so that
`import gloria_core` stays fast and pulls in no deep-learning library.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_ENTRIES = {
    "ModelConfig": ("gloria_core.checkpoints.model", "ModelConfig"),
    "VisionLanguageModel": ("gloria_core.checkpoints.model", "VisionLanguageModel"),
    "build_model": ("gloria_core.checkpoints.model", "build_model"),
    "load": ("gloria_core.checkpoints.native", "load"),
    "save": ("gloria_core.checkpoints.native", "save"),
    "load_pretrained": ("gloria_core.checkpoints.published", "load_pretrained"),
}

__all__ = ["__version__", *_ENTRIES]


def __getattr__(name: str) -> object:
    if name not in _ENTRIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ENTRIES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ENTRIES])
