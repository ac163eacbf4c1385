"""One simulated study: pictures, report, labels and the truth that ties words to pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from gloria_core.phantom import findings, frontal, lateral
from gloria_core.phantom.acquisition import acquire
from gloria_core.phantom.canvas import AnatomyChange
from gloria_core.phantom.disease import Finding, course
from gloria_core.phantom.patient import NOISE, WORDS, Exposure, Patient, draw_patient, stream
from gloria_core.phantom.report import compose

VIEWS = ("frontal", "lateral")
SMALLEST, LARGEST = 64, 512


@dataclass(frozen=True)
class Region:
    """One finding on one view and the words that name it.

    Shape: `mask` (size, size) bool. `spans` are (section, start, end) in the study's findings or impression text;
    a finding on both lungs has one mask. `side` and `zone` are the patient's ("" where they make no sense).
    """

    label: str
    view: str
    side: str
    zone: str
    severity: float
    mask: np.ndarray
    spans: tuple[tuple[str, int, int], ...]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Smallest box around the mask: x, y, width, height in pixels."""
        return tuple(cv2.boundingRect(self.mask.astype(np.uint8)))


@dataclass(frozen=True)
class PhantomStudy:
    """A study of the phantom. `images[view]` is uint8 (size, size), bright is dense; labels are 1, 0, -1 or nan."""

    patient: Patient
    number: int
    projection: str
    images: dict[str, np.ndarray]
    findings: str
    impression: str
    labels: dict[str, float]
    regions: list[Region]

    def text(self, span: tuple[str, int, int]) -> str:
        """The words of one span."""
        section, start, end = span
        return {"findings": self.findings, "impression": self.impression}[section][start:end]


def patients(seed: int, n: int) -> list[Patient]:
    """The first n patients of a seed; `Patient.studies` says how many studies each has (numbered from 1)."""
    return [draw_patient(seed, number) for number in range(n)]


def study(seed: int, patient: int, number: int, *, size: int = 128, views: Sequence[str] = VIEWS[:1]) -> PhantomStudy:
    """Study `number` (from 1) of `patient` (from 0): the same for ever for the same arguments.

    Raises ValueError for a size outside 64..512, an unknown view, or a study that this patient does not have.
    """
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size must be {SMALLEST} to {LARGEST} pixels, not {size}")
    if not views or not set(views) <= set(VIEWS):
        raise ValueError(f"views must be taken from {', '.join(VIEWS)}, not {list(views)}")
    if patient < 0 or seed < 0:
        raise ValueError(f"seed and patient count from 0, not {seed}, {patient}")
    person = draw_patient(seed, patient)
    if not 1 <= number <= person.studies:
        raise ValueError(f"patient {patient} of seed {seed} has studies 1 to {person.studies}, not {number}")
    present, exposure = course(seed, patient)[number - 1], exposure_of(seed, patient, number)
    report = compose(present, stream(seed, patient, number, WORDS))
    images, regions = {}, []
    for view in views:
        images[view], masks = draw(seed, person, number, exposure, present, size=size, view=view)
        for (index, label), spans in sorted(report.spans.items()):
            f = present[index]
            if index in masks:
                regions.append(Region(label, view, f.side, f.zone, f.severity, masks[index], tuple(spans)))
    return PhantomStudy(
        person, number, exposure.projection, images, report.findings, report.impression, report.labels, regions
    )


def exposure_of(seed: int, patient: int, number: int) -> Exposure:
    """How a study was taken: the sicker the patient, the more likely at the bedside."""
    kinds = {finding.kind for finding in course(seed, patient)[number - 1]}
    tubes = {"tracheal", "gastric", "chest_tube", "leads"}
    bedside = 0.85 if kinds & tubes else 0.45 if kinds & {"edema", "venous"} else 0.2
    return Exposure(seed, patient, number, bedside=bedside)


def draw(
    seed: int, person: Patient, number: int, exposure: Exposure, present: Sequence[Finding], *, size: int, view: str
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """One view: uint8 (size, size), and the mask of each finding that is drawn on it, by its index in `present`."""
    module, painters = (lateral, lateral.DRAW) if view == "lateral" else (frontal, findings.DRAW)
    scene = module.start(size, person, exposure, AnatomyChange(present))
    masks = {}
    for kind, paint in painters.items():  # in this order, so that fluid covers what lies in it
        for index, finding in enumerate(present):
            if finding.kind == kind and finding.drawn:
                masks[index] = paint(scene, finding)
    image = acquire(module.density(scene), exposure, stream(seed, person.patient, number, NOISE, VIEWS.index(view)))
    return image, {index: mask for index, mask in masks.items() if mask.any()}
