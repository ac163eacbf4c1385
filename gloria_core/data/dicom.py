"""DICOM radiographs to 8-bit gray, as a viewing station shows them.

The order is that of DICOM PS3.3: modality transform (C.11.1), then the first VOI lookup table or else the first window
(C.11.2), then MONOCHROME1 turned around. Without a table or a window, values of more than 8 bits are stretched from the
smallest to the largest; pixel padding counts as background and takes no part in that.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing

from gloria_core.data.images import ImageError, stretch_to_byte

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
