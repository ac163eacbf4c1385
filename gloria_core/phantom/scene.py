"""A picture under construction: what lets the beam through, what holds it back, and where a finding may be put."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gloria_core.phantom.canvas import Canvas
from gloria_core.phantom.patient import Patient, Shot

Array = np.ndarray
AIR = 0.60
"""What a full depth of lung takes away from the density of the chest (display density 1 is white)."""
SIGN = {"right": -1.0, "left": 1.0}
"""On a frontal view the patient's right is on the image's left."""


@dataclass
class Change:
    """What findings do to the anatomy before it is drawn."""

    heart: float = 1.0  # factor on heart size
    mediastinum: float = 0.0  # extra half-width of the upper mediastinum
    raised: dict[str, float] = field(default_factory=lambda: {"right": 0.0, "left": 0.0})
    congestion: float = 0.0  # vessel blurring and upper-lobe diversion


@dataclass
class Scene:
    """The layers of one view.

    Shape: all layers (size, size) float32. `air` is the depth of aerated lung, 0..1; `lung` a soft lung membership
    for each side; `extra` density that findings and devices add; `vessels` a gain on the vessel layer; `wall` the
    distance to the inner chest wall; `base` the distance above the diaphragm (units); `solid` how much of the lung is
    filled, which makes the heart's border vanish there.
    """

    canvas: Canvas
    patient: Patient
    shot: Shot
    change: Change
    view: str = "frontal"
    air: Array | None = None
    lung: dict[str, Array] = field(default_factory=dict)
    heart: Array | None = None
    cardiac: Array | None = None
    mediastinum: Array | None = None
    wall: Array | None = None
    base: Array | None = None
    extra: Array | None = None
    vessels: Array | None = None
    solid: Array | None = None

    def fill(self, amount: Array) -> None:
        """Replace air by fluid or cells where `amount` (0..1) says, and hide the vessels there."""
        # what is filled already has no air left to lose
        self.extra += np.maximum(amount - self.solid, 0) * self.air * np.float32(AIR)
        self.solid = np.maximum(self.solid, np.minimum(amount, 1.0))
        self.vessels *= 1.0 - 0.85 * np.minimum(amount, 1.0)

    def sides(self, side: str) -> list[str]:
        """The lungs that a finding's side names."""
        return ["right", "left"] if side == "bilateral" else [side]

    def membership(self, side: str) -> Array:
        """Lung membership of one side or both."""
        names = self.sides(side)
        return self.lung[names[0]] if len(names) == 1 else np.maximum(self.lung["right"], self.lung["left"])

    def lines(self, points: Array, lengths: Array, width: float, peak: Array | float) -> Array:
        """A wire or vessel: Gaussian profile of `width` (its sigma) and `peak` density."""
        return self.canvas.strokes(points, lengths * peak, width)


def dome_height(patient: Patient, shot: Shot, change: Change, side: str) -> float:
    """y of the top of one hemidiaphragm."""
    low = patient.dome + (patient.dome_gap if side == "left" else 0.0)
    return low - shot.inspiration - change.raised[side]


ZONES = {"upper": -0.46, "mid": -0.09, "lower": 0.24}
"""y of the middle of each lung zone at full inspiration; between them lie -0.27 and 0.08."""


def zone_height(scene: Scene, zone: str) -> float:
    """y at which a finding of this zone is centred; the zones shrink with the lung."""
    lift = scene.shot.inspiration + 0.5 * (0.47 - scene.patient.dome)
    return ZONES[zone] - lift * {"upper": 0.1, "mid": 0.5, "lower": 1.0}[zone]
