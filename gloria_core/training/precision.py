"""Which number format to compute in: chosen by what the device is fast at, never assumed.

Mixed precision (Micikevicius et al., "Mixed Precision Training", ICLR 2018) keeps float32 weights and runs the matrix
products in 16 bits. bfloat16 has float32's range and needs no loss scaling; float16 does.
"""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_precision(device: torch.device | str, precision: Precision = "auto") -> Precision:
    """The format that `device` will compute in: `precision` itself, or for "auto" the fastest safe one.

    CUDA: bfloat16 where the GPU computes in it, else float16. CPU: bfloat16 only where the processor has bfloat16
    matrix instructions (AMX or AVX512-BF16; elsewhere it is emulated and slower than float32). Others: float32.
    Raises ValueError for an unknown name, and for float16 on a CPU, which has no loss scaling.
    """
    device = torch.device(device)
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"precision {precision!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    if precision == "float16" and device.type == "cpu":
        raise ValueError('precision "float16" needs a GPU; on a CPU choose "auto", "bfloat16" or "float32"')
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return "bfloat16" if device.type == "cpu" and cpu_multiplies_bfloat16() else "float32"


def autocast(device: torch.device | str, precision: Precision = "auto") -> torch.autocast:
    """Context in which `device` computes in the chosen format; it does nothing for float32."""
    dtype = DTYPES[choose_precision(device, precision)]
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32)


def cpu_multiplies_bfloat16() -> bool:
    """True where this processor multiplies bfloat16 matrices in hardware, as far as torch can tell; else False."""
    # newer versions of torch have one dictionary, older ones a function for each instruction set
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if "amx_bf16" in capabilities or "avx512_bf16" in capabilities:
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    older = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in older)
