"""A scene as one HTML file: pictures, maps, program and style are in it, and nothing is fetched from anywhere."""

import html
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from gloria_core.viz.explorer.scene import base64


@cache
def static(*names: str) -> str:
    """Files of the front end as one text, in order; its JavaScript is one ES module in several files."""
    folder = Path(__file__).with_name("static")
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


PROGRAM = static("maths.js", "picture.js", "explorer.js")
STYLE = static("explorer.css")


def export_page(scene: Mapping[str, Any], maps: Mapping[str, bytes]) -> str:
    """The page of a scene and its maps (see `SceneMaker`); it opens from disk and answers clicks."""
    return Template(static("page.html")).substitute(
        title=html.escape(f"{scene['title'] or 'Attention'} · which pixels does a word point at?"),
        style=STYLE,
        scene=_embedded(scene),
        maps=_embedded({key: base64(data) for key, data in maps.items()}),
        program=PROGRAM,
    )


def _embedded(value: object) -> str:
    """JSON that cannot end the script element that holds it, whatever a report says."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
