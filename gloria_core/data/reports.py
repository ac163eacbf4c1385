"""Radiology reports as text: sections, sentences, and the cleaning that GLoRIA's released code applies.

GLoRIA: Huang et al., ICCV 2021, https://github.com/marshuang80/gloria (`gloria_model.py::process_text` and
`datasets/pretraining_dataset.py`). Everything here works on character positions of the text as it was written, so that
a word under an attention map can be found again in the report.

The texts of studies: which section is read, in which wording, and which part of it; or a report made from labels.

`StudyDataset` is the door to this module. Two texts a study follow CXR-CLIP (You et al. 2023, section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import finding_columns
from gloria_core.data.prompts import NO_FINDING, PromptSet, report_from_labels, zero_shot_prompts
from gloria_core.types import Behavior

Section = Literal["findings", "impression", "history", "technique", "examination", "comparison", "preamble", "other"]
Span = tuple[int, int]

_WORDS = re.compile(r"\w+")


class ReportError(ValueError):
    """A report cannot be used as it is; the message names the study and the remedy."""


# ---------------------------------------------------------------------------------------------------- sections

# Longer headings come first within a section: the first alternative that fits wins.
_HEADINGS: dict[Section, str] = {
    # A combined section is kept once, as the impression: it holds what the reader concluded, and the study reads the
    # impression by default. Copying it into both would double the text of text="both".
    "impression": r"findings?\s*(?:and|&|/)\s*(?:impressions?|conclusions?)"
    r"|impressions?\s*(?:and|&|/)\s*findings?|(?:final\s+)?impressions?|conclusions?|opinion",
    "findings": r"(?:chest\s+)?findings?",
    "history": r"(?:clinical\s+)?(?:history|indications?|information)"
    r"(?:\s*(?:and|&|/)\s*(?:clinical\s+)?(?:history|indications?|information))?"
    r"|reason\s+for\s+(?:this\s+)?(?:exam(?:ination)?|study)",
    "technique": r"techniques?|procedure",
    "examination": r"exam(?:ination)?|study",
    "comparison": r"comparisons?(?:\s+(?:study|studies|exams?|films?))?",
    "other": r"recommendations?|notifications?|addendum|wet\s+read",
}
# A heading opens a line or follows a sentence end. It needs its colon, or a line of its own in capitals.
_HEADING = re.compile(
    r"(?:^[ \t]*|(?<=[.!?])\s+)(?:"
    + "|".join(f"(?P<{name}>{pattern})" for name, pattern in _HEADINGS.items())
    + r")(?:[ \t]*:|(?P<alone>[ \t]*$))",
    re.IGNORECASE | re.MULTILINE,
)


def sections(text: str) -> dict[Section, str]:
    """Splits a raw report at its headings.

    Headings are found in any case, at the start of a line or after a sentence end, and end with a colon; in capitals
    they may also stand alone on a line. `CONCLUSION` counts as impression, `INDICATION` and `REASON FOR EXAM` as
    history; `FINDINGS AND IMPRESSION` is kept once, as impression. Words before the first heading are `preamble`. A
    section that occurs twice is joined by a blank line.

    A text without any heading is an impression: that is how label-made texts and impression-only tables arrive.

    Returns: section -> text without its heading, stripped; only sections that have text.
    """
    found: list[tuple[Section, int, int]] = []
    for match in _HEADING.finditer(text):
        if match["alone"] is not None and not match.group().isupper():
            continue
        name = next(name for name in _HEADINGS if match[name] is not None)
        found.append((name, match.start(), match.end()))
    if not found:
        return {"impression": text.strip()} if text.strip() else {}
    pieces: list[tuple[Section, str]] = [("preamble", text[: found[0][1]])]
    ends = [start for _, start, _ in found[1:]] + [len(text)]
    pieces += [(name, text[start:end]) for (name, _, start), end in zip(found, ends, strict=True)]
    result: dict[Section, str] = {}
    for name, piece in pieces:
        if piece.strip():
            result[name] = f"{result[name]}\n\n{piece.strip()}" if name in result else piece.strip()
    return result


# --------------------------------------------------------------------------------------------------- sentences

# Abbreviations that never close a sentence.
_NEVER = {"dr", "drs", "mr", "mrs", "ms", "prof", "st", "vs", "e.g", "i.e", "approx", "fig", "resp", "cf", "incl"}
# Abbreviations that close a sentence only before a capital.
_SOFT = {"a.m", "p.m", "etc", "u.s", "b.i.d", "p.o", "inc", "jr", "sr", "min", "max", "wk", "wks", "yr"}
_STOP = re.compile(r"[.!?]+[\"'”’)\]]*|\n[ \t\r]*\n\s*|\n\s*(?=[-*•]\s|\(?[0-9]{1,2}[.)](?![0-9]))")
_MARKER = re.compile(r"\s*\(?([0-9]{1,2})[.)](?![0-9])")
_ITEM = re.compile(r"(?:^|(?<=\s))([0-9]{1,2})[.)]\s*(?=[A-Z])")
_WORD_BEFORE = re.compile(r"[\w.]+$")
_NEXT = re.compile(r"\S")
_TITLE_BEFORE = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof)\.\s*$")


def sentences(text: str, behavior: Behavior = "corrected") -> list[Span]:
    """Sentences of a report as (start, end) character ranges, in order, without surrounding blanks.

    corrected: splits at `.`, `!`, `?`, at blank lines and before list items, but not inside decimals ("2.5 cm"),
    list numbers ("1. ... 2. ...", which stay with their sentence) or abbreviations ("Dr.", "vs.", "a.m."). Single line
    breaks are taken for wrapped lines. De-identification marks (`XXXX`, `___`, `[**...**]`) are words. The ranges
    partition the text: every character that is not blank lies in exactly one.

    published: GLoRIA's rule. Splits at the pattern `[0-9]+\\.` and then at `.`, so decimals are cut and numbers before
    a point vanish; pieces of at most one word are dropped. The ranges therefore do not cover the text.

    Raises: ValueError for another behavior.
    """
    if behavior == "published":
        return [span for span in _published_pieces(text) if len(_WORDS.findall(text[slice(*span)].lower())) > 1]
    if behavior != "corrected":
        raise ValueError(f"behavior is {behavior!r}; it must be 'corrected' or 'published'")
    cuts = _list_cuts(text) | {match.end() for match in _STOP.finditer(text) if _is_boundary(text, match)}
    spans: list[Span] = []
    start = 0
    for cut in [*sorted(cuts), len(text)]:
        span = _stripped(text, start, cut)
        start = cut
        if span is None:
            continue
        # A piece without a letter or with a list number only is no sentence: it joins the one before, or the next.
        if spans and (_is_fragment(text, spans[-1]) or not _WORDS.search(text, *span)):
            spans[-1] = (spans[-1][0], span[1])
        else:
            spans.append(span)
    if len(spans) > 1 and _is_fragment(text, spans[-1]):
        last = spans.pop()
        spans[-1] = (spans[-1][0], last[1])
    return spans


def _stripped(text: str, start: int, end: int) -> Span | None:
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return (start, end) if start < end else None


def _is_fragment(text: str, span: Span) -> bool:
    piece = text[slice(*span)]
    return _WORDS.search(piece) is None or _MARKER.fullmatch(piece) is not None


def _is_boundary(text: str, match: re.Match[str]) -> bool:
    """Whether a run of stops (or a line break) ends a sentence; at the end of the text either answer will do."""
    if match.group()[0] not in ".!?":
        return True
    stop, end = match.start(), match.end()
    following = text[end : end + 1]
    before = _WORD_BEFORE.search(text, max(0, stop - 20), stop)
    word = before.group() if before else ""
    if not following.isspace():
        # "clear.No effusion": a missing blank, but not "2.5", "p.o.", "www.site.org" or "x.Y"
        return following.isupper() and len(word) > 2 and word.isalpha() and match.group() == "."
    if match.group() != ".":
        return True
    if _MARKER.fullmatch(word + ".") and _opens_sentence(text, before.start()):
        return False
    after = _NEXT.search(text, end)
    following = after.group() if after else ""
    lowered = word.lower()
    if lowered in _NEVER:
        return False
    if lowered == "no":  # "No. 3", but "Effusion: no."
        return not following.isdigit()
    if lowered in _SOFT:
        return following.isupper()
    # "Dr. J. Smith": an initial after a title
    earlier = text[max(0, before.start() - 8) : before.start()] if word else ""
    return not (len(word) == 1 and word.isupper() and _TITLE_BEFORE.search(earlier))


def _opens_sentence(text: str, position: int) -> bool:
    """Whether a line, a sentence or the text begins at `position`, so that a number there is a list number."""
    start = position
    while start > 0 and (text[start - 1].isspace() or text[start - 1] == "("):
        start -= 1
    return start == 0 or text[start - 1] in ".!?:;)" or "\n" in text[start:position]


def _list_cuts(text: str) -> set[int]:
    """Cuts before the items of a numbered list that is written on one line; a list has at least the items 1 and 2."""
    items: list[int] = []
    for match in _ITEM.finditer(text):
        if int(match[1]) == len(items) + 1:
            items.append(match.start())
    return set(items) if len(items) > 1 else set()


# ------------------------------------------------------------------------------------------- GLoRIA's own rules

_NUMBER_POINT = re.compile(r"[0-9]+\.")


def _published_pieces(text: str) -> list[Span]:
    """Pieces between `[0-9]+\\.` and `.`, stripped; empty ones left out."""
    cuts = [match.span() for match in re.finditer(r"[0-9]+\.|\.", text)]
    starts = [0] + [end for _, end in cuts]
    ends = [start for start, _ in cuts] + [len(text)]
    return [span for pair in zip(starts, ends, strict=True) if (span := _stripped(text, *pair)) is not None]


def published_sentences(text: str, *, word_limit: int | None = None) -> list[str]:
    """Cleaned sentences of a report by GLoRIA's released rule (lower case, `\\w+` words, ASCII only).

    Sentences of at most one word are dropped, so "Normal." is lost and "Edema" gives an empty list. With `word_limit`
    reading stops after the sentence at which the running number of words *equals* the limit, as
    `pretraining_dataset.py` does with 5; a count that jumps over the limit does not stop it.
    """
    kept: list[str] = []
    count = 0
    for point in _NUMBER_POINT.split(text.replace("\n", " ")):
        for piece in point.split("."):
            words = _WORDS.findall(piece.replace("\ufffd\ufffd", " ").lower())
            if len(words) <= 1:
                continue
            ascii_words = [word for word in (w.encode("ascii", "ignore").decode() for w in words) if word]
            kept.append(" ".join(ascii_words))
            count += len(ascii_words)
            if count == word_limit:
                return kept
    return kept


def clean_report(text: str) -> str:
    """The string that GLoRIA's released inference code hands to the tokenizer (`gloria_model.py::process_text`).

    May be empty: a one-word query such as "Edema" is.
    """
    return " ".join(published_sentences(text))


def legacy_cap_len(text: str) -> int:
    """Word window of GLoRIA's released inference code: the *characters* of the raw text other than "["."""
    return len(text) - text.count("[")


AUGMENTED = "meta_{section}_augmented"
"""Column of a section's other wording, such as its translation to another language and back."""


class StudyTexts:
    """Texts for every row of a manifest frame, drawn with a generator that the caller gives.

    text: the section that is read; "both" has findings and impression, or whichever of them has text.
    sentence: "all" the section whole, "random" one sentence of it, "published" one sentence by GLoRIA's released rule.
    augmented: read a section in its other wording (columns `meta_findings_augmented`, `meta_impression_augmented`) half
        of the time, where the study has one; a section that is shown twice is shown in both wordings.
    prompts: studies whose section is empty get a report from their labels (`report_from_labels`), with `n_negative`
        absent findings; `fixed` takes the deterministic one, which has no negatives.

    Raises: ReportError naming studies without text (with `prompts`: without labels either), PromptError for a label
    that lacks a sentence some study may need, ValueError for options that do not go together.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        *,
        text: Literal["impression", "findings", "both"],
        sentence: Literal["all", "random", "published"],
        augmented: bool = False,
        prompts: PromptSet | None = None,
        n_negative: int = 0,
        fixed: bool = False,
    ) -> None:
        columns = ("findings", "impression") if text == "both" else (text,)
        self.sentence, self.prompts, self.n_negative, self.fixed = sentence, prompts, n_negative, fixed
        if sentence == "published" and (augmented or prompts is not None):
            raise ValueError("sentence='published' cuts reports only; it takes no augmented_texts and no prompts")
        self._sections = _sections(frame, columns)
        self._other = _other_wordings(frame, columns) if augmented else None
        self._labels: dict[int, dict[str, float]] = {}
        if prompts is None:
            remedy = "use text='both', or exclude them" if len(columns) == 1 else "give them text or exclude them"
            _refuse_empty(self._sections, frame, f"the {' and '.join(columns)} of", remedy)
        else:
            self._labels = _labels(frame, [not row for row in self._sections])
            _check_prompts(prompts, self._labels.values(), n_negative=n_negative, fixed=fixed)
        if sentence == "published":
            self._sections = _published(self._sections, frame)

    def draw(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[Span, ...]]]:
        """`count` texts of study `index`, each with the spans of its sentences."""
        return [self._cut(text, rng) for text in self._whole(index, count, rng)]

    def _whole(self, index: int, count: int, rng: np.random.Generator) -> Iterator[str]:
        """The texts before a sentence is cut from them; each is drawn when it is asked for."""
        parts = self._sections[index]
        if not parts:
            for _ in range(count):
                yield self._from_labels(index, rng)
        elif self.sentence == "published":
            for _ in range(count):
                yield parts[rng.integers(len(parts))]
        elif self.sentence == "all" and count > 1:
            order, other = rng.permutation(len(parts)).tolist(), {}
            for number in (order * count)[:count]:
                other[number] = not other[number] if number in other else rng.random() < 0.5
                yield self._wording(index, number, other=other[number])
        else:
            for _ in range(count):
                # a blank line ends a sentence, so no sentence runs across sections
                yield "\n\n".join(self._wording(index, number, rng=rng) for number in range(len(parts)))

    def _wording(self, index: int, number: int, *, rng: np.random.Generator | None = None, other: bool = False) -> str:
        """Section `number`, in its other wording if `other`, or if the generator says so."""
        second = self._other[index][number] if self._other is not None else ""
        if not second:
            return self._sections[index][number]
        if rng is not None:
            other = rng.random() < 0.5
        return second if other else self._sections[index][number]

    def _from_labels(self, index: int, rng: np.random.Generator) -> str:
        if self.fixed:
            return report_from_labels(self._labels[index], self.prompts, deterministic=True)
        return report_from_labels(self._labels[index], self.prompts, rng=rng, n_negative=self.n_negative)

    def _cut(self, text: str, rng: np.random.Generator) -> tuple[str, tuple[Span, ...]]:
        if self.sentence == "published":
            return text, ((0, len(text)),)
        spans = sentences(text)
        if self.sentence == "random":
            start, end = spans[rng.integers(len(spans))]
            return text[start:end], ((0, end - start),)
        return text, tuple(spans)


def _cells(frame: pd.DataFrame, column: str) -> list[str]:
    return frame[column].fillna("").astype(str).tolist() if column in frame else [""] * len(frame)


def _sections(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The sections of every study that have text."""
    rows = zip(*(_cells(frame, column) for column in columns), strict=True)
    return [tuple(part for part in row if part.strip()) for row in rows]


def _other_wordings(frame: pd.DataFrame, columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """For every section that `_sections` keeps its other wording, "" where it has none."""
    names = [AUGMENTED.format(section=column) for column in columns]
    if not set(names) & set(frame.columns):
        raise ValueError(f"augmented_texts: the manifest has no column {' or '.join(names)}")
    found: list[tuple[str, ...]] = [()] * len(frame)
    for column, name in zip(columns, names, strict=True):
        cells = zip(_cells(frame, column), _cells(frame, name), strict=True)
        for i, (own, other) in enumerate(cells):
            if own.strip():
                found[i] += (other if other.strip() else "",)
            elif other.strip():
                study = frame["study_id"].iloc[i]
                raise ReportError(f"study {study}: {name} has text, but {column} is empty; give it or clear {name}")
    return found


def _published(parts: list[tuple[str, ...]], frame: pd.DataFrame) -> list[tuple[str, ...]]:
    cleaned = [tuple(s for part in row for s in published_sentences(part, word_limit=5) if s) for row in parts]
    _refuse_empty(cleaned, frame, "after GLoRIA's cleaning the text of", "exclude them, or use sentence='random'")
    return cleaned


def _labels(frame: pd.DataFrame, wanted: list[bool]) -> dict[int, dict[str, float]]:
    """Row -> labels by name, of the studies that get a report from them."""
    names = finding_columns(frame)
    values = frame[names].to_numpy(float)
    known = ~np.isnan(values).all(axis=1) | ~np.array(wanted, bool)
    _refuse_empty(known.tolist(), frame, "text and labels of", "give them either, or exclude them")
    return {i: dict(zip(names, values[i].tolist(), strict=True)) for i in np.flatnonzero(wanted).tolist()}


def _check_prompts(prompts: PromptSet, studies: Iterable[Mapping[str, float]], *, n_negative: int, fixed: bool) -> None:
    """Raise PromptError now for what would be lacking in the middle of an epoch."""
    kinds = {1.0: "pos"} if fixed else {1.0: "pos", -1.0: "unc"} | ({0.0: "neg"} if n_negative else {})
    wanted = set()
    for labels in studies:
        said = {(name, kinds[value]) for name, value in labels.items() if value in kinds and name != NO_FINDING}
        wanted |= said if any(kind != "neg" for _, kind in said) else said | {(NO_FINDING, "pos")}
    for name, kind in sorted(wanted):
        zero_shot_prompts(prompts, name, kind=kind)


def _refuse_empty(rows: Sequence[object], frame: pd.DataFrame, what: str, remedy: str) -> None:
    empty = [str(study) for row, study in zip(rows, frame["study_id"], strict=True) if not row]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ReportError(f"{what} {len(empty)} studies is empty (study_id {listed}); {remedy}")
