"""From density to film: scatter, beam, detector noise, borders and markers."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gloria_core.phantom.canvas import Canvas, blur, grid, polyline
from gloria_core.phantom.patient import Shot

Array = np.ndarray
_LETTERS = {
    "L": [[(0, 0), (0, 1), (0.6, 1)]],
    "R": [[(0, 1), (0, 0), (0.5, 0), (0.62, 0.24), (0.5, 0.5), (0, 0.5)], [(0.25, 0.5), (0.65, 1)]],
}


def _scatter(density: Array, size: int) -> Array:
    """A very wide blur, made on a small copy: scattered radiation knows no detail."""
    step = max(1, size // 32)
    cut = size - size % step
    small = density[:cut, :cut].reshape(cut // step, step, cut // step, step).mean(axis=(1, 3))
    up = _enlarge(size, step)
    return up @ blur(small, 3.0) @ up.T


@lru_cache(maxsize=8)
def _enlarge(size: int, step: int) -> Array:
    """Linear interpolation from blocks of `step` pixels back to pixels: (size, size // step)."""
    at = np.clip((np.arange(size) + 0.5) / step - 0.5, 0, size // step - 1)
    return np.maximum(1 - np.abs(at[:, None] - np.arange(size // step)[None]), 0).astype(np.float32)


def develop(density: Array, canvas: Canvas, shot: Shot, rng: np.random.Generator) -> Array:
    """Density (size, size), 0 = open air and about 1 = abdomen, to 8-bit gray; bright is dense."""
    size = canvas.size
    film = density + shot.veil * (_scatter(density, size) - 0.35 * density)
    film = blur(film, shot.blur * size / 128)
    film = (film - 0.48) * shot.contrast + 0.48 + shot.brightness
    # the film's S-curve: shoulders at both ends, nearly straight between
    film = 0.5 + 0.5 * np.tanh(1.45 * (film - 0.50)) / np.float32(np.tanh(1.45 * 0.58))
    film = np.clip(film, 0, 1) ** np.float32(shot.gamma)
    # fewer photons behind dense parts, hence more noise there; finer pixels catch fewer still
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(shot.noise * (size / 128) ** 0.5)
    film += blur(grain, 0.45) * (0.7 + 0.9 * film)
    film = _frame(film, canvas, shot)
    return (np.clip(film, 0, 1) * 255 + 0.5).astype(np.uint8)


def _frame(film: Array, canvas: Canvas, shot: Shot) -> Array:
    u, v = grid(canvas.size)
    left, right, top, bottom = shot.collimation
    open_field = ((u > -1 + 2 * left) & (u < 1 - 2 * right))[None] & ((v > -1 + 2 * top) & (v < 1 - 2 * bottom))[
        :, None
    ]
    film = np.where(open_field, film, np.float32(0.02))
    if not shot.marker:
        return film
    x0, y0 = shot.marker_at
    x0 = x0 if shot.marker == "L" else -x0 - 0.05
    mark = np.zeros_like(film)
    straight = _image_plane(canvas)
    for stroke in _LETTERS[shot.marker]:
        points, lengths = polyline([(x0 + 0.07 * x, y0 + 0.09 * y) for x, y in stroke], 0.006)
        mark += straight.strokes(points, lengths, 0.010)
    return np.maximum(film, np.clip(mark * 1.6, 0, 0.96))


def _image_plane(canvas: Canvas) -> Canvas:
    """A canvas without a pose: markers lie on the detector, not on the patient."""
    plane = object.__new__(Canvas)
    plane.size, plane.pose, plane.unit = canvas.size, type(canvas.pose)(), canvas.size / 2
    return plane
