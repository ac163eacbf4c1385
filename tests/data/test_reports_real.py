"""Sections, sentences and tokens measured on the 3,955 real reports of Open-I, and on any text at all."""

import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria_core.data.reports import clean_report, published_sentences, sections, sentences
from gloria_core.data.sources.mimic_cxr import mimic_sections, unwrapped
from gloria_core.data.tokenizer import tokenize, train_wordpiece
from gloria_core.types import TextBatch

PIECES = [
    "1.",
    "2)",
    "2.5 cm",
    " ",
    "\n",
    "\n\n",
    "\n \n",
    ".",
    "...",
    "Dr.",
    "XXXX",
    "___",
    "[**Name**]",
    "No",
    "-",
    "(",
]
PIECES += [
    "é",
    "\ufffd\ufffd",
    "FINDINGS:",
    "IMPRESSION",
    "Impression:",
    " CHEST (PA AND LAT): ",
    "\u2028",
    "\x00",
    "½",
    "ﬁ",
    "T12",
]
TEXTS = st.text() | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@pytest.fixture(scope="module")
def texts(open_i) -> list[str]:
    """The findings and impressions, in the order of their file names."""
    names = ("FINDINGS", "IMPRESSION")
    return [text for name in sorted(open_i) for label in names if (text := open_i[name].get(label, "").strip())]


@pytest.fixture(scope="module")
def cut(texts) -> list[tuple[str, str]]:
    """(sentence, the text it comes from)"""
    return [(text[start:end], text) for text in texts for start, end in sentences(text)]


@pytest.fixture(scope="module")
def tokenizer():
    words = "the lungs are clear no effusion or pneumothorax heart size is normal xxxx 2 5 cm nodule right left lobe"
    return train_wordpiece(
        [words, words.upper(), "a b c d e f g h i j k l m n o p q r s t u v w x y z . , : ( ) / - _"]
    )


def assert_partition(batch: TextBatch, texts: list[str]) -> None:
    """Every token has one word, every word one sentence; both count up without gaps; words are slices of the text."""
    for row, text in enumerate(texts):
        here = batch.attention_mask[row].bool()
        words, marks = batch.word_ids[row][here], batch.sentence_ids[row][here]
        assert (words >= 0).all() and (batch.word_ids[row][~here] == -1).all()
        assert words.unique().tolist() == list(range(int(words.max()) + 1))
        assert (words.diff() >= 0).all() and words[0] == 0 and (words == words[-1]).sum() == 1
        inner = marks[1:-1]
        assert marks[0] == marks[-1] == -1 and (inner >= 0).all() and (inner.diff() >= 0).all()
        owner = {}
        for word, mark in zip(words[1:-1].tolist(), inner.tolist(), strict=True):
            assert owner.setdefault(word, mark) == mark
        limits = sentences(text)
        for number, (start, end) in enumerate(batch.spans[row][1:-1], start=1):
            assert text[start:end] == batch.words[row][number]
            first, last = limits[owner[number]]
            assert first <= start < last


# --- the real reports ------------------------------------------------------------------------------------------------


def test_how_the_reports_split(texts, cut):
    assert len(texts) == 3955 * 2 - 530 - 34
    assert len(cut) == 22_852
    lengths = [len(sentence.split()) for sentence, _ in cut]
    assert max(lengths) <= 45 and 130 < sum(n == 1 for n in lengths) < 180
    # a sentence begins with a capital, a mark or a number; the reports themselves have a few that do not
    assert sum(sentence[0].islower() for sentence, _ in cut) == 47
    inner = [sentence for sentence, _ in cut if re.search(r"[a-z]\. [A-Z]", sentence)]
    assert len(inner) == 9 and all("Dr." in sentence for sentence in inner)


def test_decimals_marks_and_lists(texts, cut):
    decimals = sum(len(re.findall(r"\d\.\d", text)) for text in texts)
    assert decimals == 79 and sum(len(re.findall(r"\d\.\d", sentence)) for sentence, _ in cut) == decimals
    assert sum("XXXX" in sentence for sentence, _ in cut) == 2906
    assert sum(text.count("XXXX") for text in texts) == sum(sentence.count("XXXX") for sentence, _ in cut)
    listed = [text for text in texts if re.match(r"1\.\s", text) and re.search(r"\s2\.\s+[A-Z]", text)]
    assert len(listed) > 300
    for text in listed:
        starts = [text[start:end] for start, end in sentences(text)]
        assert starts[0].startswith("1.") and any(sentence.startswith("2.") for sentence in starts)
    # no list number is left at the end of the sentence before it
    assert not [sentence for sentence, _ in cut if re.search(r"[a-z]\. \d{1,2}\.$", sentence)]


def test_what_the_published_cleaning_loses(texts):
    """Why new models do not use it: numbers in front of a point, one-word sentences, whole impressions."""
    empty = [text for text in texts if not clean_report(text)]
    assert 10 <= len(empty) < 40 and all(len(published_sentences(text)) == 0 for text in empty)


def test_tokens_of_real_reports_are_partitioned(texts, tokenizer):
    some = random.Random(0).sample(texts, 400)
    assert_partition(tokenize(tokenizer, some, max_tokens=512), some)
    batch = tokenize(tokenizer, some, max_tokens=20)
    assert batch.input_ids.shape[1] == 20 and int(batch.word_ids.max()) <= 19


def test_open_i_as_one_raw_text(open_i):
    """Headings are found again when a report is written in the way of MIMIC-CXR, by both sets of rules."""
    for name in sorted(open_i)[:800]:
        parts = {label: text.strip() for label, text in open_i[name].items() if text.strip()}
        raw = "".join(f" {label}:  {text}\n \n" for label, text in parts.items())
        found = mimic_sections(raw)
        for label in ("FINDINGS", "IMPRESSION"):
            assert found.get(label.lower(), "") == parts.get(label, "") or name == "2415.xml"


# --- any text --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_no_text_crashes_the_rules(text):
    for part in sections(text).values():
        # a blank line joins a section that came twice
        assert part.strip() and all(piece in text for piece in part.split("\n\n"))
    for name, part in mimic_sections(text).items():
        assert name and "".join(part.split()) in "".join(text.split())
    assert "".join(unwrapped(text).split()) == "".join(text.split())
    for behavior in ("corrected", "published"):
        assert all(0 <= start < end <= len(text) for start, end in sentences(text, behavior))


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.integers(3, 40))
def test_tokens_of_any_text_are_partitioned(tokenizer, texts, max_tokens):
    batch = tokenize(tokenizer, texts, max_tokens=max_tokens, allow_empty=True)
    assert batch.input_ids.shape[1] <= max_tokens and torch.equal(batch.word_ids >= 0, batch.attention_mask.bool())
    assert_partition(batch, texts)
