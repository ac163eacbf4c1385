"""The phantom as a dataset: `prepare` writes images and masks and returns the manifest."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from gloria_core.data.manifest import CHEXPERT_LABELS, validate
from gloria_core.data.splits import assign_label_ranks, assign_splits
from gloria_core.phantom.files import Job, fingerprint, read_record, write_patients
from gloria_core.phantom.patient import draw_patient
from gloria_core.phantom.study import LARGEST, SMALLEST

_BATCH = 16
"""Patients that a worker draws at a time."""
_BAR = {"desc": "phantom patients", "unit": " patients", "mininterval": 10.0}


def prepare(
    root: Path | str,
    *,
    n_patients: int,
    size: int = 128,
    seed: int = 0,
    lateral: bool = False,
    workers: int = 2,
    progress: bool = True,
) -> pd.DataFrame:
    """Draw `n_patients` (about twice as many studies) under `root` and return their validated manifest.

    Writes `images/*.png` (8-bit), `masks/*.png` (1-bit) and `records/*.json`, one per finished patient. Every file is
    written under another name and renamed: after a killed run, calling again with the same arguments completes it.
    The result does not depend on `workers`; more than one starts new processes, so a script (not a notebook) calls this
    under `if __name__ == "__main__":`. Splits and label ranks follow `seed`.

    Raises ValueError for n_patients < 1, workers < 1 or a size outside 64..512.
    """
    if n_patients < 1 or workers < 1:
        raise ValueError(f"n_patients and workers must be at least 1, not {n_patients} and {workers}")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size must be {SMALLEST} to {LARGEST} pixels, not {size}")
    root = Path(root)
    for folder in ("images", "masks", "records"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for left_over in (root / folder).glob(".*.tmp"):
            left_over.unlink(missing_ok=True)
    job = Job(str(root), seed, size, lateral, fingerprint())
    missing = [patient for patient in range(n_patients) if read_record(job, patient) is None]
    batches = [missing[first : first + _BATCH] for first in range(0, len(missing), _BATCH)]
    with tqdm(total=n_patients, initial=n_patients - len(missing), disable=not progress, **_BAR) as bar:
        for done in _drawn(job, batches, workers):
            bar.update(len(done))
    rows = [row for patient in range(n_patients) for row in _rows(job, patient)]
    frame = _frame(rows)
    frame = assign_label_ranks(assign_splits(frame, seed=seed), seed=seed)
    return validate(frame, source=f"phantom dataset in {root}")


def _drawn(job: Job, batches: list[list[int]], workers: int) -> Iterator[list[int]]:
    """Finished batches, in whatever order; a failure in a worker is raised here."""
    if workers == 1 or len(batches) < 2:
        yield from (write_patients(job, batch) for batch in batches)
        return
    # spawn: a forked child of a process that has used torch or CUDA may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        running = [pool.submit(write_patients, job, batch) for batch in batches]
        try:
            for future in as_completed(running):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _rows(job: Job, patient: int) -> list[dict]:
    rows = read_record(job, patient)
    if rows is None:
        studies = draw_patient(job.seed, patient).studies
        raise OSError(f"{job.root}: files of patient {patient} ({studies} studies) vanished while drawing; run again")
    return rows


def _frame(rows: list[dict]) -> pd.DataFrame:
    table = []
    for row in rows:
        labels = {label: row["labels"][label] for label in CHEXPERT_LABELS}
        table.append(
            {
                "study_id": row["study_id"],
                "patient_id": row["patient_id"],
                "split": "train",
                "images": ";".join(row["images"]),
                "views": ";".join(row["views"]),
                "findings": row["findings"],
                "impression": row["impression"],
                "label_rank": 0.0,
                **{label: np.nan if value is None else float(value) for label, value in labels.items()},
                "boxes": json.dumps(row["boxes"]) if row["boxes"] else "",
                "masks": json.dumps(row["masks"]) if row["masks"] else "",
                **{key: str(value) for key, value in row.items() if key.startswith("meta_")},
            }
        )
    return pd.DataFrame(table)
