"""The drawing plane, and the layers of one view that organs and findings are drawn on.

Anatomy coordinates have their origin in the middle of the chest, x to the image's right (the patient's left on a
frontal view), y down, and one unit is half the image's width before the patient's pose is applied. Every shape is a
function of these coordinates, so the same patient can be drawn at any size.
"""

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import correlate1d, gaussian_filter1d

from gloria_core.phantom.disease import Finding
from gloria_core.phantom.patient import Exposure, Patient, Pose

Array = np.ndarray

_TABLE_MIN, _TABLE_MAX, _TABLE_SIZE = -2.0, 2.0, 1024
# The y values behind `Canvas.curve`
TABLE_ROWS = np.linspace(_TABLE_MIN, _TABLE_MAX, _TABLE_SIZE)


def pixel_centres(size: int) -> Array:
    """Pixel centres along one side in image coordinates [-1, 1]. Shape: (size,)."""
    return ((np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0).astype(np.float32)


def clip01(values: Array) -> Array:
    """Values cut to 0..1."""
    return np.clip(values, 0, 1)


def blur(layer: Array, sigma: float) -> Array:
    """Gaussian blur with `sigma` in pixels; edges repeat."""
    if sigma < 0.15:
        return layer
    sigma = round(sigma * 1000) / 1000.0
    reach = max(1, int(2.6 * sigma + 0.5))
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    return correlate1d(correlate1d(layer, taps, axis=0, mode="nearest"), taps, axis=1, mode="nearest")


class Canvas:
    """Coordinates of one picture and the primitives drawn on it.

    Shape: `x`, `y` (size, size) float32, anatomy coordinates of the pixel centres. `unit` is pixels per anatomy unit.
    """

    def __init__(self, size: int, pose: Pose) -> None:
        self.size, self.pose = size, pose
        u = v = pixel_centres(size)
        cos, sin = np.float32(np.cos(pose.angle) / pose.scale), np.float32(np.sin(pose.angle) / pose.scale)
        du, dv = (u - np.float32(pose.dx))[None, :], (v - np.float32(pose.dy))[:, None]
        self.x = cos * du + sin * dv
        self.y = -sin * du + cos * dv
        self.unit = size / 2 * pose.scale
        self._row = np.clip((self.y - _TABLE_MIN) * (_TABLE_SIZE / (_TABLE_MAX - _TABLE_MIN)), 0, _TABLE_SIZE - 1)
        self._row = self._row.astype(np.intp)

    def profile(self, ys: Array | tuple, values: Array | tuple, *, round_off: float = 0.0) -> Array:
        """A curve value(y), given by its knots, looked up at every pixel: (size, size); `round_off` units blur it."""
        table = np.interp(TABLE_ROWS, ys, values)
        if round_off:
            table = gaussian_filter1d(table, round_off * _TABLE_SIZE / (_TABLE_MAX - _TABLE_MIN), mode="nearest")
        return self.curve(table)

    def curve(self, values: Array) -> Array:
        """Like `profile` for values already on `TABLE_ROWS`."""
        return values.astype(np.float32)[self._row]

    def edge(self, distance: Array, softness: float = 0.0) -> Array:
        """1 inside (distance > 0), 0 outside, linear over about one pixel plus `softness` units."""
        return np.clip(distance * (1.0 / (1.2 / self.unit + softness)) + 0.5, 0.0, 1.0)

    def disc(self, x: float, y: float, a: float, b: float | None = None, angle: float = 0.0) -> Array:
        """1 - r^2 of an ellipse with half-axes a, b turned by `angle` (radians): positive inside, 1 in the middle."""
        b = a if b is None else b
        dx, dy = self.x - np.float32(x), self.y - np.float32(y)
        if angle:
            cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
            dx, dy = cos * dx + sin * dy, cos * dy - sin * dx
        return 1.0 - (dx * np.float32(1 / a)) ** 2 - (dy * np.float32(1 / b)) ** 2

    def to_image(self, points: Array) -> Array:
        """Anatomy coordinates (n, 2) to pixel coordinates (n, 2), column first."""
        p, (x, y) = self.pose, np.asarray(points, dtype=np.float64).T
        cos, sin = np.cos(p.angle) * p.scale, np.sin(p.angle) * p.scale
        u, v = cos * x - sin * y + p.dx, sin * x + cos * y + p.dy
        return np.stack([(u + 1) * self.size / 2 - 0.5, (v + 1) * self.size / 2 - 0.5], axis=1)

    def blobs(self, points: Array, sigma: Array | float, weight: Array | float) -> Array:
        """Sum of round Gaussian bumps: centres (n, 2), widths and heights (n,), in anatomy units."""
        centre = self.to_image(points)
        sigma = np.broadcast_to(np.asarray(sigma, dtype=np.float64) * self.unit, len(centre))[:, None]
        axis = np.arange(self.size)[None, :]
        across = np.exp(-0.5 * ((axis - centre[:, :1]) / sigma) ** 2).astype(np.float32)
        down = np.exp(-0.5 * ((axis - centre[:, 1:]) / sigma) ** 2)
        down *= np.broadcast_to(np.asarray(weight, dtype=np.float64), len(centre))[:, None]
        return down.astype(np.float32).T @ across

    def strokes(self, points: Array, weight: Array, sigma: float) -> Array:
        """Lines with a Gaussian cross-section: points (n, 2), `weight` (n,) = peak height * length each stands for.

        A line thinner than a pixel keeps its total density and so fades, as it does on a detector.
        """
        size, sigma_px = self.size, sigma * self.unit
        spread = max(sigma_px, 0.45)
        at = self.to_image(points)
        layer = np.zeros((size, size), dtype=np.float32)
        # only the window that the line can reach is computed
        margin = int(2.6 * spread + 2.5)
        x0, y0 = np.maximum(np.floor(at.min(axis=0)).astype(int) - margin, 0)
        x1, y1 = np.minimum(np.floor(at.max(axis=0)).astype(int) + margin + 2, size)
        if x0 >= x1 or y0 >= y1:
            return layer
        wide, high = x1 - x0 + 2 * margin, y1 - y0 + 2 * margin
        at = at - (x0 - margin, y0 - margin)
        near = ((at >= 0) & (at < (wide - 1, high - 1))).all(axis=1)
        at, weight = at[near], weight[near] * (self.unit * np.sqrt(2 * np.pi) * sigma_px)
        low = at.astype(np.intp)
        right, down = (at - low).T
        base = low[:, 1] * wide + low[:, 0]
        cells = np.concatenate([base, base + 1, base + wide, base + wide + 1])
        shares = np.concatenate([(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down])
        sums = np.bincount(cells, weights=shares * np.tile(weight, 4), minlength=wide * high)
        window = blur(sums.reshape(high, wide).astype(np.float32), spread)
        layer[y0:y1, x0:x1] = window[margin : margin + y1 - y0, margin : margin + x1 - x0]
        return layer


def polyline(knots: Array | list, step: float = 0.004) -> tuple[Array, Array]:
    """Points every `step` units along straight pieces between knots (k, 2), and the length each stands for."""
    knots = np.asarray(knots, dtype=np.float64)
    lengths = np.hypot(*np.diff(knots, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    n = max(2, int(along[-1] / step))
    at = (np.arange(n) + 0.5) * (along[-1] / n)
    points = np.stack([np.interp(at, along, knots[:, 0]), np.interp(at, along, knots[:, 1])], axis=1)
    return points, np.full(n, along[-1] / n)


def smooth_line(knots: Array | list, step: float = 0.004) -> tuple[Array, Array]:
    """Like `polyline`, with the corners rounded (Catmull-Rom spline through the knots)."""
    k = np.asarray(knots, dtype=np.float64)
    k = np.concatenate([[2 * k[0] - k[1]], k, [2 * k[-1] - k[-2]]])
    ends = np.stack([k[:-3], k[1:-2], k[2:-1], k[3:]])
    t = np.linspace(0, 1, 9)[:-1]
    basis = [-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]
    curve = np.einsum("tj,jkc->ktc", 0.5 * np.stack(basis, axis=1), ends).reshape(-1, 2)
    return polyline(np.concatenate([curve, k[-2:-1]]), step)


# What a full depth of lung takes away from the density of the chest (display density 1 is white)
AIR = 0.60
# On a frontal view the patient's right is on the image's left
SIGN = {"right": -1.0, "left": 1.0}
# y of the middle of each lung zone at full inspiration; between them lie -0.27 and 0.08
ZONES = {"upper": -0.46, "mid": -0.09, "lower": 0.24}


class AnatomyChange:
    """What findings do to the anatomy before it is drawn: a big heart, a raised diaphragm, wet vessels."""

    def __init__(self, present: Sequence[Finding]) -> None:
        drawn = {finding.kind: finding for finding in present if finding.drawn}
        # factor on heart size
        self.heart = 1.17 + 0.30 * drawn["cardiomegaly"].strength if "cardiomegaly" in drawn else 1.0
        # extra half-width of the upper mediastinum
        self.mediastinum = 0.040 + 0.080 * drawn["wide"].strength if "wide" in drawn else 0.0
        # vessel blurring and upper-lobe diversion
        self.congestion = 0.35 + 0.55 * drawn["edema"].strength if "edema" in drawn else 0.0
        self.raised = {"right": 0.0, "left": 0.0}
        if "basal" in drawn:
            self.raised |= dict.fromkeys(drawn["basal"].sides, 0.03 + 0.06 * drawn["basal"].strength)


class Scene(Canvas):
    """The layers of one view. `start` of the view makes those of the normal anatomy.

    Shape: all layers (size, size) float32. `air` is the depth of aerated lung, 0..1; `lung` a soft lung membership
    for each side; `wall` the distance to the inner chest wall; `base` the distance above the diaphragm (units);
    `heart` the density of heart and mediastinum; `cardiac` and `mediastinum` are positive inside these organs. `extra`
    is density that findings and devices add; `vessels` a gain on the vessel layer; `solid` how much of the lung is
    filled, which makes the heart's border vanish there. `broken_ribs` are (sign of the side, x, y, shift): beyond `x`
    (distance from the midline) the rib near `y` is displaced by `shift` units.
    """

    def __init__(self, size: int, pose: Pose, patient: Patient, exposure: Exposure, change: AnatomyChange) -> None:
        super().__init__(size, pose)
        self.patient, self.exposure, self.change = patient, exposure, change
        self.extra, self.solid = np.zeros((2, size, size), np.float32)
        self.vessels = np.ones((size, size), np.float32)
        self.broken_ribs: list[tuple[float, float, float, float]] = []

    def fill(self, amount: Array) -> None:
        """Replace air by fluid or cells where `amount` (0..1) says, and hide the vessels there."""
        # what is filled already has no air left to lose
        self.extra += np.maximum(amount - self.solid, 0) * self.air * np.float32(AIR)
        self.solid = np.maximum(self.solid, np.minimum(amount, 1.0))
        self.vessels *= 1.0 - 0.85 * np.minimum(amount, 1.0)

    def lungs(self, side: str) -> Array:
        """Lung membership of one side or both."""
        return np.maximum(self.lung["right"], self.lung["left"]) if side == "bilateral" else self.lung[side]

    def line(self, knots: Array | list, width: float, peak: float) -> Array:
        """A smooth wire through knots (k, 2): Gaussian profile of `width` (its sigma) and `peak` density."""
        points, lengths = smooth_line(knots)
        return self.strokes(points, lengths * peak, width)

    def dome_height(self, side: str) -> float:
        """y of the top of one hemidiaphragm."""
        low = self.patient.dome + (self.patient.dome_gap if side == "left" else 0.0)
        return low - self.exposure.inspiration - self.change.raised[side]

    def zone_height(self, zone: str) -> float:
        """y at which a finding of this zone is centred; the zones shrink with the lung."""
        lift = self.exposure.inspiration + 0.5 * (0.47 - self.patient.dome)
        return ZONES[zone] - lift * {"upper": 0.1, "mid": 0.5, "lower": 1.0}[zone]
