"""What the writers of raw folders share: simulated studies, and files in the formats of the owners."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from gloria_core.phantom.disease import course
from gloria_core.phantom.study import PhantomStudy, study


def simulate(
    n_studies: int, *, size: int, seed: int, lateral: bool = False, half_with: Sequence[str] = ()
) -> list[PhantomStudy]:
    """The first `n_studies` studies of a seed, images of (size, size).

    half_with: labels; every other study then has a marked region of one of them, so that a small set has positives.
    """
    views = ("frontal", "lateral") if lateral else ("frontal",)
    drawn: dict[bool, list[PhantomStudy]] = {True: [], False: []}
    patient = 0
    while sum(map(len, drawn.values())) < n_studies:
        for number, findings in enumerate(course(seed, patient), start=1):
            marked = not half_with or any(finding.label in half_with and finding.drawn for finding in findings)
            if len(drawn[marked]) < ((n_studies + marked) // 2 if half_with else n_studies):
                drawn[marked].append(study(seed, patient, number, size=size, views=views))
        patient += 1
    return sorted([*drawn[True], *drawn[False]], key=lambda one: (one.patient.patient, one.number))


def regions_of(one: PhantomStudy, labels: Sequence[str]) -> list:
    """The frontal regions of a study with one of the labels."""
    return [region for region in one.regions if region.label in labels and region.view == "frontal"]


def split_of(one: PhantomStudy, parts: Mapping[str, int]) -> str:
    """The split of a study's patient: `parts` gives each split its share, such as {"train": 7, "test": 3}."""
    names = [name for name, share in parts.items() for _ in range(share)]
    return names[(one.patient.patient * 7 + 3) % len(names)]


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """An 8-bit or 16-bit gray image, or a bool mask as 0 and 255, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(path)


def write_dicom(path: Path, pixels: np.ndarray, *, bits: int = 8, white_is_zero: bool = False, **tags: str) -> None:
    """A computed radiograph. 8 bits: baseline JPEG, as RSNA and SIIM ship it; more: uncompressed, as VinDr-CXR.

    white_is_zero stores MONOCHROME1, where the smallest value is white.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if bits == 8 else ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data.Modality, data.PatientID, data.BodyPartExamined = "CR", path.stem, "CHEST"
    for name, value in tags.items():
        setattr(data, name, value)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.PhotometricInterpretation = "MONOCHROME1" if white_is_zero else "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = (8 if bits == 8 else 16), bits, bits - 1
    values = pixels.astype(np.uint16) * (2**bits - 1) // 255
    values = 2**bits - 1 - values if white_is_zero else values
    if bits == 8:
        jpeg = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(jpeg, "JPEG", quality=95)
        data.PixelData = encapsulate([jpeg.getvalue()])
        data["PixelData"].VR = "OB"
    else:
        data.PixelData = values.astype("<u2").tobytes()
        data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)


def write_table(path: Path, rows: Iterable[Mapping[str, object]], *, header: Sequence[str] = ()) -> None:
    """A CSV, packed where the name ends in .gz. header: written in place of the keys of the rows."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header or rows[0])
    writer.writerows(row.values() for row in rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def cell(value: float) -> str:
    """A label as CheXpert and MIMIC-CXR write it: 1.0, 0.0, -1.0, or blank."""
    return "" if value != value else f"{value:.1f}"


def xywh(region, size: int, original: int = 0) -> list[float]:
    """The box of a region in pixels of the file, or of an original of `original` pixels a side."""
    return [value * (original / size if original else 1) for value in region.box]
