"""Phantom studies as files: images, masks and one record per patient, each written whole or not at all.

Nothing here imports pandas or torch, so that worker processes start quickly.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from gloria_core.phantom.patient import draw_patient
from gloria_core.phantom.study import VIEWS, study


@dataclass(frozen=True)
class Job:
    """What is written for every patient; `code` is the fingerprint of the program that draws."""

    root: str
    seed: int
    size: int
    lateral: bool
    code: str

    @property
    def stamp(self) -> str:
        """What the files depend on. A record with another stamp is stale; where the files lie does not matter."""
        return json.dumps({key: value for key, value in asdict(self).items() if key != "root"}, sort_keys=True)

    def record(self, patient: int) -> Path:
        """The file that says that a patient is complete."""
        return Path(self.root, "records", f"p{patient:05d}.json")


def fingerprint() -> str:
    """Changes whenever the drawing program changes: SHA-256 over its source, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".py", ".json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_patients(job: Job, patients: list[int]) -> list[int]:
    """Draw the patients and write their files; a patient whose record is complete is skipped. Returns the patients."""
    for patient in patients:
        if read_record(job, patient) is None:
            numbers = range(1, draw_patient(job.seed, patient).studies + 1)
            rows, files = zip(*[_write_study(job, patient, number) for number in numbers], strict=True)
            record = {"stamp": job.stamp, "files": [path for paths in files for path in paths], "rows": rows}
            _write(job.record(patient), json.dumps(record).encode())
    return patients


def read_record(job: Job, patient: int) -> list[dict] | None:
    """The manifest rows of a finished patient; None when it is not finished, stale, or a file of it is gone."""
    try:
        record = json.loads(job.record(patient).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    whole = record.get("stamp") == job.stamp and all(Path(job.root, path).is_file() for path in record["files"])
    return record["rows"] if whole else None


def _write_study(job: Job, patient: int, number: int) -> tuple[dict, list[str]]:
    """Write the images and masks of one study; returns its manifest row (an unknown label is None) and its files."""
    views = VIEWS if job.lateral else VIEWS[:1]
    drawn = study(job.seed, patient, number, size=job.size, views=views)
    name = f"p{patient:05d}_s{number}"
    pictures = {f"images/{name}_{view}.png": pixels for view, pixels in drawn.images.items()}
    images, masks, boxes = ";".join(pictures), [], []
    for k, region in enumerate(drawn.regions):
        entry = {"label": region.label, "image": views.index(region.view)}
        masks.append(entry | {"path": f"masks/{name}_{k}.png", "side": region.side, "zone": region.zone,
                              "severity": round(region.severity, 3), "spans": region.spans})  # fmt: skip
        boxes.append(entry | {"xywh": region.box})
        pictures[masks[-1]["path"]] = region.mask
    for path, pixels in pictures.items():
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
        _write(Path(job.root, path), buffer.getvalue())
    row = {
        "study_id": name, "patient_id": f"p{patient:05d}", "split": "train",
        "images": images, "views": ";".join([drawn.projection, "LATERAL"][: len(views)]),
        "findings": drawn.findings, "impression": drawn.impression, "label_rank": 0.0,
        **{label: None if np.isnan(value) else float(value) for label, value in drawn.labels.items()},
        "boxes": json.dumps(boxes) if boxes else "", "masks": json.dumps(masks) if masks else "",
        "meta_view": drawn.projection, "meta_sex": drawn.patient.sex, "meta_age": str(drawn.patient.age),
        "meta_study_number": str(number),
    }  # fmt: skip
    return row, list(pictures)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
