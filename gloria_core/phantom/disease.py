"""What is wrong with a patient, and how it develops from study to study.

`disease.json` holds, by label, the kinds that a finding may have with their chances, the chance that it is on both
sides (or its fixed side) and the chances of the upper and middle zone; and the findings and devices that come together.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from gloria_core.phantom.patient import COURSE, draw_patient, stream

_DATA = json.loads(Path(__file__).with_name("disease.json").read_text(encoding="utf-8"))

COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_OTHERS = tuple(label for label in _DATA["places"] if label not in COMPETITION)
# How often each competition finding comes alone; the combinations below make up for the differences
_SINGLE = (0.24, 0.14, 0.25, 0.19, 0.18)
_CHRONIC = {"Cardiomegaly", "Enlarged Cardiomediastinum", "Lung Lesion", "Pleural Other", "Fracture", "Support Devices"}


@dataclass(frozen=True)
class Finding:
    """One abnormal thing of one study.

    `kind` is its shape, `severity` runs from 0 to 1, `depth` from -1 (front) to 1
    (back), `form` seeds the outline so that it stays the same thing in the next study. An uncertain finding is drawn
    faintly or not at all.
    """

    label: str
    kind: str
    side: str  # left, right, bilateral, midline or ""
    zone: str  # upper, mid, lower or ""
    severity: float
    depth: float
    form: int
    uncertain: bool = False
    drawn: bool = True
    change: str = ""  # "", new, unchanged, improved, increased

    @property
    def strength(self) -> float:
        """How strongly it is drawn."""
        return 0.35 * self.severity if self.uncertain else self.severity

    @property
    def sides(self) -> list[str]:
        """The lungs that it is in."""
        return ["right", "left"] if self.side == "bilateral" else [self.side]


def _side(rng: np.random.Generator, both: float = 0.0) -> str:
    return str(rng.choice(["right", "left", "bilateral"], p=[(1 - both) / 2, (1 - both) / 2, both]))


def _place(label: str, rng: np.random.Generator) -> tuple[str, str, str]:
    """Kind, side and zone of a new finding."""
    place = _DATA["places"][label]
    several = len(place["kinds"]) > 1
    kind = str(rng.choice(place["kinds"], p=place.get("chances"))) if several else place["kinds"][0]
    side = place["side"] if "side" in place else _side(rng, place["both_sides"])
    if kind in ("basal", "cap") or "upper" not in place:
        return kind, side, {"basal": "lower", "cap": "upper"}.get(kind, "")
    upper, mid = place["upper"], place["mid"]
    zone = str(rng.choice(["upper", "mid", "lower"], p=[upper, mid, 1 - upper - mid]))
    return kind, side, "" if kind == "clavicle" else zone


def new_finding(label: str, rng: np.random.Generator) -> Finding:
    """A finding with side, zone, size and certainty; certainty and severity draws are the same for every label."""
    place = _place(label, rng)
    uncertain = bool(rng.random() < 0.11)
    severity, depth = float(rng.beta(1.8, 1.6) * 0.85 + 0.15), float(rng.uniform(-0.8, 0.8))
    form = int(rng.integers(2**31))
    return Finding(label, *place, severity, depth, form, uncertain, drawn=bool(not uncertain or rng.random() < 0.5))


def _device(kind: str, rng: np.random.Generator) -> Finding:
    side = "midline" if kind in ("tracheal", "gastric", "wires") else _side(rng)
    if kind == "pacemaker":
        side = "left" if rng.random() < 0.8 else "right"
    side = "" if kind == "leads" else side
    return Finding("Support Devices", kind, side, "", 1.0, -0.5, int(rng.integers(2**31)))


def _devices(name: str, rng: np.random.Generator) -> list[Finding]:
    kinds = [name]
    if name == "tubes":
        chances = {"tracheal": 0.45, "gastric": 0.4, "venous": 0.7, "leads": 0.5}
        kinds = [kind for kind, chance in chances.items() if rng.random() < chance] or ["venous"]
    return [_device(kind, rng) for kind in kinds]


def _scenario(rng: np.random.Generator) -> list[Finding]:
    """One clinical situation: normal, a single finding, or several that go together."""
    plot = rng.choice(5, p=[0.225, 0.365, 0.085, 0.255, 0.07])
    names: list[str] = []
    if plot == 1:
        names = [str(rng.choice(COMPETITION, p=_SINGLE))]
    elif plot == 2:
        names = [str(rng.choice(_OTHERS))]
    elif plot == 3:
        names = _DATA["clusters"][int(rng.integers(len(_DATA["clusters"])))]
    elif plot == 4:
        names = [str(n) for n in rng.choice(COMPETITION + _OTHERS, size=int(rng.integers(2, 4)), replace=False)]
    out: list[Finding] = []
    for name in names:
        out += [new_finding(name, rng)] if name in LABELS else _devices(name, rng)
    if plot != 1 and rng.random() < 0.13 and not any(f.label == "Support Devices" for f in out):
        out.append(_device(str(rng.choice(["pacemaker", "venous", "wires", "leads"])), rng))
    air = [f.side for f in out if f.label == "Pneumothorax"]
    return [replace(f, side=air[0]) if air and f.kind == "chest_tube" else f for f in out]  # the drain is in the air


def _evolve(finding: Finding, rng: np.random.Generator) -> Finding | None:
    """The same finding in the next study, or None when it is gone."""
    roll, amount = float(rng.random()), float(rng.uniform(0.15, 0.4))
    if finding.label == "Support Devices":
        gone = roll < (0.02 if finding.kind in ("pacemaker", "wires") else 0.3)
        return None if gone else replace(finding, change="unchanged")
    if finding.uncertain:
        certain = bool(roll < 0.35)
        later = replace(finding, uncertain=not certain, drawn=certain or finding.drawn, change="")
        return later if roll < 0.6 else None
    gone, unchanged, improved = (0.04, 0.72, 0.78) if finding.label in _CHRONIC else (0.16, 0.5, 0.76)
    if roll < gone:
        return None
    if unchanged <= roll < improved and finding.severity - amount > 0.15:
        return replace(finding, severity=finding.severity - amount, change="improved")
    if roll >= unchanged and finding.severity + amount < 1.0:
        return replace(finding, severity=finding.severity + amount, change="increased")
    return replace(finding, change="unchanged")


@lru_cache(maxsize=64)
def course(seed: int, patient: int) -> tuple[tuple[Finding, ...], ...]:
    """All studies of one patient: the findings of each, first study first."""
    rng = stream(seed, patient, COURSE)
    now = _scenario(rng)
    visits = [tuple(now)]
    for _ in range(draw_patient(seed, patient).studies - 1):
        now = [later for later in (_evolve(f, rng) for f in now) if later is not None]
        if rng.random() < 0.48:
            old = {f.label for f in now}, {f.kind for f in now}
            new = [
                replace(f, change="new")
                for f in _scenario(rng)
                if (f.kind not in old[1] if f.label == "Support Devices" else f.label not in old[0])
            ]
            now = [f for f in now if f.label in _CHRONIC or rng.random() < 0.3] + new
        visits.append(tuple(now))
    return tuple(visits)
