"""Support devices on the frontal view: tubes, lines, leads and boxes, each with the mask of what is seen of it."""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.canvas import polyline, smooth_line
from gloria_core.phantom.course import Finding
from gloria_core.phantom.scene import SIGN, Scene, dome_height

Array = np.ndarray


def _wire(scene: Scene, knots: list, width: float, peak: float, *, hollow: float = 0.0) -> Array:
    """Draw a tube or wire and return its mask, a little wider than the wire itself."""
    points, lengths = smooth_line(knots)
    layer = scene.lines(points, lengths, width, peak)
    if hollow:  # two walls and a lumen
        layer = layer - scene.lines(points, lengths, width * 0.55, peak * hollow)
    scene.extra += layer
    reach = max(2.2 * width, 1.6 / scene.canvas.unit)
    return scene.lines(points, lengths, reach, 1.0) > 0.42


def tracheal(scene: Scene, finding: Finding) -> Array:
    """Endotracheal tube, its tip above the carina."""
    tip = -0.36 + 0.05 * (finding.form % 97) / 97
    return _wire(scene, [[0.010, -1.25], [0.004, -0.9], [-0.004, -0.62], [0.0, tip]], 0.020, 0.24, hollow=0.55)


def gastric(scene: Scene, finding: Finding) -> Array:
    """Enteric tube through the mediastinum into the stomach."""
    low = dome_height(scene.patient, scene.shot, scene.change, "left")
    knots = [
        [-0.015, -1.25],
        [-0.02, -0.7],
        [-0.005, -0.2],
        [0.02, 0.25],
        [0.07, low + 0.02],
        [0.20, low + 0.13],
        [0.34, low + 0.12],
    ]
    return _wire(scene, knots, 0.0095, 0.24)


def venous(scene: Scene, finding: Finding) -> Array:
    """Central venous catheter from the neck or under the clavicle to the superior vena cava."""
    sign, tip = SIGN[finding.side], 0.02 + 0.10 * ((finding.form >> 8) % 97) / 97
    if finding.form % 2:
        start = [[sign * 0.26, -1.2], [sign * 0.19, -0.85], [sign * 0.13, -0.62]]
    else:
        start = [[sign * 0.72, -0.50], [sign * 0.46, -0.60], [sign * 0.20, -0.57]]
    cross = [[-0.02, -0.48]] if finding.side == "left" else []
    return _wire(scene, [*start, *cross, [-0.105, -0.36], [-0.115, -0.15], [-0.112, tip]], 0.0085, 0.25)


def drain(scene: Scene, finding: Finding) -> Array:
    """Chest tube through the lateral wall towards the apex."""
    sign = SIGN[finding.side]
    knots = [[sign * 1.05, 0.34], [sign * 0.76, 0.22], [sign * 0.60, 0.05], [sign * 0.52, -0.25], [sign * 0.40, -0.52]]
    return _wire(scene, knots, 0.015, 0.24, hollow=0.45)


def pacer(scene: Scene, finding: Finding) -> Array:
    """Pacemaker: a box below the clavicle and two leads to the right atrium and ventricle."""
    canvas, sign = scene.canvas, SIGN[finding.side]
    x, y = sign * 0.55, -0.43
    box = np.maximum(canvas.disc(x, y, 0.125, 0.10), canvas.disc(x, y + 0.015, 0.112, 0.10))
    box = canvas.edge(box * 0.06, 0.004)
    inner = canvas.edge(canvas.disc(x, y + 0.025, 0.085, 0.06) * 0.04, 0.006)
    scene.extra += 0.52 * box + 0.16 * inner
    top = [[x - sign * 0.04, y - 0.11], [sign * 0.38, -0.62], [sign * 0.17, -0.57]]
    cross = [[-0.01, -0.50]] if finding.side == "left" else []
    vena = [*top, *cross, [-0.10, -0.36], [-0.115, -0.10]]
    mask = box > 0.5
    mask |= _wire(scene, [*vena, [-0.13, 0.08], [-0.09, 0.17], [-0.05, 0.10]], 0.0065, 0.22)
    return mask | _wire(scene, [*vena, [-0.08, 0.20], [0.08, 0.33], [0.25, 0.36]], 0.0065, 0.22)


def wires(scene: Scene, finding: Finding) -> Array:
    """Sternotomy wires: a column of small loops in the midline."""
    mask = np.zeros(scene.air.shape, bool)
    rng = np.random.default_rng(finding.form)
    for y in np.linspace(-0.45, 0.25, 6):
        tilt = rng.normal(0, 0.008)
        loop = [(-0.045, y), (0.0, y - 0.020 + tilt), (0.045, y), (0.0, y + 0.020 - tilt), (-0.045, y)]
        points, lengths = polyline(loop)
        scene.extra += scene.lines(points, lengths, 0.0065, 0.26)
        mask |= scene.canvas.disc(0, y, 0.065, 0.045) > 0
    return mask


def leads(scene: Scene, finding: Finding) -> Array:
    """ECG electrodes and their cables, lying on the skin."""
    rng = np.random.default_rng(finding.form)
    mask = np.zeros(scene.air.shape, bool)
    ends = np.array([[-0.58, -0.55], [0.60, -0.52], [-0.56, 0.46], [0.58, 0.40], [0.20, 0.10]]) + rng.normal(
        0, 0.04, (5, 2)
    )
    for k in np.flatnonzero(rng.random(5) < 0.85):
        x, y = ends[k]
        disc = scene.canvas.edge(scene.canvas.disc(x, y, 0.028) * 0.014, 0.004)
        scene.extra += 0.30 * disc
        mask |= scene.canvas.disc(x, y, 0.045) > 0
        far = [x * 1.2 + rng.normal(0, 0.1), 1.2]
        mask |= _wire(
            scene, [[x, y], [x * 1.12, y + 0.16], [(x + far[0]) / 2 + rng.normal(0, 0.06), 0.75], far], 0.0055, 0.20
        )
    return mask


DRAW = {
    "tracheal": tracheal, "gastric": gastric, "venous": venous, "drain": drain, "pacer": pacer, "wires": wires,
    "leads": leads,
}  # fmt: skip
