"""A scene as one HTML file: pictures, maps, program and style are in it, and nothing is fetched from anywhere."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gloria_core.viz.explorer.scene import text64

STATIC = Path(__file__).with_name("static")
_PROGRAM = ("maths.js", "picture.js", "explorer.js", "drawing.js")
# 'none' by default: a browser that obeys it could not reach a network even if the program asked it to
_POLICY = "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 1400px; padding: 16px; background: light-dark(#eef1f4, #0e1215); }}
{style}
</style>
</head>
<body>
<div id="explorer"></div>
<noscript>This page draws its maps with JavaScript, which is switched off here.</noscript>
<script type="application/json" id="scene">{scene}</script>
<script type="application/json" id="maps">{maps}</script>
<script type="module">
{program}
const read = (id) => JSON.parse(document.getElementById(id).textContent);
window.explorer = page(document.getElementById("explorer"), read("scene"), read("maps"));
</script>
</body>
</html>
"""


@cache
def program() -> str:
    """The front end as one ES module: its files in order, which share their names."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in _PROGRAM)


@cache
def style() -> str:
    """The front end's style sheet."""
    return (STATIC / "explorer.css").read_text(encoding="utf-8")


def export_page(scene: Mapping[str, Any], maps: Mapping[str, bytes]) -> str:
    """The page of a scene and its maps (see `explorer_data`); it opens from disk and answers clicks."""
    return _PAGE.format(
        policy=_POLICY,
        title=html.escape(f"{scene['title'] or 'Attention'} · which pixels does a word point at?"),
        style=style(),
        scene=_embedded(scene),
        maps=_embedded({key: text64(data) for key, data in maps.items()}),
        program=program(),
    )


def _embedded(value: object) -> str:
    """JSON that cannot end the script element it stands in, whatever a report says."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
