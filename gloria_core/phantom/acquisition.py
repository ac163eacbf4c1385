"""From density to an 8-bit radiograph: scatter, beam, detector noise, collimation and side markers."""

import numpy as np

from gloria_core.phantom.canvas import Array, Canvas, blur, clip01, pixel_centres, polyline
from gloria_core.phantom.patient import Exposure, Pose

_LETTERS = {
    "L": [[(0, 0), (0, 1), (0.6, 1)]],
    "R": [[(0, 1), (0, 0), (0.5, 0), (0.62, 0.24), (0.5, 0.5), (0, 0.5)], [(0.25, 0.5), (0.65, 1)]],
}


def _scatter(density: Array, size: int) -> Array:
    """A very wide blur, made on a small copy: scattered radiation knows no detail."""
    step = max(1, size // 32)
    cut = size - size % step
    small = density[:cut, :cut].reshape(cut // step, step, cut // step, step).mean(axis=(1, 3))
    at = np.clip((np.arange(size) + 0.5) / step - 0.5, 0, size // step - 1)
    enlarge = np.maximum(1 - np.abs(at[:, None] - np.arange(size // step)[None]), 0).astype(np.float32)
    return enlarge @ blur(small, 3.0) @ enlarge.T


def acquire(density: Array, exposure: Exposure, rng: np.random.Generator) -> Array:
    """Density (size, size), 0 = open air and about 1 = abdomen, to 8-bit gray; bright is dense."""
    size = len(density)
    image = density + exposure.veil * (_scatter(density, size) - 0.35 * density)
    image = blur(image, exposure.blur * size / 128)
    image = (image - 0.48) * exposure.contrast + 0.48 + exposure.brightness
    # the S-curve of a radiograph: shoulders at both ends, nearly straight between
    image = 0.5 + 0.5 * np.tanh(1.45 * (image - 0.50)) / np.float32(np.tanh(1.45 * 0.58))
    image = clip01(image) ** np.float32(exposure.gamma)
    # fewer photons behind dense parts, hence more noise there; finer pixels catch fewer still
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(exposure.noise * (size / 128) ** 0.5)
    image += blur(grain, 0.45) * (0.7 + 0.9 * image)
    return (clip01(_collimate(image, exposure)) * 255 + 0.5).astype(np.uint8)


def _collimate(image: Array, exposure: Exposure) -> Array:
    """Dark borders outside the open field, and the side marker, which lies on the detector."""
    size = len(image)
    u = v = pixel_centres(size)
    left, right, top, bottom = exposure.collimation
    columns, rows = (u > -1 + 2 * left) & (u < 1 - 2 * right), (v > -1 + 2 * top) & (v < 1 - 2 * bottom)
    image = np.where(columns[None] & rows[:, None], image, np.float32(0.02))
    if not exposure.marker:
        return image
    x0, y0 = exposure.marker_at
    x0 = x0 if exposure.marker == "L" else -x0 - 0.05
    mark, detector = np.zeros_like(image), Canvas(size, Pose())
    for stroke in _LETTERS[exposure.marker]:
        points, lengths = polyline([(x0 + 0.07 * x, y0 + 0.09 * y) for x, y in stroke], 0.006)
        mark += detector.strokes(points, lengths, 0.010)
    return np.maximum(image, np.clip(mark * 1.6, 0, 0.96))
