"""Pieces of the explorer's scene in forms that a browser draws as they are: pictures, outlines, colours, formulas."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from io import BytesIO

import matplotlib
import numpy as np
from contourpy import contour_generator
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from numpy.typing import NDArray
from PIL import Image

SHOWN_SIDE = 1024
"""Longest side in pixels of the picture that is sent; a map is computed on the file's own pixels all the same."""
COLOUR_MAPS = {"viridis": "viridis", "cividis": "cividis", "gray": "gray", "orange-purple": "PuOr_r"}
"""Name on screen -> matplotlib's. All keep their order for colour-blind readers; the last is for maps with a sign."""

_LETTER = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}


def text64(data: bytes) -> str:
    """Bytes as base64 text."""
    return b64encode(data).decode("ascii")


def picture(image: NDArray[np.uint8]) -> str:
    """(H, W) gray pixels as a base64 PNG, no side longer than `SHOWN_SIDE`."""
    shown = Image.fromarray(image)
    longest = max(image.shape)
    if longest > SHOWN_SIDE:
        height, width = (max(1, round(side * SHOWN_SIDE / longest)) for side in image.shape)
        shown = shown.resize((width, height), Image.Resampling.BOX)
    buffer = BytesIO()
    shown.save(buffer, "PNG")
    return text64(buffer.getvalue())


def colours() -> dict[str, str]:
    """Name -> 256 colours of 3 bytes each, as base64."""
    steps = np.arange(256)
    return {
        name: text64((matplotlib.colormaps[source](steps, bytes=True)[:, :3]).tobytes())
        for name, source in COLOUR_MAPS.items()
    }


def outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Closed lines around a mask (H, W), each [x0, y0, x1, y1, ...] in pixels counted from the outer corner."""
    # a frame of background closes the line of a region that touches the border of the image
    padded = np.pad(np.asarray(mask, dtype=float), 1)
    lines = contour_generator(z=padded).lines(0.5)
    # padded cell i is pixel i - 1, whose centre lies at i - 0.5
    return [np.round(line - 0.5, 2).ravel().tolist() for line in lines]


@cache
def formula(latex: str, *, size: float = 17.0) -> str:
    """A formula as SVG in the colour of the text around it, so that no typesetting library has to be loaded.

    Raises ValueError for LaTeX that matplotlib's mathtext does not know.
    """
    glyphs = TextPath((0, 0), f"${latex}$", size=size, prop=FontProperties(math_fontfamily="cm"))
    box = glyphs.get_extents()
    parts = []
    for points, code in glyphs.iter_segments(curves=True, simplify=False):
        pairs = points.reshape(-1, 2) * (1, -1)
        letter = _LETTER[code]
        parts.append(letter if letter == "Z" else letter + " ".join(f"{value:.2f}" for value in pairs.ravel()))
    left, top, width, height = box.x0 - 1, -box.y1 - 1, box.width + 2, box.height + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}" '
        f'width="{width:.0f}" height="{height:.0f}" aria-hidden="true">'
        f'<path fill="currentColor" d="{"".join(parts)}"/></svg>'
    )
