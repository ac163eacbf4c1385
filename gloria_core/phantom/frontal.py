"""The normal frontal chest radiograph: the sum of what lies in the beam, organ by organ."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from gloria_core.phantom.canvas import AIR, TABLE_ROWS, AnatomyChange, Array, Scene, clip01
from gloria_core.phantom.patient import Exposure, Patient


@lru_cache(maxsize=8)
def wall_curve(patient: Patient) -> Array:
    """Half-width of the rib cage for each table row: a dome over the apices, widest near the base."""
    y = TABLE_ROWS
    t = np.clip((y - patient.apex) / (0.62 - patient.apex), 0.0, 1.0)
    return 0.27 + (patient.width - 0.27) * np.sqrt(1 - (1 - t) ** 2.7) - 0.03 * clip01(y - 0.45)


def start(size: int, patient: Patient, exposure: Exposure, change: AnatomyChange) -> Scene:
    """Lungs, diaphragm and heart: everything that findings need to know before they are drawn."""
    scene = Scene(size, exposure.pose, patient, exposure, change)
    bend = scene.curve(patient.spine_bend * np.sin(TABLE_ROWS * 2.2))
    x = scene.x - bend
    ax = np.abs(x)
    lateral = scene.curve(wall_curve(patient))
    t = clip01((TABLE_ROWS - patient.apex) / 0.33)
    medial = scene.curve(0.27 - (0.27 - 0.085) * np.sqrt(1 - (1 - t) ** 2))
    is_left = x > 0
    top = np.where(is_left, np.float32(scene.dome_height("left")), np.float32(scene.dome_height("right")))
    t = (ax - 0.34) * np.float32(1 / (patient.width - 0.34))
    outer, inner = np.clip(t, 0, 1.2), np.clip(-t, 0, 1.2)
    dome = top + 0.13 * outer**2 + 0.15 * outer**5 + 0.075 * inner**2
    scene.wall = lateral - ax
    scene.base = dome - scene.y
    inside = scene.edge(scene.wall) * scene.edge(ax - medial, 0.02) * scene.edge(scene.base, 0.008)
    depth = (1 - np.exp(-np.maximum(scene.wall, 0) * 11)) * 0.45 + 0.55
    depth *= 1 - 0.35 * np.exp(-np.maximum(ax - medial, 0) * 14)
    depth *= 1 - 0.16 * clip01((-0.45 - scene.y) * 3)
    scene.air = inside * depth
    left = is_left.astype(np.float32)
    scene.lung = {"right": inside * (1 - left), "left": inside * left}
    _heart(scene, x)
    return scene


def _heart(scene: Scene, x: Array) -> None:
    patient = scene.patient
    size = patient.heart * scene.change.heart * (1.09 if scene.exposure.projection == "AP" else 1.0)
    lift = 0.5 * scene.exposure.inspiration
    low = 0.5 * (scene.dome_height("left") + 0.52 - lift) - 0.245  # the heart rests on the diaphragm
    grow = size - 1.0
    ventricle = scene.disc(0.105 + 0.12 * grow, low - 0.05 * grow, 0.36 * size, 0.235 * size**0.9, patient.heart_tilt)
    atrium = scene.disc(-0.045 - 0.03 * grow, low - 0.02, 0.15 * size**1.2, 0.23 * size)
    scene.cardiac = np.maximum(ventricle, atrium)
    wide = scene.change.mediastinum
    trunk = scene.disc(0.075 + 0.02 * grow, -0.10 - lift, 0.095 + 0.03 * grow, 0.13)
    knob = scene.disc(0.088 + 0.7 * wide, -0.32, 0.088 * patient.knob, 0.085 * patient.knob)
    heights = (-1.2, -0.8, -0.55, -0.3, 0.0, 0.3, 0.7, 1.2)
    half = scene.profile(heights, (0.10, 0.10, 0.115, 0.11, 0.115, 0.09, 0.08, 0.08))
    flare = scene.profile((-1.0, -0.72, -0.45, -0.1, 0.1), (0.1, 0.8, 1.0, 0.6, 0.0)) * np.float32(wide)
    band = 1 - ((x + 0.012) / (half + flare)) ** 2
    scene.mediastinum = np.maximum(band, knob) * (scene.y < 0.1)
    thick = np.sqrt(clip01(scene.cardiac)) ** 1.3
    round_ = np.sqrt(clip01(np.maximum(trunk, knob)))
    flat = np.sqrt(clip01(band))
    thick *= 0.12 + 0.88 * scene.edge(scene.base + 0.015, 0.05)  # below the dome it melts into the liver
    aorta = scene.edge(0.125 + 0.3 * wide - x, 0.02) * scene.edge(x, 0.05) * scene.edge(scene.y + 0.3, 0.03)
    nearest = np.maximum(np.maximum(0.52 * thick, 0.31 * round_), min(0.10 + 6.0 * wide, 0.36) * flat)
    scene.heart = nearest + 0.02 * flat + 0.05 * aorta


def tissue(scene: Scene) -> Array:
    """Muscle, fat, abdomen and breasts, with the air of the lungs, trachea and stomach taken out."""
    patient = scene.patient
    ax, y, girth = np.abs(scene.x), scene.y, patient.girth
    wall = 0.07 + 0.055 * girth
    chest = [patient.width + wall + more for more in (0.09, 0.03, 0.0, -0.01, 0.03)]
    heights = (-1.8, -1.02, -0.92, -0.84, -0.72, -0.6, -0.45, -0.2, 0.1, 0.5, 1.0, 1.6)
    half = scene.profile(heights, (0.24, 0.25, 0.34, 0.58, 0.86, 0.98, 1.0, *chest))
    reach = 1 - (ax / half) ** 2
    depth = scene.profile((-1.5, -0.95, -0.7, -0.3, 0.2, 0.8, 1.5), (0.50, 0.50, 0.54, 0.66, 0.73, 0.84, 0.90))
    body = depth * clip01(reach) ** 0.40 * (0.94 + 0.06 * girth)
    arm = 1 - ((ax - (1.06 + 0.06 * girth)) / 0.17) ** 2
    body = np.maximum(body, 0.45 * np.sqrt(clip01(arm)) * scene.edge(y + 0.62, 0.1))
    if patient.breast:
        for side in (-1, 1):
            fold = scene.disc(side * 0.40, 0.18, 0.30, 0.30 * patient.breast + 0.10)
            body += 0.10 * patient.breast * np.sqrt(clip01(fold)) * scene.edge(y + 0.2, 0.5)
    below = scene.edge(-scene.base, 0.01) * clip01(reach * 3)
    body += 0.07 * below * (scene.x < 0.1) + 0.03 * below
    if patient.gastric:
        bubble = scene.disc(0.30, scene.dome_height("left") + 0.12, 0.15 * patient.gastric, 0.065)
        body -= 0.17 * np.sqrt(clip01(bubble))
    tube = np.abs(scene.x - 0.004 + scene.profile((-1, -0.5, -0.32, -0.2), (0.0, 0.0, 0.02, 0.0)))
    trachea = np.sqrt(clip01(1 - (tube / 0.044) ** 2)) * scene.edge(-0.235 - y, 0.02)
    places = ((-0.075, np.pi - 0.85, 0.10), (0.085, 0.55, 0.12))
    bronchi = [0.07 * np.sqrt(clip01(scene.disc(x, -0.17, a, 0.026, angle))) for x, angle, a in places]
    return body - np.float32(AIR) * scene.air - 0.13 * trachea - (bronchi[0] + bronchi[1])


# Density of the vessels of each generation
VESSEL_PEAKS = (0.115, 0.085, 0.062, 0.042)


@lru_cache(maxsize=8)
def _branches(seed: int) -> tuple[tuple[Array, Array, Array], ...]:
    """Branching vessels of both lungs: per generation points (n, 2), lengths (n,) and the height class (n,)."""
    rng = np.random.default_rng(seed)
    out = []
    fan = np.concatenate([np.linspace(-1.45, 1.35, 10) for _ in "rl"]) + rng.normal(0, 0.09, 20)
    side = np.repeat([-1.0, 1.0], 10)
    x, y, angle = side * 0.145, np.where(side > 0, -0.10, -0.06) + 0.05 * np.sin(fan), fan
    length = 0.19 + 0.05 * np.sin(angle) + rng.uniform(-0.03, 0.05, 20)
    t = (np.arange(28) + 0.5) / 28
    for _ in range(4):
        bow = rng.normal(0, 0.5, len(x))
        turn = angle[:, None] + bow[:, None] * (t - 0.5)
        px = x[:, None] + side[:, None] * np.cumsum(np.cos(turn), axis=1) * length[:, None] / 28
        py = y[:, None] + np.cumsum(np.sin(turn), axis=1) * length[:, None] / 28
        points = np.stack([px.ravel(), py.ravel()], axis=1)
        out.append((points, np.repeat(length / 28, 28), np.tile(1 - 0.25 * t, len(x))))
        spread = rng.uniform(0.22, 0.5, len(x))
        x, y, side = np.repeat(px[:, -1], 2), np.repeat(py[:, -1], 2), np.repeat(side, 2)
        angle = np.repeat(turn[:, -1], 2) + np.stack([spread, -spread], axis=1).ravel()
        length = np.repeat(length, 2) * rng.uniform(0.6, 0.9, len(x))
    return tuple(out)


def vessel_tree(scene: Scene, peaks: Sequence[float], gain: Callable, turn: Callable) -> Array:
    """Pulmonary vessels tapering outwards; congestion widens them, and what fills the lung hides them.

    `turn` takes points of the frontal view to those of the view, `gain` is a factor on the density at these points.
    """
    layer = np.zeros_like(scene.air)
    widths = (0.0130, 0.0085, 0.0055, 0.0042)
    for (points, lengths, taper), width, peak in zip(_branches(scene.patient.vessel_seed), widths, peaks, strict=True):
        weight = lengths * (peak * taper * gain(points))
        layer += scene.strokes(turn(points), weight, width * (1 + 0.5 * scene.change.congestion))
    return layer * scene.vessels * np.minimum(scene.air * 1.5, 1)


def vessels(scene: Scene) -> Array:
    """Vessels and hila. Gravity: lower-zone vessels are wider, until congestion turns that round."""
    wet = scene.change.congestion

    def gain(points: Array) -> Array:
        return 1.0 + (0.35 - 0.9 * wet) * np.clip(points[:, 1] * 1.5, -1, 1) + 0.35 * wet

    layer = vessel_tree(scene, VESSEL_PEAKS, gain, lambda points: points)
    hila = np.array([[-0.165, -0.05], [-0.185, 0.03], [0.165, -0.10], [0.175, -0.03]])
    return layer + scene.blobs(hila, 0.042, 0.085 * (1 + 0.6 * wet)) * (0.3 + 0.7 * scene.vessels)


def density(scene: Scene) -> Array:
    """Everything that lies in the beam of the frontal view."""
    soft = tissue(scene) + scene.heart * (1 - 0.7 * scene.solid) + vessels(scene) + scene.extra
    return soft + (ribs(scene) + spine(scene) + girdle(scene))


def _band(distance: Array, half: float, scene: Scene) -> Array:
    """A tube of bone seen from the side: dense cortex at both edges, a paler marrow between."""
    inside = scene.edge(half - distance, 0.010)
    return inside * (0.62 + 0.38 * np.minimum((distance / half) ** 2, 1.0))


def rib_offset(t: Array | float) -> Array | float:
    """How far a posterior rib has come down at `t` of its way from the spine (0) to the lateral wall (1)."""
    return -0.035 * np.sin(np.pi * clip01(t * 1.6)) + 0.20 * t**2 + 0.13 * t**7


def ribs(scene: Scene) -> Array:
    """Posterior and anterior ribs, the broken ones displaced."""
    patient = scene.patient
    ax, y = np.abs(scene.x), scene.y
    lateral = scene.curve(wall_curve(patient)) + 0.012
    t = np.clip(ax / lateral, 0, 1.05)
    spacing, sit = patient.rib_spacing, patient.apex + 0.02 + patient.rib_phase * 0.04
    level = y - rib_offset(t)
    for side, x, at, shift in scene.broken_ribs:
        near = np.exp(-(((y - at) / (0.55 * spacing)) ** 2)) * (scene.x * side > 0)
        level = level - near * shift * scene.edge(ax - x, 0.004) * np.exp(-np.maximum(ax - x, 0) / 0.16)
    phase = (level - sit) / spacing
    half = 0.0265 + 0.004 * clip01(-y)
    distance = np.abs(phase - np.round(phase)) * spacing
    keep = scene.edge(lateral + 0.012 - ax, 0.02) * scene.edge(ax - 0.075, 0.02) * (phase > -0.4)
    depth = 1.0 - 0.7 * clip01((y - 0.40) * 3)
    layer = 0.125 * _band(distance, half, scene) * keep * depth
    front = (y + 0.42 * t**1.3 - sit - 0.55 * spacing - 0.16) / spacing
    distance = np.abs(front - np.round(front)) * spacing
    costal = clip01((t - 0.42) * 4.0) * (front > 0.4) * scene.edge(0.55 - y, 0.25)
    layer += 0.065 * _band(distance, 0.032, scene) * keep * costal
    rim = np.exp(-(((ax - lateral - 0.004) / 0.016) ** 2)) * (y > patient.apex + 0.1)
    return (layer + 0.065 * rim * depth) * patient.rib_density


def spine(scene: Scene) -> Array:
    """Vertebral column: discs, pedicles and spinous processes, better seen where nothing lies in front of it."""
    patient = scene.patient
    x = scene.x - patient.spine_bend * np.sin(scene.y * 2.2)
    half = scene.profile((-1.2, -0.8, 0.0, 1.2), (0.062, 0.070, 0.080, 0.098))
    height = 0.118
    phase = (scene.y - 0.03) / height + 0.25 * scene.y
    f = phase - np.round(phase)
    waist = half * (1 - 0.10 * np.cos(2 * np.pi * f))
    column = scene.edge(waist - np.abs(x), 0.012)
    disc = np.exp(-(((np.abs(f) - 0.5) / 0.11) ** 2))
    layer = column * (0.085 - 0.06 * disc)
    pedicle = np.exp(-(((np.abs(x) - 0.72 * half) / 0.013) ** 2) - ((f + 0.12) / 0.16) ** 2)
    process = np.exp(-((x / 0.013) ** 2) - ((f - 0.22) / 0.17) ** 2)
    transverse = np.exp(-(((f + 0.1) * height / 0.020) ** 2)) * clip01(1 - np.abs(np.abs(x) - half) / 0.055)
    return layer + 0.05 * pedicle + 0.05 * process + 0.028 * transverse


def girdle(scene: Scene) -> Array:
    """Clavicles, scapulae and humeral heads."""
    patient, bedside = scene.patient, scene.exposure.projection == "AP"
    ax, y = np.abs(scene.x), scene.y
    rise = 0.06 if bedside else 0.0
    line = clavicle_line(ax, rise)
    thick = 0.025 + 0.014 * np.exp(-((ax - 0.06) ** 2) / 0.006)
    keep = scene.edge(ax - 0.05, 0.01) * scene.edge(0.80 - ax, 0.02)
    layer = 0.155 * scene.edge(thick - np.abs(y - line), 0.008) * keep
    layer *= 0.68 + 0.32 * np.minimum((np.abs(y - line) / thick) ** 2, 1)
    inset = 0.10 if bedside else 0.0
    for side in (-1.0, 1.0):
        border = ((0.70, -0.60), (0.715, -0.35), (0.76, -0.02), (0.83, -0.20), (0.90, -0.52))
        layer = layer + scene.line([[side * (x - inset), y] for x, y in border], 0.009, 0.05)
    blade = scene.edge(ax - 0.70 + inset - 0.08 * clip01(y + 0.6), 0.02) * scene.edge(-0.05 - y, 0.05)
    blade *= scene.edge(0.90 - inset - ax - 0.18 * clip01(y + 0.5), 0.02) * scene.edge(y + 0.66, 0.03)
    head = 1 - ((ax - 0.945) / 0.105) ** 2 - ((y + 0.60) / 0.105) ** 2
    shaft = 1 - ((ax - 1.03 - 0.10 * (y + 0.5)) / 0.055) ** 2
    arm = np.maximum(clip01(head), 0.75 * clip01(shaft) * scene.edge(y + 0.58, 0.02))
    return (layer + 0.045 * blade + 0.17 * np.sqrt(arm)) * (0.5 + 0.5 * patient.rib_density)


def clavicle_line(ax: Array, rise: float) -> Array:
    """y of the clavicle's axis at distance `ax` from the midline: a flat S."""
    s = clip01((ax - 0.06) / 0.72)
    return -0.585 - rise - (0.13 + rise) * s - 0.030 * np.sin(2 * np.pi * s)
