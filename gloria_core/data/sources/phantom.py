"""The phantom as a dataset: `prepare` writes images and masks and returns the manifest."""

from pathlib import Path
from typing import Annotated

import pandas as pd
from joblib import Parallel, delayed
from pydantic import Field, PositiveInt
from tqdm import tqdm

from gloria_core.data.manifest import CHEXPERT_LABELS, validate
from gloria_core.data.splits import assign_label_ranks, assign_splits
from gloria_core.phantom.files import Job, fingerprint, read_record, write_patients
from gloria_core.phantom.study import LARGEST, SMALLEST

# Patients that a worker draws at a time
_BATCH = 16
_BAR = {"desc": "phantom patients", "unit": " patients", "mininterval": 10.0}


def prepare(
    root: Path,
    *,
    n_patients: PositiveInt,
    size: Annotated[int, Field(ge=SMALLEST, le=LARGEST)] = 128,
    seed: int = 0,
    lateral: bool = False,
    workers: PositiveInt = 2,
    progress: bool = True,
) -> pd.DataFrame:
    """Draw `n_patients` (about twice as many studies) under `root` and return their validated manifest.

    Writes `images/*.png` (8-bit), `masks/*.png` (1-bit) and `records/*.json`, one per finished patient. Every file is
    written under another name and renamed: after a killed run, calling again with the same arguments completes it.
    The result does not depend on `workers`, the number of processes. Splits and label ranks follow `seed`.
    """
    for folder in ("images", "masks", "records"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for left_over in (root / folder).glob(".*.tmp"):
            left_over.unlink(missing_ok=True)
    job = Job(str(root), seed, size, lateral, fingerprint())
    missing = [patient for patient in range(n_patients) if read_record(job, patient) is None]
    batches = [missing[first : first + _BATCH] for first in range(0, len(missing), _BATCH)]
    # joblib's processes do not import the caller's script again, as those of multiprocessing do
    draw = Parallel(workers, return_as="generator_unordered")(delayed(write_patients)(job, batch) for batch in batches)
    with tqdm(total=n_patients, initial=n_patients - len(missing), disable=not progress, **_BAR) as bar:
        for done in draw:
            bar.update(len(done))
    records = [read_record(job, patient) for patient in range(n_patients)]
    if None in records:
        raise OSError(f"{root}: files of patient {records.index(None)} vanished while the phantom was drawn; run again")
    frame = pd.DataFrame([row for record in records for row in record])
    frame = frame.astype(dict.fromkeys(CHEXPERT_LABELS, float))
    frame = assign_label_ranks(assign_splits(frame, seed=seed), seed=seed)
    return validate(frame, source=f"phantom dataset in {root}")
