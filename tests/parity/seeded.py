"""Weights, images and captions that depend on a seed alone, as the golden files assume them.

Random numbers come from NumPy, whose generators give the same in every version; each tensor has a generator of its own,
made of the seed and the CRC of the tensor's name.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

PAD, UNK, CLS, SEP, MASK = 0, 100, 101, 102, 103
SPECIAL = {PAD: "[PAD]", UNK: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", MASK: "[MASK]"}
VOCABULARY = 28996  # entries of Bio_ClinicalBERT's
UNUSED = 1000  # ids below it are no word pieces


def integers(leaf: str, shape: list[int]) -> np.ndarray:
    """Position ids count up; the index of a window's position table; counters are zero."""
    if leaf == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape)
    if leaf == "relative_position_index":  # a cell pair -> the row of its offset in the table of (2 side - 1)^2
        side = math.isqrt(shape[0])
        rows, columns = np.divmod(np.arange(shape[0]), side)
        down = rows[:, None] - rows[None] + side - 1
        right = columns[:, None] - columns[None] + side - 1
        return down * (2 * side - 1) + right
    return np.zeros(shape)


def floats(name: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    """Statistics and scales near 1, biases near 0, matrices and filters at a spread that keeps activations apart.

    Filters of more than one weight sum to zero; ReLU layers would make all images alike otherwise.
    """
    leaf = name.split(".")[-1]
    if leaf == "running_var":
        return 1 + 0.2 * rng.random(shape)
    if leaf == "running_mean":
        return 0.1 * rng.standard_normal(shape)
    if not shape:  # a logit scale
        return np.array(math.log(1 / 0.07))
    noise = rng.standard_normal(shape)
    if len(shape) == 1:
        return float(leaf == "weight") + 0.02 * noise
    fan_in = math.prod(shape[1:])
    weights = noise / math.sqrt(fan_in)
    if len(shape) == 4 and fan_in > 1:
        weights = weights - weights.mean(axis=(1, 2, 3), keepdims=True)
    gain = {2: 0.5, 4: 1.4}.get(len(shape), 1.0) * (0.02 if "local_embedder" in name else 1.0)
    return weights * gain


def state_dict(method: str, seed: int) -> dict[str, torch.Tensor]:
    """All tensors of `<method>/keys.json`, in its order."""
    state = {}
    for name, (shape, dtype) in json.loads((Path(__file__).parent / method / "keys.json").read_text()).items():
        kind = getattr(torch, dtype)
        if kind.is_floating_point:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            array = floats(name, shape, rng).astype(np.float32)
        else:
            array = integers(name.split(".")[-1], shape).astype(np.int64)
        state[name] = torch.from_numpy(np.array(array)).reshape(shape).to(kind)
    return state


def vocabulary() -> list[str]:
    """Word pieces in the order of their ids: from 1000 on, even ids begin a word and odd ids continue one."""

    def piece(index: int) -> str:
        if index in SPECIAL:
            return SPECIAL[index]
        if index < UNUSED:
            return f"[unused{index}]"
        return f"##p{index}" if index % 2 else f"w{index}"

    return [piece(index) for index in range(VOCABULARY)]


def captions(n: int, length: int, seed: int, *, shortest: int = 6, longest: int | None = None) -> dict[str, np.ndarray]:
    """Ids of n captions padded to `length`: [CLS], `shortest` to `longest` pieces, [SEP]; 30 % of the pieces continue.

    Shape: `input_ids`, `attention_mask`, `token_type_ids` (n, length) int64
    """
    rng = np.random.default_rng([seed, 7])
    ids = np.full((n, length), PAD, dtype=np.int64)
    for caption in ids:
        count = rng.integers(shortest, (longest or length - 2) + 1)
        pieces = 2 * rng.integers(UNUSED // 2, VOCABULARY // 2, size=count)
        pieces += rng.random(count) < 0.3
        pieces[0] = pieces[0] // 2 * 2  # the first piece begins a word
        caption[0], caption[count + 1] = CLS, SEP
        caption[1 : count + 1] = pieces
    return {"input_ids": ids, "attention_mask": 1 * (ids != PAD), "token_type_ids": 0 * ids}


def images(n: int, size: int, seed: int, *, channels: int = 3) -> np.ndarray:
    """Blocks of 16 x 16 pixels under fine noise, in [-1, 1], all channels equal: (n, channels, size, size)."""
    rng = np.random.default_rng([seed, 11])
    blocks = rng.standard_normal((n, 1, size // 16, size // 16)).repeat(16, axis=2).repeat(16, axis=3)
    noise = rng.standard_normal((n, 1, size, size))
    return np.clip(0.4 * blocks + 0.1 * noise, -1, 1).astype(np.float32).repeat(channels, axis=1)
