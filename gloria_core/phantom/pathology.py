"""Findings of lung and heart on the frontal view: each draws itself and returns its exact mask.

Every painter takes the scene and the finding and returns a bool mask (size, size). They are called in the order of
`ORDER`, so that fluid covers what lies in it.
"""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.canvas import smooth_line
from gloria_core.phantom.course import Finding
from gloria_core.phantom.fractures import broken
from gloria_core.phantom.places import doubt, half_width, mottle, spot
from gloria_core.phantom.pleura import collapse, fluid, thickening
from gloria_core.phantom.scene import SIGN, Scene, dome_height

Array = np.ndarray


def lobar(scene: Scene, finding: Finding) -> Array:
    """Consolidation: one dense homogeneous area, sharp along a fissure, with air bronchograms."""
    canvas, side = scene.canvas, finding.side
    sign, rng = SIGN[side], np.random.default_rng(finding.form)
    x, y = spot(scene, finding, side, 0.30, 0.55)
    reach = 0.16 + 0.13 * finding.severity
    edge = canvas.disc(x, y, reach * 1.3, reach * 1.1) + 0.75 * mottle(scene, finding, 0.13, 0.065)
    # the fissure: lower border of the upper zone, upper border of the middle and lower zones; the rest fades out
    along = sign * (canvas.x - x) / reach
    sag = (0.10 * rng.uniform(-0.5, 1.0) * along + 0.07 * rng.uniform(-1.0, 1.0) * along**2) * reach
    cut = canvas.y - sag - (y + (0.50 if finding.zone == "upper" else -0.45) * reach)
    plane = canvas.edge(-cut if finding.zone == "upper" else cut, 0.022)
    shape = np.clip(edge * 1.5 + 0.12, 0, 1) * plane * scene.lung[side]
    amount = shape * np.float32((0.55 + 0.38 * finding.severity) * doubt(finding))
    amount *= 1 - np.minimum(_bronchogram(scene, rng, (x, y), sign, reach), 0.45) * shape
    scene.fill(amount)
    return shape > 0.40


def _bronchogram(
    scene: Scene, rng: np.random.Generator, centre: tuple[float, float], sign: float, reach: float
) -> Array:
    """Air-filled bronchi that branch from the hilum into a consolidation."""
    goal, hilum = np.array(centre), np.array([sign * 0.15, -0.05])
    away = goal - hilum
    away = away / max(np.hypot(*away), 1e-6)
    fork = goal - 0.45 * reach * away
    air = scene.lines(*smooth_line([hilum, (hilum + fork) / 2 + rng.normal(0, 0.02, 2), fork]), 0.0085, 0.30)
    for bend in np.array([-0.75, -0.2, 0.5]) + rng.normal(0, 0.18, 3):
        turn = np.array([[np.cos(bend), -np.sin(bend)], [np.sin(bend), np.cos(bend)]])
        tip = fork + turn @ away * reach * rng.uniform(0.6, 1.0)
        middle = (fork + tip) / 2 + rng.normal(0, 0.018, 2)
        air += scene.lines(*smooth_line([fork, middle, tip]), 0.0062, 0.26)
    return air


def patchy(scene: Scene, finding: Finding) -> Array:
    """Pneumonia: several ill-defined fluffy patches that run into each other."""
    total = np.zeros_like(scene.air)
    for side in scene.sides(finding.side):
        rng = np.random.default_rng([finding.form, 3, side == "left"])
        x, y = spot(scene, finding, side, 0.40, 0.62)
        n = 7 + int(6 * finding.severity)
        points = np.array([x, y]) + rng.normal(0, 1, (n, 2)) * (0.085, 0.10)
        cloud = scene.canvas.blobs(points, rng.uniform(0.018, 0.042, n), rng.uniform(0.35, 0.8, n))
        total += cloud * scene.lung[side]
    amount = (1 - np.exp(-1.15 * total)) * np.float32((0.42 + 0.5 * finding.severity) * doubt(finding))
    scene.fill(amount)
    return total > 0.24


def hazy(scene: Scene, finding: Finding) -> Array:
    """A faint veil without structure (ground glass): vessels stay visible through it."""
    side = finding.side
    x, y = spot(scene, finding, side, 0.40, 0.60)
    size = 0.16 + 0.07 * finding.severity
    cloud = np.clip(scene.canvas.disc(x, y, size * 1.1, size * 1.25) + 0.25 * mottle(scene, finding, 0.3, 0.13), 0, 1)
    cloud = np.sqrt(cloud) * scene.lung[side]
    scene.extra += cloud * scene.air * np.float32((0.12 + 0.12 * finding.severity) * doubt(finding))
    return cloud > 0.35


def haze(scene: Scene, finding: Finding) -> Array:
    """Edema: perihilar bat wings, thick blurred vessels, Kerley B lines at the bases."""
    canvas = scene.canvas
    rng = np.random.default_rng(finding.form)
    wings = np.zeros_like(scene.air)
    for side, sign in SIGN.items():
        at = np.array([[0.25, -0.20], [0.30, -0.04], [0.29, 0.10], [0.22, 0.20]]) * (sign, 1)
        at = at + rng.normal(0, 0.02, at.shape)
        wings += canvas.blobs(at, 0.10 + 0.035 * finding.severity, 0.62) * scene.lung[side]
    wings = 1 - np.exp(-1.3 * wings)
    texture = 1 + 0.35 * mottle(scene, finding, 0.085, 0.030)
    amount = wings * texture * np.float32((0.20 + 0.42 * finding.severity) * doubt(finding))
    scene.extra += amount * scene.air * np.float32(0.6)
    kerley = np.zeros_like(scene.air)
    for sign in SIGN.values():
        for y in np.arange(0.06, 0.42, 0.036) + rng.normal(0, 0.006, 11)[:10]:
            wall = half_width(scene, y)
            ends = [[sign * (wall - 0.012), y], [sign * (wall - 0.012 - rng.uniform(0.045, 0.085)), y + 0.004]]
            kerley += scene.lines(*smooth_line(ends), 0.0042, 0.16 * finding.strength)
    scene.extra += kerley * scene.air
    lungs = np.maximum(scene.lung["left"], scene.lung["right"])
    return (wings > 0.36) & (lungs > 0.5)


def plate(scene: Scene, finding: Finding) -> Array:
    """Plate-like atelectasis: one to three thin, nearly horizontal dense bands."""
    mask = np.zeros(scene.air.shape, bool)
    for side in scene.sides(finding.side):
        sign, rng = SIGN[side], np.random.default_rng([finding.form, 11, side == "left"])
        x, y = spot(scene, finding, side, 0.42, 0.58)
        keep = scene.lung[side]
        for k in range(1 + int(2.4 * finding.severity)):
            length, tilt = rng.uniform(0.15, 0.21) + 0.05 * finding.severity, sign * rng.uniform(-0.05, 0.30)
            yk = y + 0.085 * (k - 0.5 * int(2.4 * finding.severity)) + rng.normal(0, 0.008)
            knots = [[x - length, yk - tilt * length], [x, yk - 0.012], [x + length, yk + tilt * length]]
            points, lengths = smooth_line(knots)
            width = 0.0145 + 0.007 * rng.random()
            band = scene.lines(points, lengths, width, 1.0) * keep
            scene.extra += band * scene.air * np.float32((0.21 + 0.17 * finding.severity) * doubt(finding))
            mask |= band > 0.30
    return mask


def basal(scene: Scene, finding: Finding) -> Array:
    """Basal atelectasis: a raised diaphragm with a crowded, streaky dense stripe above it."""
    total = np.zeros_like(scene.air)
    lifted = np.zeros(scene.air.shape, bool)
    height = 0.10 + 0.08 * finding.severity
    for side in scene.sides(finding.side):
        rng = np.random.default_rng([finding.form, 13, side == "left"])
        # what the raised diaphragm has taken from the lung belongs to the finding, too
        strip = (scene.base < 0) & (scene.base > -scene.change.raised[side]) & (scene.wall > 0)
        lifted |= strip & (scene.canvas.x * SIGN[side] > 0.09)
        near = np.clip(1.15 - scene.base / height, 0, 1) * np.clip((scene.wall - 0.02) / 0.10, 0, 1)
        streaks = np.zeros_like(near)
        for k in range(4):
            x0, drop = rng.uniform(0.16, 0.42), rng.uniform(0.015, 0.05) + 0.028 * k
            top = dome_height(scene.patient, scene.shot, scene.change, side) - drop
            reach, tilt = rng.uniform(0.13, 0.24), rng.normal(0.03, 0.05)
            ends = np.array(
                [[x0, top], [x0 + reach / 2, top + tilt / 2 + rng.normal(0, 0.008)], [x0 + reach, top + tilt]]
            )
            streaks += scene.lines(*smooth_line(ends * (SIGN[side], 1)), rng.uniform(0.008, 0.014), 0.38)
        total += (0.62 * near + streaks * (near > 0.02)) * scene.lung[side]
    scene.fill(np.minimum(total, 1.1) * np.float32((0.40 + 0.42 * finding.severity) * doubt(finding)))
    return (total > 0.22) | lifted


def lump(scene: Scene, finding: Finding) -> Array:
    """Nodule or mass: a round, slightly lobulated shadow with its own border."""
    side, rng = finding.side, np.random.default_rng([finding.form, 19])
    x, y = spot(scene, finding, side, 0.30, 0.72)
    small, large = (0.038, 0.062) if finding.kind == "nodule" else (0.085, 0.140)
    radius = small + (large - small) * finding.severity
    shape = scene.canvas.disc(x, y, radius, radius * rng.uniform(0.85, 1.1), rng.uniform(0, 3))
    for _ in range(3):
        a = rng.uniform(0, 2 * np.pi)
        dx, dy = 0.45 * radius * np.cos(a), 0.45 * radius * np.sin(a)
        shape = np.maximum(shape, 0.9 * scene.canvas.disc(x + dx, y + dy, 0.72 * radius))
    shape = np.clip(shape, 0, 1) ** 0.45 * (scene.membership(side) > 0.02)
    amount = (0.23 + 0.13 * finding.severity + (0.05 if finding.kind == "mass" else 0.0)) * doubt(finding)
    scene.extra += shape * np.float32(amount)
    return shape > 0.35


def silhouette(scene: Scene, finding: Finding) -> Array:
    """The heart of a cardiomegaly: it was drawn large with the anatomy, this only says where it is."""
    return (scene.cardiac > 0) & (scene.base > -0.05)


def wide(scene: Scene, finding: Finding) -> Array:
    """The widened upper mediastinum."""
    return (scene.mediastinum > 0) & (scene.canvas.y > -0.72) & (scene.canvas.y < 0.02)


ORDER = {
    "collapse": collapse, "haze": haze, "hazy": hazy, "patchy": patchy, "lobar": lobar, "nodule": lump, "mass": lump,
    "plate": plate, "basal": basal, "thickening": thickening, "cap": thickening, "fluid": fluid, "rib": broken,
    "clavicle": broken, "heart": silhouette, "wide": wide,
}  # fmt: skip
