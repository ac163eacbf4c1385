"""What the writers of raw folders share: simulated studies, and files in the formats of the owners."""

import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, JPEGBaseline8Bit, generate_uid

from gloria_core.phantom.disease import course
from gloria_core.phantom.study import VIEWS, PhantomStudy, Region, study

# By dataset, the owner's name of each label
NAMES = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
# What a writer yields: the name of a table and a row of it, or the name of a text file and a line
Rows = Iterator[tuple[str, dict | str]]

ORIGINAL_PIXELS = 1024  # side of the original images of NIH, RSNA and SIIM


def simulate(
    n_studies: int, *, size: int, seed: int, lateral: bool = False, half_with: Collection[str] = ()
) -> list[PhantomStudy]:
    """The first `n_studies` studies of a seed, images of (size, size).

    half_with: labels; every other study then has a marked region of one of them, so that a small set has positives.
    """
    drawn: dict[bool, list[PhantomStudy]] = {True: [], False: []}
    patient = 0
    while sum(map(len, drawn.values())) < n_studies:
        for number, findings in enumerate(course(seed, patient), start=1):
            marked = not half_with or any(finding.label in half_with and finding.drawn for finding in findings)
            if len(drawn[marked]) < ((n_studies + marked) // 2 if half_with else n_studies):
                drawn[marked].append(study(seed, patient, number, size=size, views=VIEWS[: 1 + lateral]))
        patient += 1
    return sorted([*drawn[True], *drawn[False]], key=lambda one: (one.patient.patient, one.number))


def regions_of(one: PhantomStudy, labels: Collection[str]) -> list[Region]:
    """The frontal regions of a study with one of the labels."""
    return [region for region in one.regions if region.label in labels and region.view == "frontal"]


def split_of(one: PhantomStudy, parts: Mapping[str, int]) -> str:
    """The split of a study's patient: `parts` gives each split its share, such as {"train": 7, "test": 3}."""
    names = [name for name, share in parts.items() for _ in range(share)]
    return names[(one.patient.patient * 7 + 3) % len(names)]


def chexpert_images(one: PhantomStudy) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """The images of a study as CheXpert names them: split, path without its ending, view and pixels."""
    split = split_of(one, {"train": 8, "valid": 2})
    for k, (view, pixels) in enumerate(one.images.items(), start=1):
        yield split, f"{split}/patient{one.patient.patient + 1:05d}/study{one.number}/view{k}_{view}", view, pixels


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
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    data.Modality, data.PatientID, data.BodyPartExamined = "CR", path.stem, "CHEST"
    for name, value in tags.items():
        setattr(data, name, value)
    values = pixels.astype(np.uint16) * (2**bits - 1) // 255
    values, kind = (2**bits - 1 - values, "MONOCHROME1") if white_is_zero else (values, "MONOCHROME2")
    values = values.astype(np.uint8 if bits == 8 else np.uint16)
    data.set_pixel_data(values, kind, bits, generate_instance_uid=False)
    if bits == 8:
        jpeg = io.BytesIO()
        Image.fromarray(values).save(jpeg, "JPEG", quality=95)
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        data.PixelData = encapsulate([jpeg.getvalue()])
    data.save_as(path, enforce_file_format=True)


def write_rows(path: Path, rows: list[dict] | list[str]) -> None:
    """A CSV of rows, packed where the name ends in .gz, or a text file of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows[0], str):
        path.write_text("\n".join(rows) + "\n")
    else:
        packed = {"method": "gzip", "mtime": 1} if path.suffix == ".gz" else None
        pd.DataFrame(rows, dtype=object).to_csv(path, index=False, compression=packed)


def rough_lungs(size: int) -> np.ndarray:
    """A mask of the lung field on the image's left, drawn roughly. Shape: (size, size) bool."""
    mask = np.zeros((size, size), bool)
    mask[size // 5 : 4 * size // 5, size // 6 : 2 * size // 5] = True
    return mask


def label_cells(one: PhantomStudy) -> dict[str, str]:
    """The labels as CheXpert and MIMIC-CXR write them: 1.0, 0.0, -1.0, or blank."""
    return {name: "" if np.isnan(value) else f"{value:.1f}" for name, value in one.labels.items()}


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """The pixels, uint8 or bool, on ORIGINAL_PIXELS a side; a mask stays one."""
    kind = Image.Resampling.NEAREST if pixels.dtype == bool else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((ORIGINAL_PIXELS, ORIGINAL_PIXELS), kind))


def original_box(region: Region) -> list[float]:
    """x, y, width and height in pixels of an original, as NIH and RSNA count them."""
    return [value * (ORIGINAL_PIXELS / len(region.mask)) for value in region.box]
