"""Reports of MIMIC-CXR (Johnson et al. 2019, https://physionet.org/content/mimic-cxr/): a zip of texts, and sections.

The rules are those of the makers (MIT-LCP, mimic-cxr code, section_parser): a heading is a line's beginning in
capitals with a colon; its name is sorted into a few sections; view names ("PA AND LATERAL VIEWS") head findings; of a
section that occurs twice the last counts. A report with neither findings nor impression has its last paragraph.
The makers' hand-made exceptions for 54 studies are not applied.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from pathlib import Path

from gloria_core.data.manifest import ManifestError
from gloria_core.data.owner_folder import open_zip, read_member

_HEADING = re.compile(r"(?:^|\n)[ \t]*([A-Z][A-Z ()/,-]*):(?=\s|$)")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_WRAPPED = re.compile(r"[ \t]*\n[ \t]*(?![ \t]*(?:\n|[-*•][ \t]))")
_INDENT = re.compile(r"[ \t]*\n[ \t]*")
_REPORT = re.compile(r"(?:^|/)s(\d+)\.txt$")

_EXACT = {
    "conclusion": "impression",
    "conclusions": "impression",
    "opinion": "impression",
    "summary": "impression",
    "assessment": "impression",
    "interpretation": "impression",
    "finding": "findings",
    "observations": "findings",
    "report": "findings",
    "indication": "history",
    "indications": "history",
    "clinical information": "history",
    "reason": "history",
    "reason for exam": "history",
    "reason for examination": "history",
    "reason for the exam": "history",
    "technique": "technique",
    "procedure": "technique",
    "examination": "examination",
    "exam": "examination",
    "study": "examination",
    "type of examination": "examination",
    "wet read": "wet read",
    "recommendation": "recommendation",
    "recommendations": "recommendation",
    "notification": "notification",
    "notifications": "notification",
}
_WITHIN = ("impression", "findings", "history", "comparison", "addendum")
_VIEWS = re.compile(
    r"\b(?:views?|pa|ap|lateral|portable|upright|supine|semi-?upright|frontal|radiographs?|films?|chest|single|two)\b"
)
_SPELT = ("impression", "findings", "conclusion", "comparison", "indication")


@lru_cache(maxsize=4096)
def section_name(heading: str) -> str:
    """The section that a heading (without its colon) opens; the heading in small letters where it is none of ours."""
    name = " ".join(heading.lower().split())
    if name in _EXACT:
        return _EXACT[name]
    for part in _WITHIN:
        if part in name:
            return part
    near = difflib.get_close_matches(name, _SPELT, 1, cutoff=0.8)  # "IMPRESSON", "FINIDNGS"
    if near:
        return _EXACT.get(near[0], near[0])
    return "findings" if _VIEWS.search(name) else name


def mimic_sections(text: str) -> dict[str, str]:
    """Section -> text, by the makers' rules; `last_paragraph` where there are neither findings nor impression.

    Wrapped lines are joined; paragraphs and list items keep their line breaks. Sections without text are left out.
    """
    marks = list(_HEADING.finditer(text))
    starts, names = [0], ["preamble"]
    for mark in marks:
        starts.append(mark.end())
        names.append(section_name(mark[1]))
    ends = [mark.start() for mark in marks] + [len(text)]
    found: dict[str, str] = {}
    for name, start, end in zip(names, starts, ends, strict=True):
        # an empty later section does not hide an earlier one of the same name
        if piece := text[start:end].strip():
            found[name] = piece
    if "findings" not in found and "impression" not in found:
        last = text[starts[-1] : ends[-1]]
        _, *paragraphs = _PARAGRAPH.split(last.strip("\n"), maxsplit=1)
        if paragraphs and paragraphs[0].strip():
            found["last_paragraph"] = paragraphs[0].strip()
    return {name: unwrapped(piece) for name, piece in found.items()}


def unwrapped(text: str) -> str:
    """Wrapped lines as one line; blank lines and list items stay on lines of their own."""
    if "\n" not in text:
        return text.strip()
    paragraphs = [_INDENT.sub("\n", _WRAPPED.sub(" ", part)).strip() for part in _PARAGRAPH.split(text)]
    return "\n\n".join(part for part in paragraphs if part)


def read_mimic_reports(path: Path, studies: set[str]) -> dict[str, tuple[str, str, str]]:
    """Study number -> (findings, impression, last paragraph) of the wanted studies, from the zip or a folder of it.

    Raises ManifestError for a broken archive, and for a study that has two reports.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for name, raw in _texts(path, studies):
        if name in found:
            raise ManifestError(f"{path}: the report of study {name} is there twice; keep one s{name}.txt")
        parts = mimic_sections(raw.decode("utf-8", "replace").replace("\r\n", "\n"))
        found[name] = tuple(parts.get(section, "") for section in ("findings", "impression", "last_paragraph"))
    return found


def _texts(path: Path, studies: set[str]):
    """Study number and bytes of each wanted report."""
    if path.is_dir():
        for file in sorted(path.rglob("s*.txt")):
            match = _REPORT.search(file.name)
            if match and match[1] in studies:
                yield match[1], file.read_bytes()
        return
    with open_zip(path) as archive:
        for info in archive.infolist():
            match = _REPORT.search(info.filename)
            if match and match[1] in studies:
                yield match[1], read_member(archive, info)
