"""The normal frontal chest radiograph: the sum of what lies in the beam, organ by organ."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gloria_core.phantom.canvas import AIR, AnatomyChange, Array, Canvas, Scene, table_rows
from gloria_core.phantom.patient import Exposure, Patient


@lru_cache(maxsize=8)
def wall_curve(patient: Patient) -> Array:
    """Half-width of the rib cage for each table row: a dome over the apices, widest near the base."""
    y = table_rows()
    t = np.clip((y - patient.apex) / (0.62 - patient.apex), 0.0, 1.0)
    return 0.27 + (patient.width - 0.27) * np.sqrt(1 - (1 - t) ** 2.7) - 0.03 * np.clip(y - 0.45, 0, 1)


def _medial_curve(patient: Patient) -> Array:
    t = np.clip((table_rows() - patient.apex) / 0.33, 0.0, 1.0)
    return 0.27 - (0.27 - 0.085) * np.sqrt(1 - (1 - t) ** 2)


def start(canvas: Canvas, patient: Patient, exposure: Exposure, change: AnatomyChange) -> Scene:
    """Lungs, diaphragm and heart: everything that findings need to know before they are drawn."""
    scene = Scene(canvas, patient, exposure, change)
    bend = canvas.curve(patient.spine_bend * np.sin(table_rows() * 2.2))
    x = canvas.x - bend
    ax = np.abs(x)
    lateral = canvas.curve(wall_curve(patient))
    medial = canvas.curve(_medial_curve(patient))
    is_left = x > 0
    top = np.where(is_left, np.float32(scene.dome_height("left")), np.float32(scene.dome_height("right")))
    t = (ax - 0.34) * np.float32(1 / (patient.width - 0.34))
    outer, inner = np.clip(t, 0, 1.2), np.clip(-t, 0, 1.2)
    dome = top + 0.13 * outer**2 + 0.15 * outer**5 + 0.075 * inner**2
    scene.wall = lateral - ax
    scene.base = dome - canvas.y
    inside = canvas.edge(scene.wall) * canvas.edge(ax - medial, 0.02) * canvas.edge(scene.base, 0.008)
    depth = (1 - np.exp(-np.maximum(scene.wall, 0) * 11)) * 0.45 + 0.55
    depth *= 1 - 0.35 * np.exp(-np.maximum(ax - medial, 0) * 14)
    depth *= 1 - 0.16 * np.clip((-0.45 - canvas.y) * 3, 0, 1)
    scene.air = inside * depth
    left = is_left.astype(np.float32)
    scene.lung = {"right": inside * (1 - left), "left": inside * left}
    _heart(scene, x)
    return scene


def _heart(scene: Scene, x: Array) -> None:
    canvas, patient = scene.canvas, scene.patient
    size = patient.heart * scene.change.heart * (1.09 if scene.exposure.projection == "AP" else 1.0)
    lift = 0.5 * scene.exposure.inspiration
    floor = scene.dome_height("left")
    low = 0.5 * (floor + 0.52 - lift) - 0.245  # the heart rests on the diaphragm
    grow = size - 1.0
    ventricle = canvas.disc(0.105 + 0.12 * grow, low - 0.05 * grow, 0.36 * size, 0.235 * size**0.9, patient.heart_tilt)
    atrium = canvas.disc(-0.045 - 0.03 * grow, low - 0.02, 0.15 * size**1.2, 0.23 * size)
    scene.cardiac = np.maximum(ventricle, atrium)
    wide = scene.change.mediastinum
    trunk = canvas.disc(0.075 + 0.02 * grow, -0.10 - lift, 0.095 + 0.03 * grow, 0.13)
    knob = canvas.disc(0.088 + 0.7 * wide, -0.32, 0.088 * patient.knob, 0.085 * patient.knob)
    half = canvas.profile(
        (-1.2, -0.8, -0.55, -0.3, 0.0, 0.3, 0.7, 1.2), (0.10, 0.10, 0.115, 0.11, 0.115, 0.09, 0.08, 0.08)
    )
    flare = canvas.profile((-1.0, -0.72, -0.45, -0.1, 0.1), (0.1, 0.8, 1.0, 0.6, 0.0)) * np.float32(wide)
    band = 1 - ((x + 0.012) / (half + flare)) ** 2
    scene.mediastinum = np.maximum(band, knob) * (canvas.y < 0.1)
    thick = np.sqrt(np.clip(scene.cardiac, 0, 1)) ** 1.3
    round_ = np.sqrt(np.clip(np.maximum(trunk, knob), 0, 1))
    flat = np.sqrt(np.clip(band, 0, 1))
    thick *= 0.12 + 0.88 * canvas.edge(scene.base + 0.015, 0.05)  # below the dome it melts into the liver
    aorta = canvas.edge(0.125 + 0.3 * wide - x, 0.02) * canvas.edge(x, 0.05) * canvas.edge(canvas.y + 0.3, 0.03)
    scene.heart = (
        np.maximum(np.maximum(0.52 * thick, 0.31 * round_), min(0.10 + 6.0 * wide, 0.36) * flat)
        + 0.02 * flat
        + 0.05 * aorta
    )


def tissue(scene: Scene) -> Array:
    """Muscle, fat, abdomen and breasts, with the air of the lungs, trachea and stomach taken out."""
    canvas, patient = scene.canvas, scene.patient
    ax, y, girth = np.abs(canvas.x), canvas.y, patient.girth
    wall = 0.07 + 0.055 * girth
    chest = [patient.width + wall + more for more in (0.09, 0.03, 0.0, -0.01, 0.03)]
    half = canvas.profile(
        (-1.8, -1.02, -0.92, -0.84, -0.72, -0.6, -0.45, -0.2, 0.1, 0.5, 1.0, 1.6),
        (0.24, 0.25, 0.34, 0.58, 0.86, 0.98, 1.0, *chest),
    )
    reach = 1 - (ax / half) ** 2
    depth = canvas.profile((-1.5, -0.95, -0.7, -0.3, 0.2, 0.8, 1.5), (0.50, 0.50, 0.54, 0.66, 0.73, 0.84, 0.90))
    body = depth * np.clip(reach, 0, 1) ** 0.40 * (0.94 + 0.06 * girth)
    arm = 1 - ((ax - (1.06 + 0.06 * girth)) / 0.17) ** 2
    body = np.maximum(body, 0.45 * np.sqrt(np.clip(arm, 0, 1)) * canvas.edge(y + 0.62, 0.1))
    if patient.breast:
        for side in (-1, 1):
            fold = canvas.disc(side * 0.40, 0.18, 0.30, 0.30 * patient.breast + 0.10)
            body += 0.10 * patient.breast * np.sqrt(np.clip(fold, 0, 1)) * canvas.edge(y + 0.2, 0.5)
    below = canvas.edge(-scene.base, 0.01) * np.clip(reach * 3, 0, 1)
    body += 0.07 * below * (canvas.x < 0.1) + 0.03 * below
    if patient.gastric:
        dome = scene.dome_height("left")
        bubble = canvas.disc(0.30, dome + 0.12, 0.15 * patient.gastric, 0.065)
        body -= 0.17 * np.sqrt(np.clip(bubble, 0, 1))
    tube = np.abs(canvas.x - 0.004 + canvas.profile((-1, -0.5, -0.32, -0.2), (0.0, 0.0, 0.02, 0.0)))
    trachea = np.sqrt(np.clip(1 - (tube / 0.044) ** 2, 0, 1)) * canvas.edge(-0.235 - y, 0.02)
    return body - np.float32(AIR) * scene.air - 0.13 * trachea - _bronchi(canvas)


def _bronchi(canvas: Canvas) -> Array:
    out = 0.0
    for x, angle, length in ((-0.075, np.pi - 0.85, 0.10), (0.085, 0.55, 0.12)):
        out = out + 0.07 * np.sqrt(np.clip(canvas.disc(x, -0.17, length, 0.026, angle), 0, 1))
    return out


@lru_cache(maxsize=8)
def vessel_tree(seed: int) -> tuple[tuple[Array, Array, Array], ...]:
    """Branching vessels of both lungs: per generation points (n, 2), lengths (n,) and the height class (n,)."""
    rng = np.random.default_rng(seed)
    out = []
    fan = np.concatenate([np.linspace(-1.45, 1.35, 10) for _ in "rl"]) + rng.normal(0, 0.09, 20)
    side = np.repeat([-1.0, 1.0], 10)
    x, y, angle = side * 0.145, np.where(side > 0, -0.10, -0.06) + 0.05 * np.sin(fan), fan
    length = 0.19 + 0.05 * np.sin(angle) + rng.uniform(-0.03, 0.05, 20)
    for _ in range(4):
        bow = rng.normal(0, 0.5, len(x))
        t = (np.arange(28) + 0.5) / 28
        turn = angle[:, None] + bow[:, None] * (t - 0.5)
        px = x[:, None] + side[:, None] * np.cumsum(np.cos(turn), axis=1) * length[:, None] / 28
        py = y[:, None] + np.cumsum(np.sin(turn), axis=1) * length[:, None] / 28
        out.append(
            (np.stack([px.ravel(), py.ravel()], axis=1), np.repeat(length / 28, 28), np.tile(1 - 0.25 * t, len(x)))
        )
        spread = rng.uniform(0.22, 0.5, len(x))
        x, y, side = np.repeat(px[:, -1], 2), np.repeat(py[:, -1], 2), np.repeat(side, 2)
        angle = np.repeat(turn[:, -1], 2) + np.stack([spread, -spread], axis=1).ravel()
        length = np.repeat(length, 2) * rng.uniform(0.6, 0.9, len(x))
    return tuple(out)


VESSEL_WIDTH = (0.0130, 0.0085, 0.0055, 0.0042)
VESSEL_PEAK = (0.115, 0.085, 0.062, 0.042)


def vessels(scene: Scene) -> Array:
    """Pulmonary vessels tapering outwards, and the hila they come from."""
    canvas, wet = scene.canvas, scene.change.congestion
    layer = np.zeros_like(scene.air)
    for (points, lengths, taper), width, peak in zip(
        vessel_tree(scene.patient.vessel_seed), VESSEL_WIDTH, VESSEL_PEAK, strict=True
    ):
        # gravity: lower-zone vessels are wider, until congestion turns that round
        gravity = 1.0 + (0.35 - 0.9 * wet) * np.clip(points[:, 1] * 1.5, -1, 1) + 0.35 * wet
        width = width * (1 + 0.5 * wet)
        layer += scene.lines(points, lengths, width, peak * taper * gravity)
    hila = canvas.blobs(
        np.array([[-0.165, -0.05], [-0.185, 0.03], [0.165, -0.10], [0.175, -0.03]]), 0.042, 0.085 * (1 + 0.6 * wet)
    )
    return layer * scene.vessels * np.minimum(scene.air * 1.5, 1) + hila * (0.3 + 0.7 * scene.vessels)


def density(scene: Scene) -> Array:
    """Everything soft that lies in the beam of the frontal view."""
    return tissue(scene) + scene.heart * (1 - 0.7 * scene.solid) + vessels(scene) + scene.extra


@dataclass(frozen=True)
class RibFracture:
    """A broken rib: beyond `x` (distance from the midline) the rib near `y` is displaced by `shift` units."""

    side: float
    x: float
    y: float
    shift: float


def _band(distance: Array, half: float, canvas: Canvas) -> Array:
    """A tube of bone seen from the side: dense cortex at both edges, a paler marrow between."""
    inside = canvas.edge(half - distance, 0.010)
    return inside * (0.62 + 0.38 * np.minimum((distance / half) ** 2, 1.0))


def rib_offset(t: Array | float) -> Array | float:
    """How far a posterior rib has come down at `t` of its way from the spine (0) to the lateral wall (1)."""
    return -0.035 * np.sin(np.pi * np.clip(t * 1.6, 0, 1)) + 0.20 * t**2 + 0.13 * t**7


def ribs(scene: Scene, steps: tuple[RibFracture, ...] = ()) -> Array:
    """Posterior and anterior ribs; `steps` are fractures."""
    canvas, patient = scene.canvas, scene.patient
    ax, y = np.abs(canvas.x), canvas.y
    lateral = canvas.curve(wall_curve(patient)) + 0.012
    t = np.clip(ax / lateral, 0, 1.05)
    spacing, sit = patient.rib_spacing, patient.apex + 0.02 + patient.rib_phase * 0.04
    level = y - rib_offset(t)
    for step in steps:
        near = np.exp(-(((y - step.y) / (0.55 * spacing)) ** 2)) * (canvas.x * step.side > 0)
        level = level - near * step.shift * canvas.edge(ax - step.x, 0.004) * np.exp(-np.maximum(ax - step.x, 0) / 0.16)
    phase = (level - sit) / spacing
    half = 0.0265 + 0.004 * np.clip(-y, 0, 1)
    distance = np.abs(phase - np.round(phase)) * spacing
    keep = canvas.edge(lateral + 0.012 - ax, 0.02) * canvas.edge(ax - 0.075, 0.02) * (phase > -0.4)
    depth = 1.0 - 0.7 * np.clip((y - 0.40) * 3, 0, 1)
    layer = 0.125 * _band(distance, half, canvas) * keep * depth
    front = (y + 0.42 * t**1.3 - sit - 0.55 * spacing - 0.16) / spacing
    distance = np.abs(front - np.round(front)) * spacing
    costal = np.clip((t - 0.42) * 4.0, 0, 1) * (front > 0.4) * canvas.edge(0.55 - y, 0.25)
    layer += 0.065 * _band(distance, 0.032, canvas) * keep * costal
    rim = np.exp(-(((ax - lateral - 0.004) / 0.016) ** 2)) * (y > patient.apex + 0.1)
    return (layer + 0.065 * rim * depth) * patient.rib_density


def spine(scene: Scene) -> Array:
    """Vertebral column: discs, pedicles and spinous processes, better seen where nothing lies in front of it."""
    canvas, patient = scene.canvas, scene.patient
    x = canvas.x - patient.spine_bend * np.sin(canvas.y * 2.2)
    half = canvas.profile((-1.2, -0.8, 0.0, 1.2), (0.062, 0.070, 0.080, 0.098))
    height = 0.118
    phase = (canvas.y - 0.03) / height + 0.25 * canvas.y
    f = phase - np.round(phase)
    waist = half * (1 - 0.10 * np.cos(2 * np.pi * f))
    column = canvas.edge(waist - np.abs(x), 0.012)
    disc = np.exp(-(((np.abs(f) - 0.5) / 0.11) ** 2))
    layer = column * (0.085 - 0.06 * disc)
    pedicle = np.exp(-(((np.abs(x) - 0.72 * half) / 0.013) ** 2) - ((f + 0.12) / 0.16) ** 2)
    process = np.exp(-((x / 0.013) ** 2) - ((f - 0.22) / 0.17) ** 2)
    transverse = np.exp(-(((f + 0.1) * height / 0.020) ** 2)) * np.clip(1 - np.abs(np.abs(x) - half) / 0.055, 0, 1)
    return layer + 0.05 * pedicle + 0.05 * process + 0.028 * transverse


def girdle(scene: Scene) -> Array:
    """Clavicles, scapulae and humeral heads."""
    canvas, patient, bedside = scene.canvas, scene.patient, scene.exposure.projection == "AP"
    ax, y = np.abs(canvas.x), canvas.y
    rise = 0.06 if bedside else 0.0
    line = clavicle_line(ax, rise)
    thick = 0.025 + 0.014 * np.exp(-((ax - 0.06) ** 2) / 0.006)
    keep = canvas.edge(ax - 0.05, 0.01) * canvas.edge(0.80 - ax, 0.02)
    layer = 0.155 * canvas.edge(thick - np.abs(y - line), 0.008) * keep
    layer *= 0.68 + 0.32 * np.minimum((np.abs(y - line) / thick) ** 2, 1)
    inset = 0.10 if bedside else 0.0
    for side in (-1.0, 1.0):
        border = ((0.70, -0.60), (0.715, -0.35), (0.76, -0.02), (0.83, -0.20), (0.90, -0.52))
        layer = layer + scene.line([[side * (x - inset), y] for x, y in border], 0.009, 0.05)
    blade = canvas.edge(ax - 0.70 + inset - 0.08 * np.clip(y + 0.6, 0, 1), 0.02) * canvas.edge(-0.05 - y, 0.05)
    blade *= canvas.edge(0.90 - inset - ax - 0.18 * np.clip(y + 0.5, 0, 1), 0.02) * canvas.edge(y + 0.66, 0.03)
    head = 1 - ((ax - 0.945) / 0.105) ** 2 - ((y + 0.60) / 0.105) ** 2
    shaft = 1 - ((ax - 1.03 - 0.10 * (y + 0.5)) / 0.055) ** 2
    arm = np.maximum(np.clip(head, 0, 1), 0.75 * np.clip(shaft, 0, 1) * canvas.edge(y + 0.58, 0.02))
    return (layer + 0.045 * blade + 0.17 * np.sqrt(arm)) * (0.5 + 0.5 * patient.rib_density)


def clavicle_line(ax: Array, rise: float) -> Array:
    """y of the clavicle's axis at distance `ax` from the midline: a flat S."""
    s = np.clip((ax - 0.06) / 0.72, 0, 1)
    return -0.585 - rise - (0.13 + rise) * s - 0.030 * np.sin(2 * np.pi * s)


def skeleton(scene: Scene, steps: tuple[RibFracture, ...] = ()) -> Array:
    """All bone of the frontal view."""
    return ribs(scene, steps) + spine(scene) + girdle(scene)
