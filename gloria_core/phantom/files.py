"""Phantom studies as files: images, masks and one record per patient, each written whole or not at all.

Nothing here imports pandas or torch, so that worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gloria_core.phantom.patient import draw_patient
from gloria_core.phantom.study import PhantomStudy, study


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
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_patients(job: Job, patients: list[int]) -> list[int]:
    """Draw the patients and write their files; a patient whose record is complete is skipped. Returns the patients."""
    for patient in patients:
        if read_record(job, patient) is None:
            rows = [_write_study(job, patient, k) for k in range(1, draw_patient(job.seed, patient).studies + 1)]
            text = json.dumps({"stamp": job.stamp, "rows": rows})
            _replace(job.record(patient), text.encode())
    return patients


def read_record(job: Job, patient: int) -> list[dict] | None:
    """The manifest rows of a finished patient; None when it is not finished, stale, or a file of it is gone."""
    try:
        record = json.loads(job.record(patient).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if record.get("stamp") != job.stamp:
        return None
    for row in record["rows"]:
        paths = [*row["images"], *[mask["path"] for mask in row["masks"]]]
        if not all(Path(job.root, path).is_file() for path in paths):
            return None
    return record["rows"]


def _write_study(job: Job, patient: int, number: int) -> dict:
    views = ("frontal", "lateral") if job.lateral else ("frontal",)
    drawn = study(job.seed, patient, number, size=job.size, views=views)
    name = f"p{patient:05d}_s{number}"
    images = {view: f"images/{name}_{view}.png" for view in views}
    for view, path in images.items():
        _write_png(Path(job.root, path), Image.fromarray(drawn.images[view]))
    masks, boxes = _truth(job, name, drawn, views)
    return {
        "study_id": name,
        "patient_id": f"p{patient:05d}",
        "images": list(images.values()),
        "views": [drawn.projection, "LATERAL"][: len(views)],
        "findings": drawn.findings,
        "impression": drawn.impression,
        "labels": {label: None if np.isnan(value) else int(value) for label, value in drawn.labels.items()},
        "boxes": boxes,
        "masks": masks,
        "meta_view": drawn.projection,
        "meta_sex": drawn.patient.sex,
        "meta_age": drawn.patient.age,
        "meta_study_number": number,
    }


def _truth(job: Job, name: str, drawn: PhantomStudy, views: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    masks, boxes = [], []
    for k, region in enumerate(drawn.regions):
        path, image = f"masks/{name}_{k}.png", views.index(region.view)
        _write_png(Path(job.root, path), Image.fromarray(region.mask))
        entry = {"label": region.label, "image": image, "path": path}
        masks.append({**entry, "side": region.side, "zone": region.zone, "severity": round(region.severity, 3),
                      "spans": [list(span) for span in region.spans]})  # fmt: skip
        boxes.append({"label": region.label, "image": image, "xywh": list(region.box)})
    return masks, boxes


def _write_png(path: Path, image: Image.Image) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG", compress_level=1)
    temporary.replace(path)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
