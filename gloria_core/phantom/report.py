"""The report of a study: findings and impression, the labels they imply, and which words name which finding.

The vocabulary is in `phrases.json`. In noun phrases `{size}`, `{side}` and `{zone}` are filled from the finding; a
leading `a:` marks a phrase that takes an article. Sentences hold the phrase as `{p}` (with article: `{ap}`,
capitalised: `{P}`). In clauses, which are whole sentences, the words that name the region stand in square brackets.
Sizes are listed by severity: below 0.42, below 0.72, above. Clauses of a kind in `also` make that label positive, too.
Each of the `fillers` comes with the labels that it would contradict; findings with a label in `outside_the_lungs` leave
the lungs `clear`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gloria_core.phantom.disease import LABELS, Finding

_PHRASES = json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))

# Certain beats uncertain beats denied, whichever was said last
_RANK = {1.0: 3, -1.0: 2, 0.0: 1}


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


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tidy(text: str) -> str:
    """Single spaces, and plural places for a finding on both sides."""
    text = re.sub(r"\b(in|at|of) the bilateral ([a-z ]+?)s?(?=\]|$)", r"\1 both \2s", text)
    text = re.sub(r"\bon the bilateral\b", "on both sides", text)
    return re.sub(r" +", " ", text).strip().replace("[ ", "[").replace(" ]", "]")


def _fill(template: str, finding: Finding, rng: np.random.Generator) -> str:
    sizes = _PHRASES["sizes"].get(finding.kind) or _PHRASES["sizes"].get(finding.label) or _PHRASES["sizes"][""]
    size = _pick(rng, sizes[0 if finding.severity < 0.42 else 1 if finding.severity < 0.72 else 2])
    if "{size} enlarged" in template or "{size} widened" in template:
        size = f"{size}ly" if size in ("mild", "moderate", "severe", "marked", "minimal", "slight") else ""
    zones = _PHRASES["zones"].get(finding.kind, _PHRASES["zones"]["lung"])
    zone = _pick(rng, zones[finding.zone]) if finding.zone else ""
    angle = "angles" if finding.side == "bilateral" else "angle"
    side = "" if finding.side == "midline" else finding.side
    return template.format(size=size, side=side, Side=_capital(side), zone=zone, angle=angle)


def _bracketed(text: str, index: int, labels: tuple[str, ...], value: float) -> _Sentence:
    start, end = text.index("["), text.index("]") - 1
    text = _capital(text.replace("[", "").replace("]", ""))
    spans = tuple((index, label, start, end) for label in labels)
    values = ((labels[0], value), *((label, 1.0) for label in labels[1:]))
    return _Sentence(text, spans, values)


def _mention(index: int, finding: Finding, rng: np.random.Generator) -> _Sentence:
    """One sentence about one finding."""
    kind = finding.kind
    table = _PHRASES["unsure_clauses"] if finding.uncertain else _PHRASES["clauses"]
    value = -1.0 if finding.uncertain else 1.0
    plain = finding.change in ("", "new") or finding.label == "Support Devices"
    # a clause that describes the picture needs the thing on the picture
    fits = not (kind == "effusion" and finding.severity > 0.5)  # a large effusion does more than blunt an angle
    if kind in table and finding.drawn and plain and fits and rng.random() < 0.33:
        template = _pick(rng, table[kind])
        if not (finding.side == "bilateral" and "{Side}" in template):
            labels = (finding.label, _PHRASES["also"][kind]) if kind in _PHRASES["also"] else (finding.label,)
            return _bracketed(_tidy(_fill(template, finding, rng)), index, labels, value)
    article, _, noun = _pick(rng, _PHRASES["nouns"][kind]).rpartition(":")
    noun = _tidy(_fill(noun, finding, rng))
    if finding.label == "Support Devices":
        frames = _PHRASES["device"]
    else:
        frames = _PHRASES["unsure"] if finding.uncertain else _PHRASES["present"][finding.change]
    frame = _pick(rng, frames)
    if kind == "wires" and "position" in frame:
        frame = _PHRASES["device"][0]
    article = "" if not article else "an " if noun[0] in "aeiouAEIOU8" else "a "
    noun = f"[{noun}]"
    text = frame.format(ap=article + noun, P=noun, p=noun)
    if kind in ("wires", "leads"):
        text = text.replace("There is", "There are")
    return _bracketed(text, index, (finding.label,), value)


def _negatives(taken: set[str], rng: np.random.Generator, n: int) -> list[_Sentence]:
    """Up to n sentences that deny findings nobody speaks of."""
    out: list[_Sentence] = []
    alike = {"Consolidation", "Lung Opacity", "Pneumonia"}
    blocked = taken | alike if taken & alike else set(taken)
    pairs = _shuffled(_PHRASES["absent_pairs"], rng)
    singles = [((label,), sentences) for label, sentences in _PHRASES["absent"].items()]
    weights = np.array([3.0, 3.0, 2.0, 1.2, 2.0, 1.0, 0.7, 0.6, 0.6, 0.8, 0.5, 0.4, 0.4])
    order = rng.choice(len(singles), size=len(singles), replace=False, p=weights / weights.sum())
    for labels, sentences in [*pairs[: int(rng.integers(0, 3))], *[singles[i] for i in order]]:
        if len(out) < n and not blocked & set(labels):
            out.append(_Sentence(_pick(rng, sentences), (), tuple((label, 0.0) for label in labels)))
            blocked |= set(labels)
    return out


def _fillers(taken: set[str], rng: np.random.Generator) -> list[_Sentence]:
    options = [text for text, contradicted in _PHRASES["fillers"] if not taken & set(contradicted)]
    return [_Sentence(text) for text in _shuffled(options, rng)[: int(rng.integers(0, 3))]]


def _section(name: str, sentences: list[_Sentence], report: Report) -> str:
    at, parts = 0, []
    for sentence in sentences:
        for index, label, start, end in sentence.spans:
            report.spans.setdefault((index, label), []).append((name, at + start, at + end))
        for label, value in sentence.labels:
            if _RANK[value] > _RANK.get(report.labels[label], 0):
                report.labels[label] = value
        parts.append(sentence.text)
        at += len(sentence.text) + 1
    return " ".join(parts)


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
    if taken <= set(_PHRASES["outside_the_lungs"]) and rng.random() < 0.6:
        body.append(_Sentence(_pick(rng, _PHRASES["clear"])))
    if healthy:
        summary.append(_Sentence(_pick(rng, _PHRASES["normal"])))
        summary += _negatives(taken, rng, int(rng.integers(0, 3)))
    else:
        summary += _negatives(taken, rng, int(rng.choice([0, 1, 2], p=[0.3, 0.5, 0.2])))
    report.findings = _section("findings", _shuffled(body, rng), report)
    report.impression = _section("impression", _shuffled(summary, rng), report)
    report.labels["No Finding"] = 1.0 if healthy else 0.0
    return report
