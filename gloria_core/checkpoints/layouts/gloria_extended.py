"""Files of github.com/tuhlnaa/gloria-Extended (`checkpoint_best.pth`), the plain-PyTorch fork of GLoRIA.

{"model_state_dict": ..., "best_metrics": ..., "timestamp": ..., ...} with GLoRIA's own tensor names, without a prefix
and without any settings: temperatures and weights are those of the fork's default configuration, which are GLoRIA's.
The fork takes BERT's vocabulary, the words of a text and the 299-pixel resize as GLoRIA does; it differs in its data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gloria_core.checkpoints.layouts import gloria
from gloria_core.checkpoints.layouts.key_maps import Shapes, Translation
from gloria_core.checkpoints.untrusted import CONTAINER, lookup

NAME = "gloria-Extended"


def recognise(shapes: Shapes, stored: Mapping[str, Any]) -> bool:
    """GLoRIA's tensors in the fork's container."""
    return is_extended(stored) and gloria.has_names(shapes)


def is_extended(stored: Mapping[str, Any]) -> bool:
    """Whether a file has the fork's container."""
    return lookup(stored, f"{CONTAINER}.tensors", default="") == "model_state_dict"


def translate(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> Translation:
    """See `gloria_core.checkpoints.layouts`."""
    return gloria.translate(tensors, stored)
