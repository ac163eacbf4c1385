"""Sections, sentences and GLoRIA's cleaning, on hand-written reports, golden strings and arbitrary text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_kit import golden_files

from gloria_core.data.reports import clean_report, legacy_cap_len, published_sentences, sections, sentences


def cut(text, behavior="corrected"):
    return [text[start:end] for start, end in sentences(text, behavior)]


# ------------------------------------------------------------------------------------------------------ golden

GOLDEN = [
    pytest.param(case, id=f"parity-{path.stem}-{number}")
    for path in golden_files("gloria", "text_cleaning*.json")
    for number, case in json.loads(path.read_text(encoding="utf-8"))["cases"].items()
]


@pytest.mark.parametrize("case", GOLDEN)
def test_cleaning_equals_the_released_code(case):
    assert clean_report(case["raw"]) == case["cleaned"]
    assert legacy_cap_len(case["raw"]) == case["legacy_cap_len"]


# ---------------------------------------------------------------------------------------------------- sections


def test_sections_by_line_and_within_a_line():
    text = (
        "FINAL REPORT\nINDICATION: Cough.\nTechnique: PA and lateral. COMPARISON: None.\n\n"
        "FINDINGS:\nLungs: clear.\nHeart size is 2.5 cm.\n\nImpression: Normal."
    )
    assert sections(text) == {
        "preamble": "FINAL REPORT",
        "history": "Cough.",
        "technique": "PA and lateral.",
        "comparison": "None.",
        "findings": "Lungs: clear.\nHeart size is 2.5 cm.",
        "impression": "Normal.",
    }


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("CONCLUSION:", "impression"),
        ("Impressions :", "impression"),
        ("FINDINGS AND IMPRESSION:", "impression"),
        ("FINDINGS/IMPRESSION:", "impression"),
        ("IMPRESSION\n", "impression"),
        ("findings:", "findings"),
        ("CLINICAL HISTORY:", "history"),
        ("HISTORY/INDICATION:", "history"),
        ("REASON FOR THIS EXAMINATION:", "history"),
        ("COMPARISON STUDY:", "comparison"),
        ("RECOMMENDATION:", "other"),
    ],
)
def test_headings(heading, name):
    assert sections(f"{heading} all is well") == {name: "all is well"}


HEADS = [
    "{}:",
    "{} :",
    "**{}:**",
    "**{}**:",
    "__{}__:",
    "**{}**",
    "## {}",
    "# {} #",
    "## {}:",
    "<b>{}:</b>",
    "<b>{}</b>",
]
HEADS += ["<h2>{}</h2>", "<p><strong>{}</strong>:", "{}：", "{}﹕", "{} -", "{} –", "{} —", "{}-", "\t{}:", "   {}:"]
HEADS += ["\ufeff{}:", "\u3000{}：", "\xa0{}\xa0:", "*{}:*", "_{}_ -"]


@pytest.mark.parametrize("line", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("between", ["{line}", "{line}{line}", " "], ids=["below", "after a blank line", "beside"])
@pytest.mark.parametrize("capitals", [True, False])
@pytest.mark.parametrize("head", [*HEADS, "{}"])
def test_every_way_to_write_a_heading(head, capitals, between, line):
    findings, impression = ("FINDINGS", "IMPRESSION") if capitals else ("Findings", "Impression")
    between = between.format(line=line)
    first, second = (head.format(name) + between for name in (findings, impression))
    text = f"{first}Heart is 2.5 cm.{line}Clear.{line}{line}{second}Normal."
    ends = between != " " and (capitals or head != "{}")  # a heading without colon or dash has a line of its own
    if ends or any(sign in head for sign in ":：﹕-–—"):
        found = sections(text)
        assert found == {"findings": f"Heart is 2.5 cm.{line}Clear.", "impression": "Normal."}
        assert all(part in text for part in found.values())  # as it was written: spans point into it
    else:
        assert sections(text) == {"impression": text}


def test_line_breaks_of_html_and_headings_after_a_sentence():
    assert sections("FINDINGS: a.<br>IMPRESSION: b.<br/>RECOMMENDATION - c.") == {
        "findings": "a.",
        "impression": "b.",
        "other": "c.",
    }
    assert sections("FINDINGS - Clear. IMPRESSION - Normal.") == {"findings": "Clear.", "impression": "Normal."}


def test_what_is_no_heading():
    for plain in (
        "The findings: of note.\nFindings\nare unchanged",
        "The findings: of note.\r\nFindings\r\nare unchanged",
        "Findings-based reading.\nStudy is limited.",
        "Impression of a mass\non the left.",
        "**Findings** are unchanged.",
        "Limited. Study - as far as it goes - is normal.",
    ):
        assert sections(plain) == {"impression": plain}
    assert sections("No acute disease.") == {"impression": "No acute disease."}
    assert sections(" \n") == {}
    assert sections("FINDINGS: \nIMPRESSION: Normal.") == {"impression": "Normal."}


def test_a_repeated_section_is_joined():
    assert sections("IMPRESSION: a.\nFINDINGS: b.\nIMPRESSION: c.") == {"impression": "a.\n\nc.", "findings": "b."}


# --------------------------------------------------------------------------------------------------- sentences


@pytest.mark.parametrize(
    "parts",
    [
        ["A 2.5 cm nodule, previously 1.8 cm.", "No effusion."],
        ["Measures .5 cm.", "Stable."],
        ["1. Stable cardiomegaly.", "2. No pneumothorax.", "3. Small left effusion, unchanged."],
        ["1. Clear lungs", "2. No effusion", "3. Stable"],
        ["1.Clear lungs\n", "2.No acute disease"],
        ["- clear lungs\n", "- no effusion"],
        ["Nodule measures 12.", "No change."],
        ["Lungs clear", "1. No effusion", "2. No edema"],
        ["Grade 1.", "No effusion."],
        ["Seen by Dr. Smith."],
        ["Seen by Dr. Smith at 4 a.m. on call.", "Tube vs. line."],
        ["Called at 5:00 p.m.", "Understood by Dr. J. Smith."],
        ["Discussed with Dr. ___ on ___.", "XXXX XXXX, unremarkable.", "No XXXX."],
        ["lungs are clear.", "no effusion.", "no pneumothorax"],
        ["Edema?", "Yes!", "Unchanged (see note.)", "Then stable..."],
        ["One line\nis wrapped.\n\n", "New paragraph"],
        ["One line\r\nis wrapped\r\n\r\n", "New paragraph\r\n", "1. Clear\r\n", "2. Stable"],
        ["One line\ris wrapped\r\r", "New paragraph\r", "- clear\r", "- stable"],
        ["No. 3 tube is in place.", "St. Jude valve.", "No."],
    ],
    ids=lambda parts: parts[0][:24],
)
def test_sentences(parts):
    assert cut(" ".join(parts)) == [part.strip() for part in parts]


def test_a_missing_blank_ends_a_sentence_and_a_dotted_name_does_not():
    assert cut("Lungs clear.No effusion. See www.site.org for p.o. intake") == [
        "Lungs clear.",
        "No effusion.",
        "See www.site.org for p.o. intake",
    ]


def test_pieces_without_a_word_join_a_neighbour():
    assert cut("... Clear. . Normal. 4.") == ["... Clear. .", "Normal. 4."]
    assert cut("...") == ["..."]
    assert cut("  ") == []


def test_published_rule_cuts_decimals_and_drops_single_words():
    text = "1. Clear lungs. Normal. A 2.5 cm nodule"
    assert cut(text, "published") == ["Clear lungs", "5 cm nodule"]
    assert published_sentences(text) == ["clear lungs", "5 cm nodule"]
    with pytest.raises(ValueError, match="neither"):
        sentences(text, "neither")


def test_published_word_limit_is_an_equality():
    assert published_sentences("one two. one two three. four five", word_limit=5) == ["one two", "one two three"]
    assert published_sentences("a b c. d e f. g h", word_limit=5) == ["a b c", "d e f", "g h"]


PIECES = st.sampled_from(
    ["1.", "2.", " ", "\n", "\n\n", ".", "Dr.", "XXXX", "___", "No", "2.5", "-", "(", "é", "\ufffd"]
)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(PIECES, max_size=30).map("".join))
def test_sentences_partition_any_text(text):
    spans = sentences(text)
    covered = [position for start, end in spans for position in range(start, end)]
    assert covered == sorted(set(covered))
    assert all(text[i].isspace() for i in set(range(len(text))) - set(covered))
    assert all(text[start:end] == text[start:end].strip() != "" for start, end in spans)
    assert all(part in text for part in sections(text).values())


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(PIECES, max_size=30).map("".join))
def test_published_spans_are_the_cleaned_sentences(text):
    assert [published_sentences(piece) for piece in cut(text, "published")] == [
        [sentence] for sentence in published_sentences(text)
    ]


def test_open_i_reports(open_i):
    """3,955 real reports: the sections found are those of the archive, and sentences are of a believable length."""
    different, counts = [], []
    for name, parts in open_i.items():
        raw = "\n".join(f"{label}: {text}" for label, text in parts.items())
        found = sections(raw)
        for label in ("FINDINGS", "IMPRESSION"):
            text = parts.get(label, "").strip()
            if found.get(label.lower(), "") != text:
                different.append(name)
            counts += [len(text[start:end].split()) for start, end in sentences(text)]
    assert len(open_i) == 3955
    assert different == ["2415.xml"]  # its impression holds a second report with headings
    assert 22000 < len(counts) < 24000
    assert 5 < sum(counts) / len(counts) < 9
    assert max(counts) < 60
