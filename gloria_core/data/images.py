"""Image files to 8-bit gray arrays, and gray arrays to the tensor an encoder takes.

A radiograph comes as PNG or JPEG of 8 bits, as PNG of 16 bits, or as DICOM. The file's content decides, not its name.
Whatever cannot be read whole raises `ImageError` with the file's name: a half-decoded image must not reach training.

DICOM radiographs to 8-bit gray, as a viewing station shows them.

The order is that of DICOM PS3.3: modality transform (C.11.1), then the first VOI lookup table or else the first window
(C.11.2), then MONOCHROME1 turned around. Without a table or a window, values of more than 8 bits are stretched from the
smallest to the largest; pixel padding counts as background and takes no part in that.
"""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing
from torch import Tensor

Norm = Literal["half", "imagenet", "prior"]
PRIOR_MEAN, PRIOR_STD = 0.4755, 0.3011

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_OTHER = {b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
_COPY_AGAIN = "copy or download it again, or leave its study out"


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file, what is wrong and the remedy."""


def read_gray(path: str | Path) -> NDArray[np.uint8]:
    """One radiograph as 8-bit gray, black is air.

    PNG, JPEG (also BMP, TIFF): colour and palette become luminance (ITU-R 601), transparency is ignored, an EXIF
    rotation is applied. More than 8 bits are stretched from the image's minimum to its maximum: no window is given.
    DICOM: see `gloria_core.data.images`.

    Shape: (H, W) uint8.
    Raises: ImageError if the file is missing, empty, truncated, damaged, no image, or holds several frames.
    """
    return decode_gray(read_bytes(path), path)


def read_bytes(path: str | Path, *, name: str | Path | None = None) -> bytes:
    """The file's content. Raises: ImageError, naming `name` or the path, if it is missing, unreadable or empty."""
    file, path = Path(path), path if name is None else name
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file. Check the root folder and the path in the column 'images'") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error.strerror}). Check that it is a file you may read") from None
    if not data:
        raise ImageError(f"{path}: the file is empty (0 bytes): {_COPY_AGAIN}")
    return data


def decode_gray(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    """`read_gray` for bytes that were already read; `name` is for messages and, without a signature, for its suffix."""

    if data.startswith((_PNG, _JPEG, *_OTHER)):
        return _decode_picture(data, name)
    if looks_like_dicom(data, name):
        return decode_dicom(data, name)
    start = data[:16].decode("ascii", "replace")
    raise ImageError(f"{name}: not a PNG, JPEG or DICOM file (it begins with {start!r}): export or {_COPY_AGAIN}")


def stretch_to_byte(values: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Linear map of [low, high] to [0, 255], rounded, clipped; all zero if the range is empty. Shape kept."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.clip(np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))), 0, 255).astype(np.uint8)


def to_tensor(images: NDArray[np.uint8] | Tensor, *, channels: int = 3, norm: Norm = "half") -> Tensor:
    """Gray bytes to what an encoder takes: scaled to [0, 1], repeated over channels, normalised.

    "half" is (v - 0.5) / 0.5, GLoRIA's default; "imagenet" the three channels' mean and deviation; "prior" the mean and
    deviation with which PRIOR was pretrained (released code; its zero-shot script has 0.50627 and 0.28947 instead).

    Shape: (..., H, W) uint8 -> (..., channels, H, W) float32.
    Raises: ValueError for another dtype, an unknown norm, or "imagenet" without three channels.
    """
    pixels = torch.tensor(images) if isinstance(images, np.ndarray) else images
    if pixels.dtype != torch.uint8 or pixels.ndim < 2:
        raise ValueError(f"to_tensor takes uint8 images (..., H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: a gray image becomes 1 or 3 channels")
    scaled = pixels.to(torch.float32).div_(255).unsqueeze(-3)
    if norm in ("half", "prior"):
        mean, std = (0.5, 0.5) if norm == "half" else (PRIOR_MEAN, PRIOR_STD)
        return scaled.sub_(mean).div_(std).repeat_interleave(channels, dim=-3)
    if norm == "imagenet":
        if channels != 3:
            raise ValueError("norm='imagenet' has three means: use channels=3, or norm='half' for one channel")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return (scaled - mean) / std
    raise ValueError(f"norm={norm!r} is unknown: use 'half', 'imagenet' or 'prior'")


def _decode_picture(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    if data.startswith(_PNG):
        _check_png(data, name)
    try:
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "BMP", "TIFF")) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames != 1:
                raise ImageError(f"{name}: {frames} frames in one file: export the one that is the radiograph")
            picture.load()
            # Pillow may not miss the end marker if all pixels came out; a thumbnail's lies before the last scan
            if picture.format == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
                raise OSError("the end marker is missing")
            return _luminance(picture)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from None
    # a damaged file can fail anywhere in the decoder, and Pillow promises no common class
    except Exception as error:
        raise ImageError(f"{name}: truncated or damaged ({error}): {_COPY_AGAIN}") from error


def _luminance(picture: Image.Image) -> NDArray[np.uint8]:
    if picture.format == "JPEG":
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):
        wide = np.asarray(picture)
        return stretch_to_byte(wide, float(wide.min()), float(wide.max()))
    return np.array(picture.convert("L"))


def _check_png(data: bytes, name: str | Path) -> None:
    """Walk the chunks: Pillow stops at the last pixel and would not notice a flipped bit or a lost end."""
    place = len(_PNG)
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data):
            break
        (expected,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != expected:
            raise ImageError(f"{name}: damaged (checksum of the PNG part at byte {place} differs): {_COPY_AGAIN}")
        if data[place + 4 : place + 8] == b"IEND":
            return
        place = end
    raise ImageError(f"{name}: truncated (the PNG ends after {len(data)} bytes without its last part): {_COPY_AGAIN}")


_BARE_SUFFIXES = ("", ".dcm", ".dicom", ".dic", ".ima")


def looks_like_dicom(data: bytes, name: str | Path) -> bool:
    """True with the DICM mark, or for an old file without it that begins with a group-2 or group-8 element."""
    if data[128:132] == b"DICM":
        return True
    return Path(name).suffix.lower() in _BARE_SUFFIXES and data[:2] in (b"\x02\x00", b"\x08\x00") and data[3:4] == b"\0"


def decode_dicom(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    """One single-frame DICOM image. Shape: (H, W) uint8. Raises: ImageError naming the file and the remedy."""
    dataset = None
    try:
        dataset = dcmread(BytesIO(data), force=True)
        if "PixelData" not in dataset:
            raise ImageError(f"{name}: a DICOM file without an image (no PixelData): leave it out of the manifest")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if frames != 1:
            raise ImageError(f"{name}: {frames} frames in one file: export the one that is the radiograph")
        return _as_shown(dataset)
    except ImageError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", "unknown")
        kind = getattr(syntax, "name", syntax)
        raise ImageError(
            f"{name}: no decoder for DICOM transfer syntax {kind!r} ({_first_line(error)}): "
            "install 'pylibjpeg[all]', or convert the file to an uncompressed syntax"
        ) from error
    # a damaged header can fail anywhere in the reader, with any exception
    except Exception as error:
        raise ImageError(
            f"{name}: truncated or damaged DICOM ({_first_line(error)}): copy it again, or leave its study out"
        ) from error


def _as_shown(dataset: Dataset) -> NDArray[np.uint8]:
    stored = dataset.pixel_array
    kind = dataset.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
        stored = stretch_to_byte(stored, 0, np.iinfo(stored.dtype).max)
    if stored.ndim == 3:
        return np.rint(stored[..., :3] @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    padding = _padding(stored, dataset)
    gray = _eight_bits(apply_modality_lut(stored, dataset), dataset, padding)
    if kind == "MONOCHROME1":
        gray = 255 - gray
    gray[padding] = 0
    return gray


def _eight_bits(values: NDArray, dataset: Dataset, padding: NDArray[np.bool_]) -> NDArray[np.uint8]:
    if dataset.get("VOILUTSequence"):
        return _look_up(values, dataset.VOILUTSequence[0], signed=bool(dataset.PixelRepresentation))
    if dataset.get("WindowWidth") is not None and dataset.get("WindowCenter") is not None:
        # the window of values far outside gives the two ends of the output range
        with np.errstate(over="ignore"):
            ends = apply_windowing(np.array([-1e12, 1e12]), dataset)
            return stretch_to_byte(apply_windowing(values, dataset), *map(float, ends))
    if dataset.BitsStored <= 8 and values.dtype == np.uint8:
        return values.copy()
    seen = values[~padding]
    if not seen.size:
        return np.zeros(values.shape, np.uint8)
    return stretch_to_byte(values, float(seen.min()), float(seen.max()))


def _look_up(values: NDArray, item: Dataset, *, signed: bool) -> NDArray[np.uint8]:
    """The VOI table on all values at once; pydicom's own wraps 12-bit values around where the entries have 8 bits."""
    entries, first, bits = (int(part) for part in item.LUTDescriptor)
    entries = entries or 2**16
    if signed and first >= 2**15:
        first -= 2**16  # the descriptor's second value is signed where the pixels are
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, "<u2" if len(table) >= 2 * entries else np.uint8)
    table = np.asarray(table, np.float64)[:entries]
    index = np.clip(np.rint(np.asarray(values, np.float64)).astype(np.int64) - first, 0, len(table) - 1)
    return stretch_to_byte(table[index], 0, 2**bits - 1)


def _padding(stored: NDArray, dataset: Dataset) -> NDArray[np.bool_]:
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
