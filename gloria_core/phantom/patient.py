"""Who is on the picture: body, pose and exposure, drawn from (seed, patient) and (seed, patient, study)."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

# Independent random streams: what one draws never shifts what another draws
BODY, COURSE, EXPOSURE, WORDS, NOISE = range(5)


def stream(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends on nothing but its key."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(seed), *map(int, key)])))


def _within(value: float, low: float, high: float) -> float:
    return min(max(float(value), low), high)


class Patient:
    """The anatomy of one person, the same in all of their studies. Lengths are in anatomy units (half an image)."""

    def __init__(self, seed: int, patient: int) -> None:
        rng = stream(seed, patient, BODY)
        male = bool(rng.random() < 0.53)
        self.patient = patient
        self.sex = "M" if male else "F"
        self.age = int(np.clip(rng.normal(58, 17), 18, 94))
        old = (self.age - 18) / 76
        self.studies = 1 + int(rng.choice(4, p=[0.4, 0.3, 0.2, 0.1]))  # how many; they count from 1
        self.width = _within(rng.normal(0.715 if male else 0.69, 0.022), 0.63, 0.78)  # half the lungs at their widest
        self.apex = _within(rng.normal(-0.80, 0.02), -0.85, -0.75)  # y of the lung apices
        self.dome = _within(rng.normal(0.47, 0.035), 0.38, 0.55)  # y of the right hemidiaphragm at full inspiration
        self.dome_gap = float(rng.uniform(0.02, 0.07))  # how much lower the left one is
        self.heart = _within(rng.normal(0.965, 0.04), 0.86, 1.05)  # size, 1 = cardiothoracic ratio about 0.46
        self.heart_tilt = _within(rng.normal(0.66, 0.09), 0.45, 0.85)
        self.girth = _within(rng.gamma(6, 0.16), 0.45, 1.9)  # thickness of the chest wall
        self.breast = 0.0 if male and rng.random() < 0.9 else float(rng.uniform(0.35, 1.0))  # 0 none
        self.knob = float(0.8 + 0.35 * old + rng.normal(0, 0.06))  # size of the aortic knob
        self.rib_spacing = _within(rng.normal(0.158, 0.006), 0.145, 0.172)
        self.rib_phase = float(rng.uniform(-0.5, 0.5))
        self.rib_density = float(rng.uniform(0.75, 1.2) * (1.1 - 0.3 * old))
        self.spine_bend = float(rng.normal(0, 0.012))
        self.gastric = float(rng.choice([0.0, 1.0], p=[0.35, 0.65]) * rng.uniform(0.5, 1.0))
        self.vessel_seed = int(rng.integers(2**31))


@lru_cache(maxsize=64)
def draw_patient(seed: int, patient: int) -> Patient:
    """One simulated person."""
    return Patient(seed, patient)


@dataclass(frozen=True)
class Pose:
    """Where the patient stands: rotation in radians, shift in image units, magnification."""

    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


def _pose(rng: np.random.Generator, sway: float) -> Pose:
    return Pose(
        angle=_within(rng.normal(0, 0.020 * sway), -0.07, 0.07),
        dx=_within(rng.normal(0, 0.025 * sway), -0.09, 0.09),
        dy=_within(rng.normal(0.02, 0.025 * sway), -0.08, 0.10),
        scale=_within(rng.normal(1.06, 0.035), 0.96, 1.16),
    )


class Exposure:
    """How study `number` was taken: view, inspiration, pose, beam and detector."""

    def __init__(self, seed: int, patient: int, number: int, *, bedside: float) -> None:
        """`bedside` is the chance of a portable AP radiograph."""
        rng = stream(seed, patient, number, EXPOSURE)
        portable = bool(rng.random() < bedside)
        # left, right, top and bottom border, image units
        self.collimation = np.where(rng.random(4) < 0.22, rng.uniform(0.01, 0.07, 4), 0.0).tolist()
        self.projection = "AP" if portable else "PA"
        self.inspiration = float(abs(rng.normal(0.05 if portable else 0.0, 0.035)))  # 0 full; raises the diaphragm
        self.pose = _pose(rng, 1.35 if portable else 1.0)
        self.lateral_pose = replace(_pose(rng, 1.0), scale=float(rng.normal(1.07, 0.03)))
        self.contrast = _within(rng.normal(0.92 if portable else 1.0, 0.07), 0.75, 1.2)
        self.brightness = _within(rng.normal(0.0, 0.03), -0.08, 0.08)
        self.gamma = _within(rng.normal(1.0, 0.09), 0.8, 1.25)
        self.blur = float(rng.uniform(0.40, 0.65) if portable else rng.uniform(0.20, 0.42))  # in 1/128 of the image
        self.noise = float(rng.uniform(0.009, 0.017) if portable else rng.uniform(0.005, 0.011))
        self.veil = float(rng.uniform(0.05, 0.12) if portable else rng.uniform(0.02, 0.06))  # scattered radiation
        self.marker = str(rng.choice(["L", "R", ""], p=[0.5, 0.3, 0.2]))
        self.marker_at = float(rng.uniform(0.80, 0.90)), float(rng.uniform(-0.90, -0.66))
