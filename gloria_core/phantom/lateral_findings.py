"""Findings and devices on the lateral view, where they can be seen there; the frontal height is kept."""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.canvas import smooth_line
from gloria_core.phantom.course import Finding
from gloria_core.phantom.lateral import lung_dome
from gloria_core.phantom.places import mottle
from gloria_core.phantom.scene import Scene, zone_height

Array = np.ndarray


def _spot(scene: Scene, finding: Finding) -> tuple[float, float]:
    rng = np.random.default_rng([finding.form, 31])
    y = zone_height(scene, finding.zone or "mid") + rng.uniform(-0.05, 0.05)
    depth = finding.depth * 0.30
    if finding.zone == "lower":  # the lower lobes lie behind
        depth = 0.10 + 0.18 * abs(finding.depth)
    elif finding.zone == "mid":
        depth = -0.22 + 0.15 * finding.depth
    return 0.06 + depth, y


def _half(scene: Scene, finding: Finding, amount: Array) -> Array:
    """Fill one of the two superimposed lungs (or both)."""
    share = 1.0 if finding.side in ("bilateral", "") else 0.62
    scene.fill(amount * np.float32(share))
    return amount


def _cloud(scene: Scene, finding: Finding, n: int, spread: float, sigma: float, gain: float) -> Array:
    rng = np.random.default_rng([finding.form, 37])
    points = np.array(_spot(scene, finding)) + rng.normal(0, spread, (n, 2))
    cloud = scene.canvas.blobs(points, sigma * rng.uniform(0.7, 1.4, n), gain)
    return (1 - np.exp(-cloud)) * scene.membership(finding.side or "bilateral")


def lobar(scene: Scene, finding: Finding) -> Array:
    """Consolidation, sharp along the oblique fissure."""
    x, y = _spot(scene, finding)
    reach = 0.17 + 0.12 * finding.severity
    shape = np.clip(scene.canvas.disc(x, y, reach * 1.2, reach) * 2.6, 0, 1) * scene.membership(finding.side)
    fissure = (scene.canvas.x - x) * 0.75 - (scene.canvas.y - y) * 0.66 + 0.5 * reach
    shape *= scene.canvas.edge(-fissure if finding.zone == "upper" else fissure, 0.01)
    _half(scene, finding, shape * (0.45 + 0.5 * finding.strength))
    return shape > 0.45


def patchy(scene: Scene, finding: Finding) -> Array:
    """Pneumonia: fluffy patches."""
    cloud = _cloud(scene, finding, 9, 0.09, 0.032, 0.9)
    _half(scene, finding, cloud * (0.45 + 0.5 * finding.strength))
    return cloud > 0.30


def hazy(scene: Scene, finding: Finding) -> Array:
    """A structureless veil."""
    cloud = _cloud(scene, finding, 4, 0.05, 0.13, 0.6)
    scene.extra += cloud * scene.air * np.float32(0.10 + 0.13 * finding.strength)
    return cloud > 0.35


def haze(scene: Scene, finding: Finding) -> Array:
    """Edema: haze around the hila and thick fissures."""
    points = np.array([[0.00, -0.20], [0.17, -0.10], [0.20, 0.08], [0.06, 0.14], [-0.14, -0.02]])
    wings = scene.canvas.blobs(points, 0.095 + 0.03 * finding.severity, 0.6) * scene.membership("bilateral")
    wings = 1 - np.exp(-1.3 * wings)
    texture = 1 + 0.35 * mottle(scene, finding, 0.085, 0.030)
    scene.extra += wings * scene.air * np.float32(0.16 + 0.26 * finding.strength) * texture
    line = smooth_line([[0.33, -0.38], [0.08, 0.02], [-0.25, 0.40]])
    scene.extra += scene.lines(*line, 0.006, 0.06 + 0.08 * finding.strength) * scene.air
    return wings > 0.36


def plate(scene: Scene, finding: Finding) -> Array:
    """Plate-like atelectasis: bands."""
    x, y = _spot(scene, finding)
    mask = np.zeros(scene.air.shape, bool)
    for k in range(1 + int(2.4 * finding.severity)):
        yk = y + 0.07 * k
        points, lengths = smooth_line([[x - 0.17, yk + 0.03], [x, yk - 0.01], [x + 0.17, yk - 0.02]])
        band = scene.lines(points, lengths, 0.012, 1.0) * scene.membership(finding.side)
        scene.extra += band * scene.air * np.float32(0.12 + 0.16 * finding.strength)
        mask |= band > 0.3
    return mask


def basal(scene: Scene, finding: Finding) -> Array:
    """Basal volume loss above the posterior diaphragm."""
    side = finding.side if finding.side != "bilateral" else "right"
    above = lung_dome(scene, side, scene.canvas.x) - scene.canvas.y
    near = np.clip(1.1 - above / (0.10 + 0.08 * finding.severity), 0, 1) * scene.membership(finding.side)
    near = near * scene.canvas.edge(scene.canvas.x + 0.05, 0.2)
    _half(scene, finding, near * (0.3 + 0.5 * finding.strength))
    return near > 0.25


def fluid(scene: Scene, finding: Finding) -> Array:
    """Pleural effusion: the posterior sulcus fills first, with a meniscus along the back wall."""
    x, y = scene.canvas.x, scene.canvas.y
    level = 0.80 - scene.shot.inspiration - 0.55 * finding.severity**1.1
    rise = (0.12 + 0.10 * finding.severity) * np.exp(-np.maximum(scene.wall, 0) / 0.10)
    wet = scene.canvas.edge(y - level + rise, 0.03) * scene.membership(finding.side)
    if finding.severity < 0.7:
        wet = wet * scene.canvas.edge(x - 0.05, 0.15)
    _half(scene, finding, wet * np.float32(0.6 + 0.4 * finding.strength))
    return wet > 0.5


def lump(scene: Scene, finding: Finding) -> Array:
    """Nodule or mass."""
    x, y = _spot(scene, finding)
    small, large = (0.038, 0.062) if finding.kind == "nodule" else (0.085, 0.140)
    shape = np.clip(scene.canvas.disc(x, y, small + (large - small) * finding.severity), 0, 1) ** 0.45
    shape = shape * (scene.membership(finding.side) > 0.02)
    scene.extra += shape * np.float32(0.14 + 0.12 * finding.strength)
    return shape > 0.35


def silhouette(scene: Scene, finding: Finding) -> Array:
    """The heart."""
    return scene.cardiac > 0


def wide(scene: Scene, finding: Finding) -> Array:
    """The widened upper mediastinum, filling the space behind the sternum."""
    return scene.mediastinum > 0.1


def _wire(scene: Scene, knots: list, width: float, peak: float) -> Array:
    points, lengths = smooth_line(knots)
    scene.extra += scene.lines(points, lengths, width, peak)
    return scene.lines(points, lengths, max(2.2 * width, 1.6 / scene.canvas.unit), 1.0) > 0.42


def tracheal(scene: Scene, finding: Finding) -> Array:
    """Endotracheal tube."""
    return _wire(scene, [[0.0, -1.2], [0.02, -0.8], [0.065, -0.40]], 0.018, 0.13)


def gastric(scene: Scene, finding: Finding) -> Array:
    """Enteric tube behind the heart."""
    return _wire(scene, [[0.05, -1.2], [0.12, -0.6], [0.19, 0.0], [0.13, 0.45], [0.0, 0.66]], 0.0095, 0.20)


def venous(scene: Scene, finding: Finding) -> Array:
    """Central venous catheter."""
    return _wire(scene, [[-0.12, -1.0], [-0.06, -0.6], [-0.03, -0.3], [-0.03, 0.0]], 0.0085, 0.20)


def pacer(scene: Scene, finding: Finding) -> Array:
    """Pacemaker box edge-on in the front wall, leads into the heart."""
    box = scene.canvas.edge(scene.canvas.disc(-0.44, -0.50, 0.045, 0.12, -0.5) * 0.04, 0.004)
    scene.extra += 0.45 * box
    vena = [[-0.36, -0.56], [-0.16, -0.64], [-0.04, -0.45], [-0.02, -0.10]]
    mask = (box > 0.5) | _wire(scene, [*vena, [-0.10, 0.10], [-0.18, 0.06]], 0.0075, 0.26)
    return mask | _wire(scene, [*vena, [-0.10, 0.25], [-0.38, 0.33]], 0.0075, 0.26)


def wires(scene: Scene, finding: Finding) -> Array:
    """Sternotomy wires along the sternum."""
    mask = np.zeros(scene.air.shape, bool)
    for y in np.linspace(-0.50, 0.18, 6):
        x = float(np.interp(y, (-0.66, -0.30, 0.10, 0.45), (-0.32, -0.48, -0.59, -0.62)))
        mask |= _wire(scene, [[x - 0.02, y], [x, y - 0.015], [x + 0.02, y]], 0.007, 0.26)
    return mask


PAINT = {
    "haze": haze, "hazy": hazy, "patchy": patchy, "lobar": lobar, "nodule": lump, "mass": lump, "plate": plate,
    "basal": basal, "fluid": fluid, "heart": silhouette, "wide": wide, "tracheal": tracheal, "gastric": gastric,
    "venous": venous, "pacer": pacer, "wires": wires,
}  # fmt: skip
"""Pneumothorax, pleural rinds, fractures, chest tubes and ECG leads are not drawn from the side."""
