"""Which number format to train in: chosen by what the device is fast at, never assumed.

Mixed precision (Micikevicius et al., "Mixed Precision Training", ICLR 2018) keeps float32 weights and runs the matrix
products in 16 bits. bfloat16 has float32's range and needs no loss scaling; float16 does, and accelerate scales it.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_ACCELERATE = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def choose_precision(device: torch.device | str, precision: Precision = "auto") -> Precision:
    """The format that training on `device` will use: `precision` itself, or for "auto" the fastest safe one.

    CUDA: bfloat16 where the GPU computes in it, else float16. CPU: bfloat16 only where the processor has bfloat16
    matrix instructions (AMX or AVX512-BF16; elsewhere it is emulated and slower than float32). Others: float32.
    Raises ValueError for an unknown name, and for float16 on a CPU, which has no loss scaling.
    """
    device = torch.device(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError('precision "float16" needs a GPU; on a CPU choose "auto", "bfloat16" or "float32"')
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if device.type == "cpu" and cpu_multiplies_bfloat16() else "float32"


def cpu_multiplies_bfloat16() -> bool:
    """True where this processor multiplies bfloat16 matrices in hardware, as far as torch can tell; else False."""
    # torch's names for this differ by version: first the dictionary of newer ones, then the single questions
    ask = getattr(torch.cpu, "get_capabilities", None)
    found = ask() if ask is not None else {}
    if "amx_bf16" in found or "avx512_bf16" in found:
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    questions = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(bool(question()) for question in questions if question is not None)


def accelerate_name(precision: Precision) -> str:
    """accelerate's word for a chosen format: "no", "bf16" or "fp16"."""
    return _ACCELERATE[precision]
