"""One simulated study: pictures, report, labels and the truth that ties words to pixels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gloria_core.phantom import findings, frontal, lateral
from gloria_core.phantom.acquisition import acquire
from gloria_core.phantom.canvas import AnatomyChange, Canvas, Scene
from gloria_core.phantom.disease import Finding, course
from gloria_core.phantom.patient import NOISE, WORDS, Exposure, Patient, draw_exposure, draw_patient, stream
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
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1


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


def study(
    seed: int, patient: int, number: int, *, size: int = 128, views: Sequence[str] = ("frontal",)
) -> PhantomStudy:
    """Study `number` (from 1) of `patient` (from 0): the same for ever for the same arguments.

    Raises ValueError for a size outside 64..512, an unknown view, or a study that this patient does not have.
    """
    _check(seed, patient, number, size, views)
    person = draw_patient(seed, patient)
    present, exposure = course(seed, patient)[number - 1], exposure_of(seed, patient, number)
    report = compose(present, stream(seed, patient, number, WORDS))
    images, regions = {}, []
    for view in views:
        image, masks = draw(seed, person, number, exposure, present, size=size, view=view)
        images[view] = image
        for (index, label), spans in sorted(report.spans.items()):
            f = present[index]
            if index in masks:
                regions.append(Region(label, view, f.side, f.zone, f.severity, masks[index], tuple(spans)))
    return PhantomStudy(
        person, number, exposure.projection, images, report.findings, report.impression, report.labels, regions
    )


def without(seed: int, patient: int, number: int, label: str, *, size: int = 128, view: str = "frontal") -> np.ndarray:
    """The picture of the same study, same noise and pose, as if the finding `label` were not there."""
    _check(seed, patient, number, size, (view,))
    present, exposure = course(seed, patient)[number - 1], exposure_of(seed, patient, number)
    skip = {index for index, finding in enumerate(present) if finding.label == label}
    return draw(seed, draw_patient(seed, patient), number, exposure, present, size=size, view=view, skip=skip)[0]


def _check(seed: int, patient: int, number: int, size: int, views: Sequence[str]) -> None:
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size must be {SMALLEST} to {LARGEST} pixels, not {size}")
    unknown = [view for view in views if view not in VIEWS]
    if unknown or not views:
        raise ValueError(f"views must be taken from {', '.join(VIEWS)}, not {list(views)}")
    if patient < 0 or seed < 0:
        raise ValueError(f"seed and patient count from 0, not {seed}, {patient}")
    count = draw_patient(seed, patient).studies
    if not 1 <= number <= count:
        raise ValueError(f"patient {patient} of seed {seed} has studies 1 to {count}, not {number}")


def exposure_of(seed: int, patient: int, number: int) -> Exposure:
    """How a study was taken: the sicker the patient, the more likely at the bedside."""
    kinds = {finding.kind for finding in course(seed, patient)[number - 1]}
    bedside = 0.45 if kinds & {"edema", "venous"} else 0.2
    if kinds & {"tracheal", "gastric", "chest_tube", "leads"}:
        bedside = 0.85
    return draw_exposure(seed, patient, number, bedside=bedside)


def _anatomy(present: Sequence[Finding], skip: Collection[int]) -> AnatomyChange:
    """What the findings do to organs: a big heart, a raised diaphragm, wet vessels."""
    change = AnatomyChange()
    for index, finding in enumerate(present):
        if index in skip or not finding.drawn:
            continue
        if finding.kind == "cardiomegaly":
            change.heart = 1.17 + 0.30 * finding.strength
        elif finding.kind == "wide":
            change.mediastinum = 0.040 + 0.080 * finding.strength
        elif finding.kind == "edema":
            change.congestion = 0.35 + 0.55 * finding.strength
        elif finding.kind == "basal":
            for side in ("right", "left") if finding.side == "bilateral" else (finding.side,):
                change.raised[side] = 0.03 + 0.06 * finding.strength
    return change


def draw(
    seed: int,
    person: Patient,
    number: int,
    exposure: Exposure,
    present: Sequence[Finding],
    *,
    size: int,
    view: str,
    skip: Collection[int] = (),
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """One view: uint8 (size, size), and the mask of each finding that is drawn on it, by its index in `present`."""
    noise = stream(seed, person.patient, number, NOISE, VIEWS.index(view))
    shown = [(i, f) for i, f in enumerate(present) if i not in skip and f.drawn]
    if view == "lateral":
        scene = lateral.start(Canvas(size, exposure.lateral_pose), person, exposure, _anatomy(present, skip))
        masks = _draw_findings(scene, shown, lateral.DRAW)
        density = lateral.density(scene)
    else:
        scene = frontal.start(Canvas(size, exposure.pose), person, exposure, _anatomy(present, skip))
        masks = _draw_findings(scene, shown, findings.DRAW)
        fractures = tuple(findings.rib_fracture(scene, f) for _, f in shown if f.kind == "rib")
        density = frontal.density(scene) + frontal.skeleton(scene, fractures)
    return acquire(density, exposure, noise), masks


def _draw_findings(
    scene: Scene, shown: list[tuple[int, Finding]], functions: dict[str, Callable[[Scene, Finding], np.ndarray]]
) -> dict[int, np.ndarray]:
    """Draw findings in the order of the functions; a finding that leaves no pixel in this view has no mask."""
    order = [(index, finding, kind) for kind in functions for index, finding in shown if finding.kind == kind]
    masks = {index: functions[kind](scene, finding) for index, finding, kind in order}
    return {index: mask for index, mask in masks.items() if mask.any()}
