"""Simulated chest radiographs with reports: `study(seed, patient, number)` draws one, the same for ever.

The pictures are sums of attenuating organs (a line integral, not a collage), so a finding hides or silhouettes what it
would in a patient. Reports say what is drawn, with side, zone and size; `Region.spans` tell which words name which
pixels. Labels are the fourteen of CheXpert (Irvin et al. 2019, https://arxiv.org/abs/1901.07031).
"""

from gloria_core.phantom.disease import COMPETITION, LABELS
from gloria_core.phantom.patient import Patient
from gloria_core.phantom.study import LARGEST, SMALLEST, VIEWS, PhantomStudy, Region, patients, study

__all__ = [
    "COMPETITION", "LABELS", "LARGEST", "SMALLEST", "VIEWS", "Patient", "PhantomStudy", "Region", "patients", "study",
]  # fmt: skip
