"""Who is on the picture: body, pose and exposure, drawn from (seed, patient) and (seed, patient, study)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

BODY, COURSE, EXPOSURE, WORDS, NOISE = range(5)
"""Independent random streams: what one draws never shifts what another draws."""


def stream(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but its key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(seed), *map(int, key)])))


def _within(value: float, low: float, high: float) -> float:
    return min(max(float(value), low), high)


@dataclass(frozen=True)
class Patient:
    """One simulated person. Lengths are in anatomy units (half an image); `studies` counts from 1."""

    patient: int
    sex: str
    age: int
    studies: int
    width: float  # half-width of the lungs at their widest
    apex: float  # y of the lung apices
    dome: float  # y of the right hemidiaphragm at full inspiration
    dome_gap: float  # how much lower the left one is
    heart: float  # heart size, 1 = cardiothoracic ratio about 0.46
    heart_tilt: float
    girth: float  # thickness of the chest wall
    breast: float  # 0 none
    knob: float  # size of the aortic knob
    rib_spacing: float
    rib_phase: float
    rib_density: float
    spine_bend: float
    gastric: float
    vessel_seed: int


@dataclass(frozen=True)
class Pose:
    """Where the patient stands: rotation in radians, shift in image units, magnification."""

    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Exposure:
    """One exposure: view, inspiration, pose, beam and detector."""

    projection: str  # PA or AP
    inspiration: float  # 0 full; positive raises the diaphragm (units)
    pose: Pose
    lateral_pose: Pose
    contrast: float
    brightness: float
    gamma: float
    blur: float  # in units of 1/128 image
    noise: float
    veil: float
    collimation: tuple[float, float, float, float]  # left, right, top, bottom borders, image units
    marker: str
    marker_at: tuple[float, float]


@lru_cache(maxsize=64)
def draw_patient(seed: int, patient: int) -> Patient:
    """The anatomy of one person, the same in all of their studies."""
    rng = stream(seed, patient, BODY)
    male = bool(rng.random() < 0.53)
    age = int(np.clip(rng.normal(58, 17), 18, 94))
    old = (age - 18) / 76
    return Patient(
        patient=patient,
        sex="M" if male else "F",
        age=age,
        studies=1 + int(rng.choice(4, p=[0.4, 0.3, 0.2, 0.1])),
        width=_within(rng.normal(0.715 if male else 0.69, 0.022), 0.63, 0.78),
        apex=_within(rng.normal(-0.80, 0.02), -0.85, -0.75),
        dome=_within(rng.normal(0.47, 0.035), 0.38, 0.55),
        dome_gap=float(rng.uniform(0.02, 0.07)),
        heart=_within(rng.normal(0.965, 0.04), 0.86, 1.05),
        heart_tilt=_within(rng.normal(0.66, 0.09), 0.45, 0.85),
        girth=_within(rng.gamma(6, 0.16), 0.45, 1.9),
        breast=0.0 if male and rng.random() < 0.9 else float(rng.uniform(0.35, 1.0)),
        knob=float(0.8 + 0.35 * old + rng.normal(0, 0.06)),
        rib_spacing=_within(rng.normal(0.158, 0.006), 0.145, 0.172),
        rib_phase=float(rng.uniform(-0.5, 0.5)),
        rib_density=float(rng.uniform(0.75, 1.2) * (1.1 - 0.3 * old)),
        spine_bend=float(rng.normal(0, 0.012)),
        gastric=float(rng.choice([0.0, 1.0], p=[0.35, 0.65]) * rng.uniform(0.5, 1.0)),
        vessel_seed=int(rng.integers(2**31)),
    )


def _pose(rng: np.random.Generator, sway: float) -> Pose:
    return Pose(
        angle=_within(rng.normal(0, 0.020 * sway), -0.07, 0.07),
        dx=_within(rng.normal(0, 0.025 * sway), -0.09, 0.09),
        dy=_within(rng.normal(0.02, 0.025 * sway), -0.08, 0.10),
        scale=_within(rng.normal(1.06, 0.035), 0.96, 1.16),
    )


def draw_exposure(seed: int, patient: int, number: int, *, bedside: float) -> Exposure:
    """How study `number` was taken; `bedside` is the chance of a portable AP film."""
    rng = stream(seed, patient, number, EXPOSURE)
    portable = bool(rng.random() < bedside)
    sway = 1.35 if portable else 1.0
    border = [float(b) for b in np.where(rng.random(4) < 0.22, rng.uniform(0.01, 0.07, 4), 0.0)]
    return Exposure(
        projection="AP" if portable else "PA",
        inspiration=float(abs(rng.normal(0.05 if portable else 0.0, 0.035))),
        pose=_pose(rng, sway),
        lateral_pose=replace(_pose(rng, 1.0), scale=float(rng.normal(1.07, 0.03))),
        contrast=_within(rng.normal(0.92 if portable else 1.0, 0.07), 0.75, 1.2),
        brightness=_within(rng.normal(0.0, 0.03), -0.08, 0.08),
        gamma=_within(rng.normal(1.0, 0.09), 0.8, 1.25),
        blur=float(rng.uniform(0.40, 0.65) if portable else rng.uniform(0.20, 0.42)),
        noise=float(rng.uniform(0.009, 0.017) if portable else rng.uniform(0.005, 0.011)),
        veil=float(rng.uniform(0.05, 0.12) if portable else rng.uniform(0.02, 0.06)),
        collimation=(border[0], border[1], border[2], border[3]),
        marker=str(rng.choice(["L", "R", ""], p=[0.5, 0.3, 0.2])),
        marker_at=(float(rng.uniform(0.80, 0.90)), float(rng.uniform(-0.90, -0.66))),
    )
