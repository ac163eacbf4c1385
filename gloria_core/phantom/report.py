"""The report of a study: findings and impression, the labels they imply, and which words name which finding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gloria_core.phantom import phrases
from gloria_core.phantom.course import LABELS, Finding

_LUNG = {
    "Atelectasis",
    "Consolidation",
    "Edema",
    "Pneumonia",
    "Lung Opacity",
    "Lung Lesion",
    "Pleural Effusion",
    "Pneumothorax",
}


@dataclass
class Report:
    """Texts, labels (1, 0, -1, nan) and, for (finding index, label), character spans (section, start, end)."""

    findings: str = ""
    impression: str = ""
    labels: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LABELS, float("nan")))
    spans: dict[tuple[int, str], list[tuple[str, int, int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sentence:
    text: str
    spans: tuple[tuple[int, str, int, int], ...] = ()  # finding, label, start, end
    labels: tuple[tuple[str, float], ...] = ()


def _pick(rng: np.random.Generator, options: Sequence) -> object:
    return options[int(rng.integers(len(options)))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else noun + "s"


def _tidy(text: str) -> str:
    """Single spaces, and plural places for a finding on both sides."""
    text = re.sub(
        r"\b(in|at) the bilateral ([a-z ]+?)(?=\]|$)", lambda found: f"{found[1]} both {_plural(found[2])}", text
    )
    text = re.sub(r"\bon the bilateral\b", "on both sides", text)
    text = re.sub(r"\bof the bilateral ([a-z ]+?)(?=\]|$)", lambda found: f"of both {_plural(found[1])}", text)
    return re.sub(r" +", " ", text).strip().replace("[ ", "[").replace(" ]", "]")


def _fill(template: str, finding: Finding, rng: np.random.Generator) -> str:
    sizes = phrases.SIZES.get(finding.kind) or phrases.SIZES.get(finding.label) or phrases.SIZES[""]
    size = _pick(rng, sizes[0 if finding.severity < 0.42 else 1 if finding.severity < 0.72 else 2])
    if "{size} enlarged" in template or "{size} widened" in template:
        size = {
            "mild": "mildly",
            "moderate": "moderately",
            "severe": "severely",
            "marked": "markedly",
            "minimal": "minimally",
            "slight": "slightly",
        }.get(str(size), "")
    zones = phrases.ZONES.get(finding.kind, phrases.ZONES["lung"])
    zone = str(_pick(rng, zones[finding.zone])) if finding.zone else ""
    angle = "angles" if finding.side == "bilateral" else "angle"
    side = finding.side if finding.side in ("left", "right", "bilateral") else ""
    return template.format(size=size, side=side, Side=_capital(side), zone=zone, angle=angle)


def _with_article(article: str, noun: str) -> tuple[str, str]:
    if not article:
        return "", noun
    return ("an " if noun[0] in "aeiouAEIOU8" else "a "), noun


def _bracketed(text: str, index: int, labels: tuple[str, ...], value: float) -> _Sentence:
    start, end = text.index("["), text.index("]") - 1
    text = _capital(text.replace("[", "").replace("]", ""))
    spans = tuple((index, label, start, end) for label in labels)
    values = ((labels[0], value), *((label, 1.0) for label in labels[1:]))
    return _Sentence(text, spans, values)


def _mention(index: int, finding: Finding, rng: np.random.Generator) -> _Sentence:
    """One sentence about one finding."""
    kind = finding.kind
    table = phrases.UNSURE_CLAUSES if finding.uncertain else phrases.CLAUSES
    value = -1.0 if finding.uncertain else 1.0
    plain = finding.change in ("", "new") or finding.label == "Support Devices"
    # a clause that describes the picture needs the thing on the picture
    fits = not (kind == "fluid" and finding.severity > 0.5)  # a large effusion does more than blunt an angle
    if kind in table and finding.drawn and plain and fits and rng.random() < 0.33:
        template = str(_pick(rng, table[kind]))
        if not (finding.side == "bilateral" and "{Side}" in template):
            labels = (finding.label, phrases.ALSO[kind]) if kind in phrases.ALSO else (finding.label,)
            return _bracketed(_tidy(_fill(template, finding, rng)), index, labels, value)
    article, _, noun = str(_pick(rng, phrases.NOUNS[kind])).rpartition(":")
    noun = _tidy(_fill(noun, finding, rng))
    if finding.label == "Support Devices":
        frames = phrases.DEVICE
    else:
        frames = phrases.UNSURE if finding.uncertain else phrases.PRESENT[finding.change]
    frame = str(_pick(rng, frames))
    if kind == "wires" and "position" in frame:
        frame = phrases.DEVICE[0]
    opening, noun = _with_article(article, noun)
    text = (
        frame.replace("{ap}", opening + "[" + noun + "]").replace("{P}", "[" + noun + "]").replace("{p}", f"[{noun}]")
    )
    if kind in ("wires", "leads"):
        text = text.replace("There is", "There are")
    return _bracketed(text, index, (finding.label,), value)


def _negatives(taken: set[str], rng: np.random.Generator, n: int) -> list[_Sentence]:
    """Up to n sentences that deny findings nobody speaks of."""
    out: list[_Sentence] = []
    blocked = set(taken)
    if blocked & {"Consolidation", "Lung Opacity", "Pneumonia"}:
        blocked |= {"Pneumonia", "Consolidation", "Lung Opacity"}
    pairs = [phrases.ABSENT_PAIRS[i] for i in rng.permutation(len(phrases.ABSENT_PAIRS))]
    singles = [((label,), phrases.ABSENT[label]) for label in phrases.ABSENT]
    weights = np.array([3.0, 3.0, 2.0, 1.2, 2.0, 1.0, 0.7, 0.6, 0.6, 0.8, 0.5, 0.4, 0.4])
    order = rng.choice(len(singles), size=len(singles), replace=False, p=weights / weights.sum())
    pool = [*pairs[: int(rng.integers(0, 3))], *[singles[i] for i in order]]
    for labels, sentences in pool:
        if len(out) >= n:
            break
        if not blocked & set(labels):
            out.append(_Sentence(str(_pick(rng, sentences)), (), tuple((label, 0.0) for label in labels)))
            blocked |= set(labels)
    return out


def _fillers(taken: set[str], rng: np.random.Generator) -> list[_Sentence]:
    options = [
        text for text in phrases.FILLERS
        if not ("intact" in text and "Fracture" in taken) and not ("volumes" in text and "Atelectasis" in taken)
        and not ("hila" in text and taken & {"Edema", "Lung Lesion"})
    ]  # fmt: skip
    return [_Sentence(options[i]) for i in rng.permutation(len(options))[: int(rng.integers(0, 3))]]


def _section(name: str, sentences: list[_Sentence], report: Report) -> str:
    at, parts = 0, []
    for sentence in sentences:
        for index, label, start, end in sentence.spans:
            report.spans.setdefault((index, label), []).append((name, at + start, at + end))
        for label, value in sentence.labels:
            # certain beats uncertain beats denied, whichever was said last
            old = report.labels[label]
            rank = {1.0: 3, -1.0: 2, 0.0: 1}
            if rank[value] > rank.get(old, 0):
                report.labels[label] = value
        parts.append(sentence.text)
        at += len(sentence.text) + 1
    return " ".join(parts)


def _shuffled(sentences: list[_Sentence], rng: np.random.Generator) -> list[_Sentence]:
    return [sentences[i] for i in rng.permutation(len(sentences))]


def compose(findings: Sequence[Finding], rng: np.random.Generator) -> Report:
    """Write the report of a study. Every finding is in the impression; devices at least in one section."""
    report, body, summary = Report(), [], []
    taken = {f.label for f in findings}
    if "Pneumonia" in taken:
        taken.add("Lung Opacity")
    for index, finding in enumerate(findings):
        device = finding.label == "Support Devices"
        in_body = rng.random() < 0.85
        if in_body:
            body.append(_mention(index, finding, rng))
        if not device or not in_body or rng.random() < 0.35:
            summary.append(_mention(index, finding, rng))
    healthy = not taken - {"Support Devices"}
    body += _negatives(taken, rng, int(rng.integers(2, 6))) + _fillers(taken, rng)
    if not taken & _LUNG and rng.random() < 0.6:
        body.append(_Sentence(str(_pick(rng, phrases.CLEAR))))
    if healthy:
        summary.append(_Sentence(str(_pick(rng, phrases.NORMAL))))
        summary += _negatives(taken, rng, int(rng.integers(0, 3)))
    else:
        summary += _negatives(taken, rng, int(rng.choice([0, 1, 2], p=[0.3, 0.5, 0.2])))
    report.findings = _section("findings", _shuffled(body, rng), report)
    report.impression = _section("impression", _shuffled(summary, rng), report)
    report.labels["No Finding"] = 1.0 if healthy else 0.0
    return report
