"""What may stand inside one cell of a manifest: a path, a JSON list of boxes, a JSON list of masks."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pandas as pd


def path_problem(path: str) -> str | None:
    """Why `path` is no plain relative posix path below the root, or None if it is one."""
    if not path or path != path.strip():
        return "is empty or has spaces around it"
    if "\\" in path:
        return "has a backslash; write folders with /"
    if path.startswith("/") or path[1:2] == ":" or path.startswith("~"):
        return "is absolute; give it relative to the dataset's root"
    parts = path.split("/")
    if ".." in parts:
        return "escapes the root with '..'; give a path below the dataset's root"
    if "." in parts or "" in parts:
        return "is not in plain form; write it without '.' and double slashes"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)


def _entry_problem(entry: object, n_images: int) -> str | None:
    """Faults that boxes and masks share: the form of the entry, its label and its image number."""
    if not isinstance(entry, dict):
        return f"{entry!r} is not an object"
    if not isinstance(entry.get("label"), str) or not entry["label"]:
        return "an entry has no 'label'"
    image = entry.get("image")
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < n_images:
        return f"'image' is {image!r}; it must count the study's images from 0 to {n_images - 1}"
    return None


def box_problem(entry: object, n_images: int, texts: dict[str, str]) -> str | None:
    problem = _entry_problem(entry, n_images)
    if problem:
        return problem
    box = entry.get("xywh")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"'xywh' is {box!r}; it must be four numbers [x, y, width, height]"
    return None if box[2] > 0 and box[3] > 0 else f"'xywh' is {box!r}; width and height must be positive"


def mask_problem(entry: object, n_images: int, texts: dict[str, str]) -> str | None:
    problem = _entry_problem(entry, n_images)
    if problem:
        return problem
    path = entry.get("path")
    if not isinstance(path, str):
        return f"'path' is {path!r}; it must be the mask's path below the root"
    if path_problem(path):
        return f"path {path!r} {path_problem(path)}"
    spans = entry.get("spans", [])
    for span in spans if isinstance(spans, list) else [spans]:
        good = isinstance(span, list) and len(span) == 3 and span[0] in texts and all(map(_is_number, span[1:]))
        if not good or not 0 <= span[1] < span[2] <= len(texts[span[0]]):
            return f"span {span!r} must be [section, start, end] inside that section's text"
    return None


def json_problems(frame: pd.DataFrame, column: str, check: Callable) -> dict[int, str]:
    """Row position -> fault, of one column of JSON lists; empty cells are fine."""
    problems: dict[int, str] = {}
    cells = frame[column].to_numpy(object)
    for position in np.flatnonzero(frame[column].notna() & (frame[column] != "")):
        row = frame.iloc[position]
        texts = {section: str(row[section]) for section in ("findings", "impression")}
        try:
            entries = json.loads(cells[position])
        except (ValueError, TypeError) as error:
            problems[int(position)] = f"not JSON ({error}); leave the cell empty if there are none"
            continue
        if not isinstance(entries, list):
            problems[int(position)] = "must be a JSON list of objects"
            continue
        n_images = str(row["images"]).count(";") + 1
        found = next(filter(None, (check(entry, n_images, texts) for entry in entries)), None)
        if found:
            problems[int(position)] = found
    return problems
