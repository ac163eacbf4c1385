"""What the tests of dataset adapters share: small files, real tables where they are, and the message of a refusal."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from gloria_core.data import sources
from gloria_core.data.manifest import ManifestError, read_manifest, write_manifest


def write_dicom(path: Path, *, size: int = 16, **tags: str) -> None:
    """A secondary capture, 8 bits; without pixels above 64 x 64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", "1.2.3"
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.PatientID = meta.MediaStorageSOPClassUID, "1.2.3", path.stem
    for name, value in tags.items():
        setattr(data, name, value)
    data.Rows = data.Columns = size
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit = 7
    if size <= 64:
        data.PixelData = np.arange(size * size, dtype=np.uint8).tobytes()
    data.save_as(path, enforce_file_format=True)


def write_picture(path: Path, size: tuple[int, int] = (32, 24), gray: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, gray).save(path)


def write_rows(path: Path, header: str, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def wheel_table(name: str) -> Path:
    """An owner's table in the wheel of torchxrayvision; skips the test where it is not installed."""
    wheel = importlib.util.find_spec("torchxrayvision")
    path = Path(wheel.origin).parent / "data" / name if wheel else None
    if path is None or not path.is_file():
        pytest.skip(f"torchxrayvision, whose wheel holds {name}, is not installed")
    return path


def real_folder(name: str) -> Path:
    """A folder of real data, by GLORIA_DATA (the folder of all, or one of it); skips the test where it is not there."""
    data = Path(os.environ.get("GLORIA_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = data if data.name == name else (data.parent if (data.parent / name).is_dir() else data) / name
    if not path.is_dir():
        pytest.skip(f"no folder {path}; set GLORIA_DATA")
    return path


def adapter(dataset: str) -> Callable[..., pd.DataFrame]:
    """`prepare` of one dataset, with its options as keywords."""
    return lambda root, **options: sources.prepare(dataset, root, options)


def refusal(prepare: Callable[..., pd.DataFrame], root: Path, **options: object) -> str:
    """The message of the ManifestError that `prepare` must raise."""
    with pytest.raises(ManifestError) as caught:
        prepare(root, **options)
    return str(caught.value)


def prepared_twice(prepare: Callable[..., pd.DataFrame], root: Path, folder: Path, **options: object) -> pd.DataFrame:
    """The frame, after checking that two runs give the same bytes and that all images and masks it names are there."""
    frame = prepare(root, **options)
    write_manifest(frame, folder / "first.csv")
    write_manifest(prepare(root, **options), folder / "second.csv")
    assert (folder / "first.csv").read_bytes() == (folder / "second.csv").read_bytes()
    pd.testing.assert_frame_equal(read_manifest(folder / "first.csv", root=root), frame)
    torn = frame.groupby("patient_id")["split"].nunique()
    assert (torn == 1).all()
    return frame
