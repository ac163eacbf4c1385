"""What the browser tests look at: the screen, the map's own layer, and where the lesion lies on them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image


def load(page, file):
    page.context.set_offline(True)
    page.goto(file.as_uri())
    page.wait_for_selector(".gx-word.gx-on")
    page.wait_for_function("explorer.pictures.every((picture) => picture.map)")
    return page


def stage(page, number=0):
    """The picture as it is on the screen, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(page.locator(".gx-stage").nth(number).screenshot())).convert("RGB"), int)


def layer(page, number=0):
    """The map's own layer, (H, W, 4) uint8 as the canvas holds it."""
    text, width, height = page.evaluate(
        """(number) => {
          const canvas = document.querySelectorAll(".gx-picture")[number].querySelector(".gx-map");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let raw = "";
          for (let i = 0; i < data.length; i += 8192) raw += String.fromCharCode(...data.subarray(i, i + 8192));
          return [btoa(raw), canvas.width, canvas.height];
        }""",
        number,
    )
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(height, width, 4)


def boxes(page, scene, shape, number=0):
    """(lesion, seen) as slices of the screen's pixels: around the chosen truth, and what the model saw."""
    scale = shape[1] / scene["image"]["width"]
    truth = scene["truths"][page.evaluate("explorer.state.truth")]
    xy = np.concatenate([np.reshape(line, (-1, 2)) for line in truth["lines"]])
    (x0, y0), (x1, y1) = xy.min(axis=0) * scale, xy.max(axis=0) * scale
    left, top, width, height = np.array(scene["models"][number]["frame"]) * scale
    lesion = slice(int(y0), int(y1)), slice(int(x0), int(x1))
    return lesion, (slice(int(top), int(top + height) + 1), slice(int(left), int(left + width) + 1))
