"""Broken ribs and clavicles on the frontal view."""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.bones import Step, clavicle_line, rib_offset
from gloria_core.phantom.canvas import smooth_line
from gloria_core.phantom.course import Finding
from gloria_core.phantom.places import half_width
from gloria_core.phantom.scene import SIGN, Scene, zone_height

Array = np.ndarray


def fracture_step(scene: Scene, finding: Finding) -> Step:
    """Where the rib of a fracture breaks, in the coordinates of `bones.ribs`."""
    rng, patient = np.random.default_rng([finding.form, 23]), scene.patient
    goal = zone_height(scene, finding.zone)
    t = rng.uniform(0.62, 0.84)
    start = patient.apex + 0.02 + patient.rib_phase * 0.04
    rib = np.round((goal - rib_offset(t) - start) / patient.rib_spacing)
    y = float(start + rib * patient.rib_spacing + rib_offset(t))
    shift = 0.036 + 0.034 * finding.strength
    return Step(SIGN[finding.side], float(t * half_width(scene, y)), y, shift)


def broken(scene: Scene, finding: Finding) -> Array:
    """The fracture line and callus; the displaced rib itself is drawn by `bones.ribs`."""
    canvas = scene.canvas
    if finding.kind == "clavicle":
        sign, x = SIGN[finding.side], 0.36 + 0.1 * (finding.form % 100) / 100
        y = float(clavicle_line(np.float64(x), 0.06 if scene.shot.projection == "AP" else 0.0))
        line = [[sign * (x - 0.012), y - 0.05], [sign * (x + 0.012), y + 0.05]]
        scene.extra -= scene.lines(*smooth_line(line), 0.011, 0.13 + 0.06 * finding.strength)
        bit = [[sign * (x + 0.005), y + 0.045], [sign * (x + 0.12), y + 0.02]]
        scene.extra += scene.lines(*smooth_line(bit), 0.014, 0.12 * (0.5 + finding.strength))
        return canvas.disc(sign * (x + 0.045), y + 0.005, 0.105, 0.085) > 0
    step = fracture_step(scene, finding)
    x = step.side * step.x
    gap = [[x - 0.008 * step.side, step.y - 0.035], [x + 0.008 * step.side, step.y + 0.045]]
    scene.extra -= scene.lines(*smooth_line(gap), 0.008, 0.08 + 0.06 * finding.strength)
    scene.extra += canvas.blobs(np.array([[x, step.y + step.shift / 2]]), 0.030, 0.05 * finding.strength)
    return canvas.disc(x + 0.03 * step.side, step.y + step.shift / 2, 0.10, 0.075) > 0
