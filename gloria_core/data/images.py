"""Image files to 8-bit gray arrays, and gray arrays to the tensor an encoder takes.

A radiograph comes as PNG or JPEG of 8 bits, as PNG of 16 bits, or as DICOM. The file's content decides, not its name;
"DICM" at byte 128 comes first, because the 128 bytes before it are free and may look like a TIFF. Whatever cannot be
read whole raises `ImageError` with the file's name: a half-decoded image must not reach training.

DICOM is shown as a viewing station shows it, in the order of PS3.3: modality transform (C.11.1), then the first VOI
lookup table or else the first window (C.11.2), then MONOCHROME1 turned around. A VOI table is scaled by its largest
entry. Without a table or a window, values of more than 8 bits are stretched from the smallest to the largest; pixel
padding counts as background and takes no part in that. A blank element, or a window without a width, counts as absent.
"""

import contextlib
import re
import struct
from io import BytesIO
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from pydantic import ConfigDict, validate_call
from pydicom import Dataset, dcmread
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from torch import Tensor

Norm = Literal["half", "imagenet", "prior"]
_MEAN_STD = {
    "half": ([0.5], [0.5]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "prior": ([0.4755], [0.3011]),
}
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green, blue (ITU-R 601)

_PNG, _JPEG, _BMP, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", (b"II*\0", b"MM\0*")
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_COPY_AGAIN = "copy or download it again, or leave its study out"
_EXPORT = "copy it again, or export it as 8-bit or 16-bit gray PNG"
_NO_NUMBERS = "pixels that are no numbers (NaN or infinite)"


class ImageError(ValueError):
    """An image file that cannot be used; the message names the file, what is wrong and the remedy."""


def read_gray(path: str | Path) -> NDArray[np.uint8]:
    """One radiograph as 8-bit gray, black is air.

    PNG, JPEG (also BMP, TIFF): colour and palette become luminance (ITU-R 601), transparency is ignored, an EXIF
    rotation is applied. More than 8 bits are stretched from the image's minimum to its maximum: no window is given.
    What cannot be read so, such as a TIFF of 3 x 16 bits, is refused with its depth.
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
    """`read_gray` for bytes that were already read; `name` is for messages."""
    if data[128:132] == b"DICM" or _begins_with_element(data):
        return _decode_dicom(data, name)
    if data.startswith((_PNG, _JPEG, _BMP, *_TIFF)):
        return _decode_picture(data, name)
    start = data[:16].decode("ascii", "replace")
    raise ImageError(f"{name}: not a PNG, JPEG or DICOM file (it begins with {start!r}): export or {_COPY_AGAIN}")


@validate_call(config=ConfigDict(arbitrary_types_allowed=True))
def to_tensor(images: np.ndarray | Tensor, *, channels: Literal[1, 3] = 3, norm: Norm = "half") -> Tensor:
    """Gray bytes to what an encoder takes: scaled to [0, 1], repeated over channels, normalised.

    "half" is (v - 0.5) / 0.5, GLoRIA's default; "imagenet" the three channels' mean and deviation; "prior" the mean and
    deviation with which PRIOR was pretrained (released code; its zero-shot script has 0.50627 and 0.28947 instead).

    Shape: (..., H, W) uint8 -> (..., channels, H, W) float32.
    Raises: ValueError for another dtype, an unknown norm, or "imagenet" without three channels.
    """
    pixels = torch.tensor(images) if isinstance(images, np.ndarray) else images
    if pixels.dtype != torch.uint8 or pixels.ndim < 2:
        raise ValueError(f"to_tensor takes uint8 images (..., H, W), got {pixels.dtype} {tuple(pixels.shape)}")
    if norm == "imagenet" and channels != 3:
        raise ValueError("norm='imagenet' has three means: use channels=3, or norm='half' for one channel")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in _MEAN_STD[norm])
    scaled = (pixels.to(torch.float32).div_(255).unsqueeze(-3) - mean).div_(std)
    return scaled.repeat_interleave(channels // len(mean), dim=-3)


def _stretch(values: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Linear map of [low, high] to [0, 255], rounded, clipped; all zero if the range is empty. Shape kept."""
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    return np.clip(np.rint((values.astype(np.float64) - low) * (255.0 / (high - low))), 0, 255).astype(np.uint8)


def _decode_picture(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    try:
        _check_end(data)
        with Image.open(BytesIO(data), formats=("PNG", "JPEG", "BMP", "TIFF")) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames != 1:
                raise ImageError(f"{name}: {frames} frames in one file: export the one that is the radiograph")
            tags = picture.tag_v2 if picture.format == "TIFF" else {}
            bits = max(tags.get(_BITS, (8,))) if tags else data[24] if picture.format == "PNG" else 8
            signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
            if picture.format == "JPEG":
                picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith(("I", "F")):
                values = np.asarray(picture)
                values = values.view(np.uint32) if picture.mode == "I" and bits == 32 and not signed else values
            elif bits > 8:  # Pillow would cut deep colour to 8 bits
                pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if not tags else None
                if pixels is None:
                    raise ImageError(f"{name}: a {_described(data)}, which is not read: {_EXPORT}")
                values = pixels if pixels.ndim == 2 else pixels[..., 2::-1] @ _LUMINANCE
            elif signed:
                values = np.asarray(picture).view(np.int8)
            else:
                return np.array(picture.convert("L"))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from None
    # a damaged file can fail anywhere in the decoder, and Pillow promises no common class
    except Exception as error:
        cause = _one_line(error).split(" <")[0]  # without the address of a buffer
        if isinstance(error, UnidentifiedImageError | ValueError | KeyError) or "nsupported" in cause:
            state = f"a {_described(data)} that is damaged or not read ({cause})"
            raise ImageError(f"{name}: {state}: {_EXPORT}") from error
        raise ImageError(f"{name}: truncated or damaged ({cause}): {_COPY_AGAIN}") from error
    if not np.isfinite(values).all():
        raise ImageError(f"{name}: {_NO_NUMBERS}: {_EXPORT}")
    gray = _stretch(values, float(values.min()), float(values.max()))
    return 255 - gray if tags.get(_PHOTOMETRIC) == 0 else gray  # Pillow turns WhiteIsZero around for 8 bits only


def _check_end(data: bytes) -> None:
    """Raises OSError or SyntaxError for a file that ends too early, and for a PNG with a flipped bit.

    Pillow may not miss the end of a file if all pixels came out.
    """
    if data.startswith(_PNG):
        if not 0 < data.rfind(b"IEND") <= len(data) - 8:
            raise OSError("the PNG ends before its last part")
        Image.open(BytesIO(data), formats=("PNG",)).verify()
    # a thumbnail's end marker lies before the last scan
    elif data.startswith(_JPEG) and data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
        raise OSError("the end marker is missing")
    elif data.startswith(_BMP) and len(data) < int.from_bytes(data[2:6], "little"):
        raise OSError(f"the BMP has {len(data)} bytes of {int.from_bytes(data[2:6], 'little')}")
    elif data.startswith(_TIFF):
        order, sign = ("little", "<") if data[:2] == b"II" else ("big", ">")
        place = int.from_bytes(data[4:8], order)  # of the directory: a number of entries, each of 12 bytes, and a link
        last = place + 2 + 12 * int.from_bytes(data[place : place + 2], order)
        entries = struct.iter_unpack(f"{sign}HHII", data[place + 2 : last]) if last <= len(data) else ()
        sizes = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # bytes of each type of value; the others have one
        ends = [last + 4, *(at + sizes.get(kind, 1) * n for _, kind, n, at in entries if sizes.get(kind, 1) * n > 4)]
        if max(ends) > len(data):
            raise OSError("the TIFF ends before or in its directory")


def _described(data: bytes) -> str:
    """Format, channels and depth of a picture, as its header has them: "TIFF of 3 x 16 bits"."""
    kind, channels, bits = "picture", 1, "?"
    if data.startswith(_PNG):
        kind, channels, bits = "PNG", {b"\2": 3, b"\4": 2, b"\6": 4}.get(data[25:26], 1), int.from_bytes(data[24:25])
    elif data.startswith(_TIFF):
        with contextlib.suppress(Exception):  # a damaged directory has no depth to name
            tags, file = TiffImagePlugin.ImageFileDirectory_v2(data[:8]), BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
            depths, sample_format = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,))[0]
            kind = {2: "signed TIFF", 3: "floating-point TIFF"}.get(sample_format, "TIFF")
            channels, bits = len(depths), max(depths)
    elif frame := re.search(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]..(.)....(.)", data, re.DOTALL):
        kind, channels, bits = "JPEG", frame[2][0], frame[1][0]
    return f"{kind} of {channels} x {bits} bits"


def _begins_with_element(data: bytes) -> bool:
    """Whether an old file without the DICM mark begins with an element of group 2 or 8, in one of three codings."""
    if data[:2] in (b"\x00\x02", b"\x00\x08"):  # big endian
        return data[2:3] == b"\0" and data[4:6].isalpha() and data[4:6].isupper()
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    implicit = int.from_bytes(data[4:8], "little") <= min(len(data), 2**16)
    return data[:2] in (b"\x02\0", b"\x08\0") and data[3:4] == b"\0" and (explicit or implicit)


def _decode_dicom(data: bytes, name: str | Path) -> NDArray[np.uint8]:
    """One single-frame DICOM image. Shape: (H, W) uint8. Raises: ImageError naming the file and the remedy."""
    # a damaged file can fail anywhere in the reader and in the decoders, with any exception
    try:
        dataset = dcmread(BytesIO(data), force=True)
        uid = UID(str(dataset.get("SOPClassUID") or ""))
        kind = "" if uid.name == uid else uid.name
    except Exception as error:
        raise ImageError(f"{name}: truncated or damaged DICOM ({_one_line(error)}): {_COPY_AGAIN}") from error
    if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        if "Rows" in dataset or "Image" in kind or not len(dataset):  # pydicom drops an element without an end
            raise ImageError(f"{name}: truncated DICOM, or without pixels (it ends before or in them): {_COPY_AGAIN}")
        kind = kind or "no PixelData, or cut before it"
        raise ImageError(f"{name}: a DICOM file without an image ({kind}): leave its study out")
    if not dataset.file_meta.get("TransferSyntaxUID"):
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    try:
        frames = int(dataset.get("NumberOfFrames") or 1)
    except ValueError as error:
        raise ImageError(f"{name}: element NumberOfFrames is no number ({error}): correct or remove it") from error
    try:
        stored = dataset.pixel_array if frames == 1 else None
        if frames == 1 and stored.ndim > (2 if (dataset.get("SamplesPerPixel") or 1) == 1 else 3):
            frames = len(stored)  # more than the header says
    except Exception as error:
        cause, syntax = _one_line(error), dataset.file_meta.TransferSyntaxUID.name
        if re.search("missing dependencies|does not support|no available|not supported", cause):
            fault, remedy = f"{syntax!r}, without a decoder here", "install 'pylibjpeg[all]', or decompress the file"
            raise ImageError(f"{name}: pixels in DICOM transfer syntax {fault} ({cause}): {remedy}") from error
        state = "damaged DICOM, or a header that does not fit it"
        if isinstance(error, NotImplementedError | RuntimeError):
            state = f"damaged pixels in DICOM transfer syntax {syntax!r}"
        elif "less than expected" in cause:
            state = "truncated DICOM"
        raise ImageError(f"{name}: {state} ({cause}): {_COPY_AGAIN}") from error
    if frames != 1:
        raise ImageError(f"{name}: {frames} frames in one file: export the one that is the radiograph")
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise ImageError(f"{name}: {_NO_NUMBERS}: {_EXPORT}")
    try:
        return _as_shown(stored, dataset)
    except Exception as error:
        fault = f"the pixels are whole, but an element of their display cannot be used ({_one_line(error)})"
        raise ImageError(f"{name}: {fault}: correct or remove it") from error


def _as_shown(stored: NDArray, dataset: Dataset) -> NDArray[np.uint8]:
    kind = dataset.PhotometricInterpretation
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if kind == "PALETTE COLOR":
        # pydicom's own reading wraps indices around where entries have 8 bits, and takes all files for little endian
        for name in (f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")):
            if name in dataset:
                table = _entries(dataset.get(name), dataset.RedPaletteColorLookupTableDescriptor[0], dataset)
                setattr(dataset, name, table.astype(np.uint16).tobytes())
        stored = apply_color_lut(stored, dataset)
        bits = 8 if stored.max() < 256 else 16  # 16 may be declared where the entries use 8
    if stored.ndim == 3:
        gray = stored[..., :3] @ _LUMINANCE
        whole = bits <= 8 or kind == "PALETTE COLOR"
        return _stretch(gray, 0, 2**bits - 1) if whole else _stretch(gray, float(gray.min()), float(gray.max()))
    _drop_blank_elements(dataset)
    padding = np.zeros(stored.shape, bool)
    if "PixelPaddingValue" in dataset:
        ends = dataset.PixelPaddingValue, dataset.get("PixelPaddingRangeLimit", dataset.PixelPaddingValue)
        padding = (stored >= min(ends)) & (stored <= max(ends))
    values = apply_modality_lut(stored, dataset)
    seen = values[~padding]
    if "VOILUTSequence" in dataset:
        gray = _look_up(values, dataset)
    elif dataset.WindowWidth is not None:
        # the window of values far outside gives the two ends of the output range
        with np.errstate(over="ignore"):
            ends = apply_windowing(np.array([-1e12, 1e12]), dataset)
            gray = _stretch(apply_windowing(values, dataset), *map(float, ends))
    elif bits <= 8 and values.dtype == np.uint8:
        gray = _stretch(values, 0, 2**bits - 1)
    else:
        gray = _stretch(values, float(seen.min()), float(seen.max())) if seen.size else np.zeros(values.shape, np.uint8)
    if kind == "MONOCHROME1":
        gray = 255 - gray
    gray[padding] = 0
    return gray


def _drop_blank_elements(dataset: Dataset) -> None:
    """Remove blank display elements, empty tables and a rescaling by 1 and 0; keep the first usable window."""
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit", "VOILUTFunction", "RescaleSlope", "RescaleIntercept"):
        if dataset.get(name) in (None, ""):
            dataset.pop(name, None)
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        tables = [item for item in dataset.get(keyword) or () if item.get("LUTDescriptor") and item.get("LUTData")]
        dataset.pop(keyword, None)
        if tables:
            setattr(dataset, keyword, Sequence(tables))
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    if (slope, intercept) == (1, 0):
        del dataset.RescaleSlope, dataset.RescaleIntercept
    smallest = 1 if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR" else 1e-9
    values = (np.array(dataset.get(keyword), object) for keyword in ("WindowCenter", "WindowWidth"))
    windows = zip(*map(np.ravel, values), strict=False)
    usable = (pair for pair in windows if not {None, ""} & set(pair) and pair[1] >= smallest)
    dataset.WindowCenter, dataset.WindowWidth = next(usable, (None, None))


def _entries(table: bytes | Sequence, count: int, dataset: Dataset) -> NDArray:
    """The `count` entries of a look-up table (0: 65,536), each of one or two bytes."""
    count = count or 2**16
    if isinstance(table, bytes):
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        table = np.frombuffer(table, f"{order}u2" if len(table) >= 2 * count else np.uint8)
    return np.asarray(table)[:count]


def _look_up(values: NDArray, dataset: Dataset) -> NDArray[np.uint8]:
    """The VOI table on all values at once; pydicom's own wraps 12-bit values around where the entries have 8 bits."""
    item = dataset.VOILUTSequence[0]
    entries, first, _ = (int(part) for part in item.LUTDescriptor)
    if dataset.PixelRepresentation and first >= 2**15:
        first -= 2**16  # the descriptor's second value is signed where the pixels are
    table = _entries(item.LUTData, entries, dataset).astype(np.float64)
    index = np.clip(np.rint(np.asarray(values, np.float64)).astype(np.int64) - first, 0, len(table) - 1)
    return _stretch(table[index], 0, table.max())  # the declared bits may be more than the entries use


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
