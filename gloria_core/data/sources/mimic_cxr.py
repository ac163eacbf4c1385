"""MIMIC-CXR-JPG (Johnson et al. 2019, https://physionet.org/content/mimic-cxr-jpg/): 377,110 images of 227,827 studies.

Reads the owner's tables and images and the reports of MIMIC-CXR (`mimic-cxr-reports.zip`, which is a download of its
own). Labels are those that the CheXpert or NegBio labeler mined from the reports.

Reports of MIMIC-CXR (Johnson et al. 2019, https://physionet.org/content/mimic-cxr/): a zip of texts, and sections.

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
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.manifest import CHEXPERT_LABELS, Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    VIEW_RULES,
    ViewRule,
    absent,
    check_cells,
    check_options,
    check_unique,
    existing,
    finish,
    group_studies,
    open_zip,
    patient_leaks,
    read_member,
    read_table,
    require,
    settle,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.reports import published_sentences, sentences
from gloria_core.data.sources.ms_cxr import patients_of

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


WHERE = "from https://physionet.org/content/mimic-cxr-jpg/ (credentialed access)"
SPLIT = "mimic-cxr-2*-split.csv.gz|mimic-cxr-2*-split.csv"
META = "mimic-cxr-2*-metadata.csv.gz|mimic-cxr-2*-metadata.csv"
REPORTS = "mimic-cxr-reports.zip"
_SPLITS = {"train": "train", "validate": "valid", "test": "test"}
_VIEW_NAMES = {
    "PA": "PA",
    "AP": "AP",
    "LATERAL": "LATERAL",
    "LL": "LATERAL",
    "RL": "LATERAL",
    "XTABLE LATERAL": "LATERAL",
}
_LABEL = {"": np.nan, "1.0": 1.0, "0.0": 0.0, "-1.0": -1.0, "1": 1.0, "0": 0.0, "-1": -1.0}

TextRule = Literal["any", "none", "mgca", "prior"]
_ALLOWED = {
    "split_rule": ("patient", "published"),
    "paper": ("mgca", "prior", "cxr_clip"),
    "views": VIEW_RULES,
    "text_rule": ("any", "none", "mgca", "prior"),
    "labels": ("chexpert", "negbio"),
    "on_error": ("raise", "exclude"),
}
MGCA_TOKENS = 3
PRIOR_SENTENCES = 4


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    paper: Literal["mgca", "prior", "cxr_clip"] = "mgca",
    views: ViewRule = "frontal",
    text_rule: TextRule = "any",
    labels: Literal["chexpert", "negbio"] = "chexpert",
    hold_out: str | Path = "",
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder that holds the tables, `files/` and `mimic-cxr-reports.zip`; a row a study.

    split_rule: "patient" is the owner's split, which no patient crosses. "published" is that of `paper`: mgca trains on
        the owner's train and validates on validate and test together (no test is left); prior trains on everything;
        cxr_clip is the owner's split. `attrs["leaks"]` counts the official test studies that training or model
        selection then sees.
    views: "frontal" keeps images whose ViewPosition is exactly PA or AP, as MGCA and PRIOR do; "PA", "AP", "lateral";
        "all" keeps also the unnamed and rare positions, as FRONTAL (projection unknown).
    text_rule: which studies have text enough: "any" text in findings or impression, where a report without both gives
        its last paragraph as impression; "none" asks for nothing; "mgca": at least three words in GLoRIA's cleaning of
        impression and findings; "prior": at least four sentences in both (PRIOR splits with stanza, this with
        `reports.sentences`); these two without last paragraphs. The others are listed as excluded.
    hold_out: a csv that names patients to leave out of train and valid (a column path or subject_id): the table of
        MS-CXR, when grounding will be scored on it.
    on_error: "exclude" leaves out images and reports that are not there, and lists them in `attrs["excluded"]`.
    check_images: False skips the look at the image files.
    Raises ManifestError naming file, row, column and remedy; ValueError for an unknown option value.
    """
    root = Path(root)
    given = {"split_rule": split_rule, "paper": paper, "views": views, "text_rule": text_rule, "labels": labels}
    check_options(_ALLOWED, {**given, "on_error": on_error})
    found = _tables(root, labels)
    images, left = _wanted_images(root, found, views=views, on_error=on_error, check=check_images)
    frame = group_studies(images, keep=["split", "is_ap_view", "meta_date", "meta_procedure", "row"])
    frame = _with_labels(frame, found[labels])
    frame, silent = _with_reports(
        frame, _report_path(root), last_paragraph=text_rule in ("any", "none"), on_error=on_error
    )
    frame, short = _enough_text(frame, text_rule)
    if frame.empty:
        raise ManifestError(f"{root}: no study has text enough for text_rule={text_rule!r}; use 'none'")
    frame, held = _without_held(frame, hold_out)
    frame, leaks = _published(frame, paper) if split_rule == "published" else (frame, {})
    leaks = patient_leaks(frame["patient_id"], frame["split"]) | leaks
    failures, source = [*left, *silent, *short, *held], f"manifest of {root}"
    return finish(frame.drop(columns="row"), source=source, seed=seed, failures=failures, leaks=leaks)


def _tables(root: Path, labels: str) -> dict[str, Path]:
    """The paths of the owner's tables, by META, SPLIT and the labeler's name."""
    pattern = f"mimic-cxr-2*-{labels}.csv.gz|mimic-cxr-2*-{labels}.csv"
    needs = {
        META: f"a row an image, {WHERE}",
        SPLIT: f"the official split, {WHERE}",
        pattern: f"labels by study, {WHERE}",
    }
    found = require(root, needs, "MIMIC-CXR-JPG")
    return found | {labels: found[pattern]}


def _without_held(frame: pd.DataFrame, hold_out: str | Path) -> tuple[pd.DataFrame, list[Failure]]:
    """The frame without training and validation studies of the listed patients, and a failure for each of those."""
    if not str(hold_out):
        return frame, []
    gone = frame["patient_id"].isin(patients_of(Path(hold_out))) & (frame["split"] != "test")
    return frame[~gone], _failures(frame[gone], f"its patient is held out by {Path(hold_out).name}")


def _wanted_images(
    root: Path, found: dict[str, Path], *, views: ViewRule, on_error: OnError, check: bool
) -> tuple[pd.DataFrame, list[Failure]]:
    """The images of the wanted views that are there, and a failure for each that is not and each study left without."""
    images = _read_images(found[META], found[SPLIT])
    kept = wanted_views(images["view"], views) & (images["known_view"].to_numpy(bool) | (views == "all"))
    left = unseen_studies(images, kept, column="dicom", reason=f"no image of view {views!r}")
    images = images[kept]
    if check:
        there = images["image"].isin(existing(root, images["image"].tolist()))
        gone = absent(images, there, key="study", value="image", column="dicom_id", reason="listed, but no such file")
        images = images[there]
        settle(gone, source=str(found[META]), on_error=on_error, left=len(images))
        left += gone
    if images.empty:
        raise ManifestError(f"{found[META]}: no image of view {views!r}; use views='all'")
    return images, left


def _read_images(meta: Path, split: Path) -> pd.DataFrame:
    """One row an image: dicom, study, patient, image, view, known_view, split, and what goes into metadata."""
    table = read_table(
        meta,
        {"dicom_id": "dicom", "subject_id": "subject", "study_id": "number", "ViewPosition": "position"},
        optional={"StudyDate": "meta_date", "PerformedProcedureStepDescription": "meta_procedure"},
    )
    check_unique(meta, "dicom_id", table["dicom"])
    check_cells(meta, "dicom_id", table["dicom"], table["dicom"].str.fullmatch(r"[\w-]+"), "an id has no other signs")
    for column, name in (("subject_id", "subject"), ("study_id", "number")):
        check_cells(meta, column, table[name], table[name].str.fullmatch(r"\d{8}"), "an id has eight digits")
    parts = read_table(split, {"dicom_id": "dicom", "split": "split"})
    check_unique(split, "dicom_id", parts["dicom"])
    check_cells(split, "split", parts["split"], parts["split"].isin(list(_SPLITS)), "it is train, validate or test")
    of = dict(zip(parts["dicom"], parts["split"].map(_SPLITS), strict=True))
    table["split"] = table["dicom"].map(of)
    check_cells(meta, "dicom_id", table["dicom"], table["split"].notna(), f"it is not in {split.name}; take both anew")
    table["patient"], table["study"] = "p" + table["subject"], "s" + table["number"]
    folder = "files/p" + table["subject"].str[:2] + "/" + table["patient"] + "/" + table["study"] + "/"
    table["image"] = folder + table["dicom"] + ".jpg"
    view = table["position"].map(_VIEW_NAMES)
    table["view"], table["known_view"] = view.fillna("FRONTAL"), view.notna()
    table["is_ap_view"] = view.map({"AP": 1.0, "PA": 0.0}).astype(float)
    table["row"] = table.index + 2
    return table


def _with_labels(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The frame with the 14 labels in our order; studies that the labeler does not have stay blank."""
    table = read_table(path, {"study_id": "study_id", **{name: name for name in CHEXPERT_LABELS}})
    check_unique(path, "study_id", table["study_id"])
    for name in CHEXPERT_LABELS:
        check_cells(path, name, table[name], table[name].isin(list(_LABEL)), "a label is 1.0, 0.0, -1.0 or blank")
        table[name] = table[name].map(_LABEL).astype(float)
    table["study_id"] = "s" + table["study_id"]
    return frame.merge(table, on="study_id", how="left", validate="one_to_one")


def _report_path(root: Path) -> Path:
    folder = next((path for name in ("mimic-cxr-reports", "reports") if (path := root / name).is_dir()), None)
    if folder is not None and not (root / REPORTS).is_file():
        return folder
    what = "the reports, from https://physionet.org/content/mimic-cxr/ (a download of its own; or its unpacked folder)"
    return require(root, {REPORTS: what}, "MIMIC-CXR-JPG")[REPORTS]


def _with_reports(
    frame: pd.DataFrame, path: Path, *, last_paragraph: bool, on_error: OnError
) -> tuple[pd.DataFrame, list[Failure]]:
    """The frame with findings and impression, and a failure for each study without a report."""
    numbers = frame["study_id"].str[1:]
    reports = read_mimic_reports(path, set(numbers))
    there = numbers.isin(reports)
    failures = _failures(frame[~there], f"no report in {path.name}")
    settle(failures, source=str(path), on_error=on_error, left=int(there.sum()))
    texts = [reports[number] for number in numbers[there]]
    findings, impressions, rest = zip(*texts, strict=True)
    frame = frame[there].assign(findings=findings, impression=impressions)
    if last_paragraph:
        frame["impression"] = frame["impression"].where(frame["impression"] != "", pd.Series(rest, index=frame.index))
    return frame, failures


def _failures(rows: pd.DataFrame, reason: str) -> list[Failure]:
    return [
        Failure(study, int(row), "study_id", repr(study), reason)
        for study, row in zip(rows["study_id"], rows["row"], strict=True)
    ]


def _enough_text(frame: pd.DataFrame, rule: TextRule) -> tuple[pd.DataFrame, list[Failure]]:
    """The studies with text enough, and a failure for each of the others."""
    both = list(zip(frame["impression"], frame["findings"], strict=True))
    if rule == "mgca":
        words = [sum(map(len, map(str.split, published_sentences(f"{first} {second}")))) for first, second in both]
        enough, reason = np.array(words) >= MGCA_TOKENS, f"fewer than {MGCA_TOKENS} words (MGCA's rule)"
    elif rule == "prior":
        counts = [len(sentences(first)) + len(sentences(second)) for first, second in both]
        enough, reason = np.array(counts) >= PRIOR_SENTENCES, f"fewer than {PRIOR_SENTENCES} sentences (PRIOR's rule)"
    else:
        some = np.array([bool(first or second) for first, second in both])
        enough, reason = some | (rule == "none"), "neither findings nor impression"
    return frame[enough], _failures(frame[~enough], reason)


def _published(frame: pd.DataFrame, paper: str) -> tuple[pd.DataFrame, dict[str, int]]:
    official = frame["split"]
    if paper == "cxr_clip":
        return frame, {}
    if paper == "mgca":
        return frame.assign(split=official.replace("test", "valid")), {
            "official test studies that select the model": int((official == "test").sum())
        }
    seen = {f"official {name} studies in train": int((official == name).sum()) for name in ("valid", "test")}
    return frame.assign(split="train"), seen
