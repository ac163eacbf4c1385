"""Findings between lung and chest wall on the frontal view: fluid, air and scars. Each returns its exact mask."""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.canvas import smooth_line, table_rows
from gloria_core.phantom.course import Finding
from gloria_core.phantom.frontal import wall_curve
from gloria_core.phantom.places import doubt
from gloria_core.phantom.scene import SIGN, Scene, dome_height, zone_height

Array = np.ndarray


def fluid(scene: Scene, finding: Finding) -> Array:
    """Pleural effusion: white below a meniscus that climbs the lateral wall and blunts the costophrenic angle."""
    mask = np.zeros(scene.air.shape, bool)
    for side in scene.sides(finding.side):
        rng = np.random.default_rng([finding.form, 17, side == "left"])
        volume = finding.severity * (rng.uniform(0.75, 1.1) if finding.side == "bilateral" else 1.0)
        top = dome_height(scene.patient, scene.shot, scene.change, side)
        level = top + 0.135 - 0.42 * volume**1.25
        climb = 0.13 + 0.16 * volume
        rise = climb * np.exp(-np.maximum(scene.wall, 0) / 0.085)
        rise += 0.25 * climb * np.exp(-np.maximum(np.abs(scene.canvas.x) - 0.10, 0) / 0.05)
        wet = scene.canvas.edge(scene.canvas.y - level + rise, 0.035) * scene.lung[side]
        opaque = (0.75 + 0.2 * finding.severity) * (0.6 if finding.uncertain else 1.0)
        scene.fill(wet * np.float32(opaque))
        scene.extra += wet * np.float32(0.06 * opaque)
        mask |= wet > 0.5
    return mask


def collapse(scene: Scene, finding: Finding) -> Array:
    """Pneumothorax: a thin pleural line with nothing but black, vessel-free air beyond it."""
    side = finding.side
    canvas, sign = scene.canvas, SIGN[side]
    gap = 0.070 + 0.22 * finding.severity**1.3
    y = table_rows()
    apex = scene.patient.apex
    fall = np.clip((y - apex) / (0.35 + 0.5 * finding.severity), 0, 1)
    inset = gap * (1 - fall) ** 0.8 + (0.02 * finding.severity) * (fall >= 1)
    roof = apex + gap * 1.15
    lung_edge = wall_curve(scene.patient) - inset
    lung_edge = np.where(y < roof, 0.0, 0.27 + (lung_edge - 0.27) * np.sqrt(np.clip((y - roof) / 0.12, 0, 1)))
    outside = canvas.edge(sign * canvas.x - canvas.curve(lung_edge)) * scene.lung[side]
    outside *= canvas.profile((-1.2, 0.2 + 0.3 * finding.severity, 0.35 + 0.3 * finding.severity), (1.0, 1.0, 0.0))
    rows = np.linspace(roof, min(0.1 + 0.5 * finding.severity, 0.5), 60)
    line = np.stack([sign * np.interp(rows, y, lung_edge), rows], axis=1)
    scene.vessels *= 1 - outside
    scene.extra -= outside * scene.air * np.float32(0.10 + 0.07 * finding.strength)
    collapsed = scene.lung[side] * (1 - outside)
    scene.extra += collapsed * np.float32(0.015 + 0.06 * finding.severity**1.5)
    points, lengths = smooth_line(line[::4])
    scene.extra += scene.lines(points, lengths, 0.0055, 0.18 + 0.10 * finding.strength) * scene.lung[side]
    return outside > 0.5


def thickening(scene: Scene, finding: Finding) -> Array:
    """Pleural thickening: a dense rind along the lateral wall of one zone, or a cap over the apex."""
    side = finding.side
    y, depth = scene.canvas.y, 0.035 + 0.035 * finding.severity
    if finding.kind == "cap":
        roof = scene.canvas.profile((-1.2, 1.2), (-1.2, 1.2)) - scene.patient.apex
        rind = scene.canvas.edge(depth * 2.6 - roof - 0.6 * np.maximum(0, 0.05 - scene.wall), 0.02)
    else:
        middle = zone_height(scene, finding.zone)
        rind = scene.canvas.edge(depth * np.exp(-(((y - middle) / 0.17) ** 4)) - scene.wall, 0.010)
    rind = rind * scene.lung[side]
    scene.fill(rind * np.float32((0.45 + 0.4 * finding.severity) * doubt(finding)))
    return rind > 0.5
