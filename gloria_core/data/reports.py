"""Radiology reports as text: sections, sentences, GLoRIA's cleaning, and the texts that a study is trained with.

GLoRIA: Huang et al., ICCV 2021, https://github.com/marshuang80/gloria (`gloria_model.py::process_text` and
`datasets/pretraining_dataset.py`). Sentences are character ranges of the text as it was written, so that a word under
an attention map can be found again in the report. Two texts a study follow CXR-CLIP (You et al. 2023, section 2.1).
"""

import re
from collections.abc import Iterator, Sequence
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
_BLANK = r"[ \t\xa0\u3000\ufeff]*"  # with no-break, full-width and zero-width ones
# A heading opens a line or follows a sentence end, perhaps marked in Markdown or HTML. It needs its colon, a dash, or a
# line of its own; the last, and a dash within a line, in capitals or marks.
_HEADING = re.compile(
    rf"(?:(?:^|(?<=\r)|<br\s*/?>){_BLANK}|(?<=[.!?])(?:(?P<inside>[ \t]+)|\s+))(?P<mark>(?:#+{_BLANK}|[*_]+|<\w+>)*)(?:"
    + "|".join(f"(?P<{name}>{pattern})" for name, pattern in _HEADINGS.items())
    + rf"){_BLANK}(?:[*_]+|</\w+>)*{_BLANK}"
    + r"(?:[:：﹕](?:[*_]+|</\w+>)*|(?P<dash>[-–—]+(?=\s|\Z))|(?P<alone>#*[ \t]*(?=[\r\n]|\Z)))",
    re.IGNORECASE | re.MULTILINE,
)


def sections(text: str) -> dict[Section, str]:
    """Splits a raw report at its headings.

    Headings are found in any case, at the start of a line (ended by LF, CR LF or CR) or after a sentence end, and end
    with a colon (also a full-width one) or a dash; in capitals or marked (`**FINDINGS**`, `## Findings`, `<b>`) they
    may also stand alone on a line. `CONCLUSION` counts as impression, `INDICATION` and `REASON FOR EXAM` as
    history; `FINDINGS AND IMPRESSION` is kept once, as impression. Words before the first heading are `preamble`. A
    section that occurs twice is joined by a blank line.

    A text without any heading is an impression: that is how label-made texts and impression-only tables arrive.

    Returns: section -> text without its heading, stripped; only sections that have text.
    """
    found: list[tuple[Section, int, int]] = []
    for match in _HEADING.finditer(text):
        name = next(name for name in _HEADINGS if match[name] is not None)
        bare = match["alone"] is not None or (match["dash"] and match["inside"])
        if bare and not (match["mark"] or match[name].isupper()):
            continue
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
_PUBLISHED_STOP = re.compile(r"[0-9]+\.|\.")
_STOP = re.compile(
    r"[.!?]+[\"'”’)\]]*|(?>\r\n|\n|\r)[ \t]*(?>\r\n|\n|\r)\s*"
    r"|(?:\r\n|\n|\r)\s*(?=[-*•]\s|\(?[0-9]{1,2}[.)](?![0-9]))"
)
_MARKER = re.compile(r"\s*\(?([0-9]{1,2})[.)](?![0-9])")
_ITEM = re.compile(r"(?:^|(?<=\s))([0-9]{1,2})[.)]\s*(?=[A-Z])")
_WORD_BEFORE = re.compile(r"[\w.]+$")
_TRIMMED = re.compile(r"\S(?:.*\S)?", re.DOTALL)
_GAP_BEFORE = re.compile(r"[\s(]*\Z")
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
        cuts = [match.span() for match in _PUBLISHED_STOP.finditer(text)]
        spans = _trimmed(text, [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)])
        return [span for span in spans if len(_WORDS.findall(text[slice(*span)].lower())) > 1]
    if behavior != "corrected":
        raise ValueError(f"behavior is {behavior!r}; it must be 'corrected' or 'published'")
    stops = {match.end() for match in _STOP.finditer(text) if _is_boundary(text, match)}
    cuts = sorted(stops | _list_cuts(text))
    spans: list[Span] = []
    for span in _trimmed(text, [0, *cuts], [*cuts, len(text)]):
        # A piece without a letter or with a list number only is no sentence: it joins the one before, or the next.
        if spans and (_is_fragment(text, spans[-1]) or not _WORDS.search(text, *span)):
            spans[-1] = (spans[-1][0], span[1])
        else:
            spans.append(span)
    if len(spans) > 1 and _is_fragment(text, spans[-1]):
        last = spans.pop()
        spans[-1] = (spans[-1][0], last[1])
    return spans


def _trimmed(text: str, starts: Sequence[int], ends: Sequence[int]) -> list[Span]:
    """The pieces of the text without the blanks around them; those of blanks only are left out."""
    pieces = (_TRIMMED.search(text, start, end) for start, end in zip(starts, ends, strict=True))
    return [piece.span() for piece in pieces if piece]


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
    after = _TRIMMED.search(text, end)
    following = after.group()[0] if after else ""
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
    start = _GAP_BEFORE.search(text, 0, position).start()
    return start == 0 or text[start - 1] in ".!?:;)" or not {"\n", "\r"}.isdisjoint(text[start:position])


def _list_cuts(text: str) -> set[int]:
    """Cuts before the items of a numbered list that is written on one line; a list has at least the items 1 and 2."""
    items: list[int] = []
    for match in _ITEM.finditer(text):
        if int(match[1]) == len(items) + 1:
            items.append(match.start())
    return set(items) if len(items) > 1 else set()


# ------------------------------------------------------------------------------------------- GLoRIA's own rules


def published_sentences(text: str, *, word_limit: int | None = None) -> list[str]:
    """Cleaned sentences of a report by GLoRIA's released rule (lower case, `\\w+` words, ASCII only).

    Sentences of at most one word are dropped, so "Normal." is lost and "Edema" gives an empty list. With `word_limit`
    reading stops after the sentence at which the running number of words *equals* the limit, as
    `pretraining_dataset.py` does with 5; a count that jumps over the limit does not stop it.
    """
    cleaned: list[str] = []
    count = 0
    for start, end in sentences(text, "published"):
        ascii_words = [word.encode("ascii", "ignore").decode() for word in _WORDS.findall(text[start:end].lower())]
        words = [word for word in ascii_words if word]
        cleaned.append(" ".join(words))
        count += len(words)
        if count == word_limit:
            break
    return cleaned


def clean_report(text: str) -> str:
    """The string that GLoRIA's released inference code hands to the tokenizer (`gloria_model.py::process_text`).

    May be empty: that of a one-word query such as "Edema" is. `tasks.features.text_features` then takes the text as it
    is, and `gloria_api` the empty string, as the released code does.
    """
    return " ".join(published_sentences(text))


def legacy_cap_len(text: str) -> int:
    """Word window of GLoRIA's released inference code: the *characters* of the raw text other than "["."""
    return len(text) - text.count("[")


# ----------------------------------------------------------------------------------------- the texts of a dataset

# Column of a section's other wording, such as its translation to another language and back.
AUGMENTED = "meta_{section}_augmented"


class StudyTexts:
    """Texts for every row of a manifest frame, drawn with a generator that the caller gives.

    text: the section that is read; "both" has findings and impression, or whichever of them has text.
    sentence: "all" the section whole, "random" one sentence of it, "published" one sentence by GLoRIA's released rule.
        A text of which that rule leaves nothing ("Normal.") is read whole, as it is.
    augmented: read a section in its other wording (columns `meta_findings_augmented`, `meta_impression_augmented`) half
        of the time, where the study has one; a section that is shown twice is shown in both wordings.
    prompts: studies whose section is empty get a report from their labels (`report_from_labels`), drawn anew for every
        text, or with `fixed` the deterministic one.

    Raises: ReportError naming studies without text (with `prompts`: without labels either), PromptError for a label
    that lacks a sentence some study may need, ValueError where no section has another wording.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        *,
        text: Literal["impression", "findings", "both"],
        sentence: Literal["all", "random", "published"],
        augmented: bool = False,
        prompts: PromptSet | None = None,
        fixed: bool = False,
    ) -> None:
        columns = ("findings", "impression") if text == "both" else (text,)
        self.sentence, self.prompts, self.fixed = sentence, prompts, fixed
        self._sections = _wordings(frame, columns, augmented=augmented)
        names = finding_columns(frame) if prompts else []
        values = frame[names].to_numpy(float)
        empty = [i for i, sections in enumerate(self._sections) if not sections]
        self._labels = {i: dict(zip(names, values[i].tolist(), strict=True)) for i in empty}
        unknown = [i for i in empty if np.isnan(values[i]).all()]
        if unknown:
            listed = ", ".join(frame["study_id"].iloc[unknown[:5]].astype(str)) + (", ..." if unknown[5:] else "")
            what = " or ".join([*columns, *(["label"] if prompts else [])])
            remedy = "exclude them" if text == "both" else "use text='both', or exclude them"
            raise ReportError(f"no {what} in {len(unknown)} studies (study_id {listed}); {remedy}")
        self._check_prompts()

    def draw(self, index: int, count: int, rng: np.random.Generator) -> list[tuple[str, tuple[Span, ...]]]:
        """`count` texts of study `index`, each with the spans of its sentences."""
        return [self._cut(sections, rng) for sections in self._whole(index, count, rng)]

    def _whole(self, index: int, count: int, rng: np.random.Generator) -> Iterator[list[str]]:
        """The sections of each text before a sentence is cut from them, one after the other: cutting draws, too."""
        sections = self._sections[index]
        if sections and self.sentence == "all" and count > 1:
            order, other = rng.permutation(len(sections)).tolist(), {}
            for number in (order * count)[:count]:
                other[number] = not other[number] if number in other else rng.random() < 0.5
                own, second = sections[number]
                yield [second if second and other[number] else own]
            return
        for _ in range(count):
            if sections:
                yield [second if second and rng.random() < 0.5 else own for own, second in sections]
            else:
                yield [report_from_labels(self._labels[index], self.prompts, rng=None if self.fixed else rng)]

    def _cut(self, sections: list[str], rng: np.random.Generator) -> tuple[str, tuple[Span, ...]]:
        text = "\n\n".join(sections)  # a blank line ends a sentence, so no sentence runs across sections
        if self.sentence == "published":
            cleaned = [one for own in sections for one in published_sentences(own, word_limit=5) if one] or [text]
            text = cleaned[rng.integers(len(cleaned))]
            return text, ((0, len(text)),)
        spans = sentences(text)
        if self.sentence == "random":
            start, end = spans[rng.integers(len(spans))]
            return text[start:end], ((0, end - start),)
        return text, tuple(spans)

    def _check_prompts(self) -> None:
        """Raise PromptError now for a sentence that would be missing in the middle of an epoch."""
        kinds = {1.0: "pos"} if self.fixed else {1.0: "pos", -1.0: "unc"}
        needed = set()
        for labels in self._labels.values():
            said = {(name, kinds[value]) for name, value in labels.items() if value in kinds and name != NO_FINDING}
            needed |= said or {(NO_FINDING, "pos")}
        for name, kind in sorted(needed):
            zero_shot_prompts(self.prompts, name, kind=kind)


def _wordings(frame: pd.DataFrame, columns: tuple[str, ...], *, augmented: bool) -> list[list[tuple[str, str]]]:
    """For each study its sections that have text, each with its other wording ("" where there is none)."""
    names = [AUGMENTED.format(section=column) for column in columns]
    if augmented and not set(names) & set(frame.columns):
        raise ValueError(f"augmented_texts: the manifest has no column {' or '.join(names)}")
    rows: list[list[tuple[str, str]]] = [[] for _ in range(len(frame))]
    for column, name in zip(columns, names, strict=True):
        texts = frame.reindex(columns=[column, name]).fillna("").astype(str)
        others = texts[name] if augmented else [""] * len(frame)
        for row, study, own, other in zip(rows, frame["study_id"], texts[column], others, strict=True):
            if own.strip():
                row.append((own, other if other.strip() else ""))
            elif other.strip():
                raise ReportError(f"study {study}: {name} has text, but {column} is empty; give it or clear {name}")
    return rows
