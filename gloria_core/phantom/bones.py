"""Ribs, spine, clavicles, scapulae and arms of the frontal view.

All posterior ribs share one warped coordinate, the rib phase, so that a whole cage costs as much as one rib.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gloria_core.phantom.canvas import Canvas, smooth_line
from gloria_core.phantom.frontal import wall_curve
from gloria_core.phantom.scene import Scene

Array = np.ndarray


@dataclass(frozen=True)
class Step:
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


def ribs(scene: Scene, steps: tuple[Step, ...] = ()) -> Array:
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
    canvas, patient, bedside = scene.canvas, scene.patient, scene.shot.projection == "AP"
    ax, y = np.abs(canvas.x), canvas.y
    rise = 0.06 if bedside else 0.0
    line = clavicle_line(ax, rise)
    thick = 0.025 + 0.014 * np.exp(-((ax - 0.06) ** 2) / 0.006)
    keep = canvas.edge(ax - 0.05, 0.01) * canvas.edge(0.80 - ax, 0.02)
    layer = 0.155 * canvas.edge(thick - np.abs(y - line), 0.008) * keep
    layer *= 0.68 + 0.32 * np.minimum((np.abs(y - line) / thick) ** 2, 1)
    inset = 0.10 if bedside else 0.0
    for side in (-1.0, 1.0):
        edge, lengths = smooth_line(
            [
                [side * (0.70 - inset), -0.60],
                [side * (0.715 - inset), -0.35],
                [side * (0.76 - inset), -0.02],
                [side * (0.83 - inset), -0.20],
                [side * (0.90 - inset), -0.52],
            ]
        )
        layer = layer + scene.lines(edge, lengths, 0.009, 0.05)
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


def skeleton(scene: Scene, steps: tuple[Step, ...] = ()) -> Array:
    """All bone of the frontal view."""
    return ribs(scene, steps) + spine(scene) + girdle(scene)
