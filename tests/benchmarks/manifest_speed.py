"""How long a whole dataset's tables take to become a manifest, on one core, without looking at images.

    python tests/benchmarks/manifest_speed.py [chexpert] [mimic] [openi] [padchest]

CheXpert, PadChest and Open-I from the real tables in the wheel of torchxrayvision; MIMIC-CXR from made-up tables and
reports of the full size (377,110 images, 227,827 studies, 65,379 patients). Aim: under two minutes each.
"""

from __future__ import annotations

import gzip
import importlib.util
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, write_manifest
from gloria_core.data.sources import prepare

WHEEL = Path(importlib.util.find_spec("torchxrayvision").origin).parent / "data"
N_IMAGES, N_STUDIES, N_PATIENTS = 377_110, 227_827, 65_379
REPORT = (
    "                      FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___F with cough\n \n"
    " TECHNIQUE:  Chest PA and lateral\n \n COMPARISON:  ___\n \n FINDINGS: \n \n The lungs are clear without focal\n"
    " consolidation. No pleural effusion or pneumothorax {n}.  The\n cardiac silhouette is {size}.\n \n IMPRESSION: \n"
    " \n 1.  No acute process.\n 2.  Stable {size} heart.\n"
)


def chexpert(root: Path) -> dict:
    """The real train.csv; a valid.csv of its first rows with other patients."""
    lines = gzip.decompress((WHEEL / "chexpert_train.csv.gz").read_bytes()).decode().splitlines()
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    valid = [line.replace("/train/patient0", "/valid/patient9") for line in lines[1:201]]
    (root / "valid.csv").write_text("\n".join([lines[0], *valid]) + "\n")
    return {"views": "all", "hold_out": "", "check_images": False}


def mimic(root: Path) -> dict:
    """Tables and a zip of reports with the owner's columns and sizes, made up."""
    random = np.random.default_rng(0)
    patient = np.sort(random.integers(0, N_PATIENTS, N_STUDIES)) + 10_000_000
    study = np.arange(N_STUDIES) + 50_000_000
    rows = np.concatenate([np.arange(N_STUDIES), np.sort(random.integers(0, N_STUDIES, N_IMAGES - N_STUDIES))])
    images = pd.DataFrame(
        {
            "dicom_id": [f"{value:08x}-{index:08x}" for index, value in enumerate(random.integers(0, 2**31, N_IMAGES))],
            "subject_id": patient[rows],
            "study_id": study[rows],
            "PerformedProcedureStepDescription": "CHEST (PA AND LAT)",
            "ViewPosition": random.choice(["AP", "PA", "LATERAL", "LL", ""], N_IMAGES, p=[0.39, 0.25, 0.22, 0.1, 0.04]),
            "StudyDate": 21800506,
        }
    )
    images.to_csv(
        root / "mimic-cxr-2.0.0-metadata.csv.gz", index=False, compression={"method": "gzip", "compresslevel": 1}
    )
    split = np.where(
        images["subject_id"] % 100 == 0, "test", np.where(images["subject_id"] % 100 == 1, "validate", "train")
    )
    table = images[["dicom_id", "study_id", "subject_id"]].assign(split=split)
    table.to_csv(root / "mimic-cxr-2.0.0-split.csv.gz", index=False, compression={"method": "gzip", "compresslevel": 1})
    values = random.choice(["1.0", "0.0", "-1.0", ""], (N_STUDIES, 14), p=[0.15, 0.1, 0.05, 0.7])
    labels = pd.DataFrame(values, columns=sorted(CHEXPERT_LABELS))
    labels.insert(0, "study_id", study)
    labels.insert(0, "subject_id", patient)
    labels.to_csv(root / "mimic-cxr-2.0.0-chexpert.csv", index=False)
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, (name, person) in enumerate(zip(study, patient, strict=True)):
            text = REPORT.format(n=number, size="enlarged" if number % 3 else "normal")
            archive.writestr(f"files/p{str(person)[:2]}/p{person}/s{name}.txt", text)
    return {"views": "all", "check_images": False}


def padchest(root: Path) -> dict:
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    (root / name).write_bytes((WHEEL / name).read_bytes())
    return {"views": "all", "check_images": False}


def openi(root: Path) -> dict:
    return {"check_images": False}


def main(names: list[str]) -> None:
    makers: dict[str, tuple[str, Callable[[Path], dict]]] = {
        "chexpert": ("chexpert", chexpert),
        "mimic": ("mimic_cxr", mimic),
        "padchest": ("padchest", padchest),
        "openi": ("openi", openi),
    }
    for name in names or list(makers):
        dataset, make = makers[name]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            options = make(root)
            start, used = time.perf_counter(), time.process_time()
            frame = prepare(dataset, root, options)
            prepared = time.perf_counter()
            write_manifest(frame, root / "manifest.csv")
            end = time.perf_counter()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name}: {len(frame):,} studies, prepare {prepared - start:.1f} s, write {end - prepared:.1f} s, "
                f"processor {time.process_time() - used:.1f} s, peak memory {peak:.1f} GiB"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
