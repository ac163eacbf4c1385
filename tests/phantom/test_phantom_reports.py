"""Reports of the phantom, read by an independent rule-based labeller."""

import math
import re

import pytest

from gloria_core import phantom
from gloria_core.data.prompts import load_prompts
from gloria_core.phantom.disease import course
from gloria_core.phantom.patient import WORDS, stream
from gloria_core.phantom.report import compose

SEED = 5
MENTIONS = {
    "Enlarged Cardiomediastinum": r"mediastin",
    "Cardiomegaly": r"cardiomegaly|\bheart\b|cardiac (silhouette|enlargement)|cardiomediastinal silhouette is normal",
    "Lung Opacity": r"opacity",
    "Lung Lesion": r"nodule|\bmass\b",
    "Edema": r"edema|vascular congestion",
    "Consolidation": r"consolidation",
    "Pneumonia": r"pneumonia",
    "Atelectasis": r"atelectasis|volume loss",
    "Pneumothorax": r"pneumothorax",
    "Pleural Effusion": r"effusion|pleural fluid",
    "Pleural Other": r"pleural (thickening|scarring)",
    "Fracture": r"fracture",
    "Support Devices": r"tube|catheter|central line|pacemaker|wires|leads|drain|support devices|lines",
}
NEGATED = re.compile(r"^no\b|there is no|no evidence|\bnot (enlarged|widened)|\bnormal\b|without effusion", re.I)
UNSURE = re.compile(r"possible|cannot|questionable|may (represent|be)|suspected", re.I)


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[a-zA-Z])\. ?", text)


def read_labels(text: str) -> dict[str, float]:
    """Labels of a report: certain beats uncertain beats denied."""
    found = {}
    rank = {1.0: 3, -1.0: 2, 0.0: 1}
    for sentence in sentences(text):
        for label, pattern in MENTIONS.items():
            if not re.search(pattern, sentence, re.I):
                continue
            value = 0.0 if NEGATED.search(sentence) else -1.0 if UNSURE.search(sentence) else 1.0
            # "opacity may represent pneumonia": the opacity is certain, its cause is not
            if label == "Lung Opacity" and value == -1.0 and "pneumonia" in sentence:
                value = 1.0
            if rank[value] > rank.get(found.get(label), 0):
                found[label] = value
    return found


@pytest.fixture(scope="module")
def reports() -> list:
    return [
        (findings, compose(findings, stream(SEED, p, k, WORDS)))
        for p in range(900)
        for k, findings in enumerate(course(SEED, p), start=1)
    ]


def test_labels_follow_the_text(reports):
    for _, report in reports:
        told = read_labels(report.findings + " " + report.impression)
        for label in MENTIONS:
            value = report.labels[label]
            expected = told.get(label, math.nan)
            assert value == expected or (math.isnan(value) and math.isnan(expected)), (label, report)


def test_no_finding_means_nothing_but_devices(reports):
    for _, report in reports:
        others = [v for label, v in report.labels.items() if label not in ("No Finding", "Support Devices")]
        assert report.labels["No Finding"] == float(not any(v in (1, -1) for v in others))


def test_text_is_well_formed(reports):
    for _, report in reports:
        for text in (report.findings, report.impression):
            assert text == text.strip()
            assert not re.search(r"  |\[|\]|\{|\}| [.,]|\.\.|\b(a|an) (a|an)\b|\ba [aeio]", text), text
            assert all(s[:1].isupper() or s[:1].isdigit() for s in sentences(text) if s), text
        assert report.impression


def test_impression_summarises(reports):
    for findings, report in reports:
        told = read_labels(report.impression)
        for finding in findings:
            if finding.label != "Support Devices":
                assert told[finding.label] in (1, -1), (finding, report.impression)


def test_spans_are_the_words_of_their_finding(reports):
    checked = 0
    for findings, report in reports:
        for (index, label), spans in report.spans.items():
            finding = findings[index]
            assert spans
            for section, start, end in spans:
                text = {"findings": report.findings, "impression": report.impression}[section]
                words = text[start:end]
                assert words == words.strip()
                assert (start == 0 or not text[start - 1].isalnum()) and not text[end : end + 1].isalnum()
                assert "." not in re.sub(r"\d\.\d", "", words)
                if finding.side in ("left", "right"):
                    assert finding.side in words.lower(), (words, finding)
                    other = {"left": "right", "right": "left"}[finding.side]
                    assert other not in words.lower()
                pattern = MENTIONS[label] + r"|costophrenic|perihilar vessels|apical|patchy"
                assert re.search(pattern, words, re.I), (label, words)
                checked += 1
    assert checked > 1500


def test_every_finding_is_named(reports):
    for findings, report in reports:
        assert {index for index, _ in report.spans} == set(range(len(findings)))


def test_report_language_varies(reports):
    impressions = [report.impression for _, report in reports]
    assert len(set(impressions)) > 0.7 * len(impressions)
    assert sum("No " in text for text in impressions) > 0.4 * len(impressions)


def test_prevalences_and_exclusive_studies(reports):
    n, alone = len(reports), dict.fromkeys(phantom.COMPETITION, 0)
    for _, report in reports:
        present = [label for label, value in report.labels.items() if value in (1, -1) and label != "No Finding"]
        if len(present) == 1 and present[0] in alone and report.labels[present[0]] == 1:
            alone[present[0]] += 1
    for label in phantom.COMPETITION:
        share = sum(report.labels[label] == 1 for _, report in reports) / n
        assert 0.10 < share < 0.25, (label, share)
        assert alone[label] / n > 0.03, (label, alone[label])
    assert 0.17 < sum(report.labels["No Finding"] == 1 for _, report in reports) / n < 0.32
    for label in phantom.LABELS:
        assert any(report.labels[label] == 1 for _, report in reports)
        assert any(report.labels[label] == 0 for _, report in reports)


def test_half_of_the_uncertain_findings_are_not_drawn(reports):
    drawn = [finding.drawn for findings, _ in reports for finding in findings if finding.uncertain]
    assert 0.35 < sum(drawn) / len(drawn) < 0.65
    assert all(finding.drawn for findings, _ in reports for finding in findings if not finding.uncertain)


def test_prompts_speak_the_language_of_the_reports(reports):
    prompts = load_prompts("phantom")
    assert list(prompts.classes) == list(phantom.LABELS)
    known = {word for _, r in reports for word in re.findall(r"[a-z-]+", (r.findings + " " + r.impression).lower())}
    for label, kinds in prompts.classes.items():
        assert 4 <= len(kinds["pos"]) <= 6
        assert 3 <= len(kinds["neg"]) <= 4
        for sentence in [s for texts in kinds.values() for s in texts]:
            unknown = set(re.findall(r"[a-z-]+", sentence.lower())) - known
            assert not unknown, (label, sentence, unknown)
        if label != "No Finding":
            assert all(read_labels(sentence).get(label) == 1 for sentence in kinds["pos"]), label
            assert not any(read_labels(sentence).get(label) == 1 for sentence in kinds["neg"]), label
