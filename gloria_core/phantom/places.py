"""Where a finding lies and how firmly it is drawn: what the painters share."""

from __future__ import annotations

import numpy as np

from gloria_core.phantom.canvas import table_rows
from gloria_core.phantom.course import Finding
from gloria_core.phantom.frontal import wall_curve
from gloria_core.phantom.scene import SIGN, Scene, zone_height

Array = np.ndarray


def half_width(scene: Scene, y: float) -> float:
    """Distance from the midline to the inner chest wall at height y."""
    return float(np.interp(y, table_rows(), wall_curve(scene.patient)))


def spot(scene: Scene, finding: Finding, side: str, inner: float, outer: float) -> tuple[float, float]:
    """A place in the finding's zone; `inner`..`outer` is its way from the hilum (0) to the wall (1)."""
    rng = np.random.default_rng([finding.form, side == "left"])
    y = zone_height(scene, finding.zone or "mid") + rng.uniform(-0.06, 0.06)
    wall = half_width(scene, y)
    hilum = 0.17 if finding.zone != "upper" else 0.12
    return SIGN[side] * (hilum + (wall - hilum) * rng.uniform(inner, outer)), y


def doubt(finding: Finding) -> float:
    """An uncertain finding is drawn faintly."""
    return 0.45 if finding.uncertain else 1.0


def mottle(scene: Scene, finding: Finding, spacing: float, sigma: float) -> Array:
    """A smooth random field around 0 that stays the same for the same finding."""
    rng = np.random.default_rng([finding.form, 7])
    n = int((1.8 / spacing) ** 2)
    points = rng.uniform(-0.9, 0.9, (n, 2))
    return scene.canvas.blobs(points, sigma, rng.normal(0, 0.55, n))
