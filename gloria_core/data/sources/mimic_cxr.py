"""MIMIC-CXR-JPG (Johnson et al. 2019, https://physionet.org/content/mimic-cxr-jpg/): 377,110 images of 227,827 studies.

Reads the owner's tables and images and the reports of MIMIC-CXR (`mimic-cxr-reports.zip`, which is a download of its
own). Labels are those that the CheXpert or NegBio labeler mined from the reports.

The rules for report sections are those of the makers (MIT-LCP, mimic-cxr code, section_parser): a heading is a line's
beginning in capitals with a colon; its name is sorted into a few sections; view names ("PA AND LATERAL VIEWS") head
findings; of a section that occurs twice the last counts. A report with neither findings nor impression has its last
paragraph. The makers' hand-made exceptions for 54 studies are not applied.
"""

import difflib
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.manifest import CHEXPERT_LABELS, ManifestError, OnError
from gloria_core.data.reports import published_sentences, sentences
from gloria_core.data.sources import vocabulary
from gloria_core.data.sources.ms_cxr import patients_of

_HEADING = re.compile(r"(?:^|\n)[ \t]*([A-Z][A-Z ()/,-]*):(?=\s|$)")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_WRAPPED = re.compile(r"[ \t]*\n[ \t]*(?![ \t]*(?:\n|[-*•][ \t]))")
_INDENT = re.compile(r"[ \t]*\n[ \t]*")

_EXACT = {heading: section for section, headings in vocabulary("mimic_cxr", "headings").items() for heading in headings}
_WITHIN = ("impression", "findings", "history", "comparison", "addendum")
_VIEWS = re.compile(
    r"\b(?:views?|pa|ap|lateral|portable|upright|supine|semi-?upright|frontal|radiographs?|films?|chest|single|two)\b"
)
_REPORT = re.compile(r"s\d{8}\.txt")
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


def read_reports(folder: raw.RawFolder, studies: pd.DataFrame) -> pd.DataFrame:
    """Columns findings, impression and last_paragraph of the reports that are there, by study_id ("s50414267").

    From `mimic-cxr-reports.zip`, or from what it was unpacked to (p10/p10000032/s50414267.txt, or the files alone),
    in whatever folder below the root. studies: columns study_id and patient_id.
    Raises ManifestError where there is neither, for a broken archive, and for a study that has two reports.
    """
    sections = {}
    for name, content in _report_texts(folder, studies):
        if name in sections:
            raise ManifestError(f"{folder.root}: the report of study {name} occurs twice; keep one {name}.txt")
        parts = mimic_sections(content.decode("utf-8", "replace").replace("\r\n", "\n"))
        sections[name] = [parts.get(section, "") for section in TEXTS]
    return pd.DataFrame.from_dict(sections, orient="index", columns=TEXTS)


def _report_texts(folder: raw.RawFolder, studies: pd.DataFrame) -> Iterator[tuple[str, bytes]]:
    """Study id and bytes of each wanted report."""
    archives, homes = [], []
    for place, below, files in os.walk(folder.root):
        home = Path(place).relative_to(folder.root)
        archives += [folder.root / home / name for name in files if name.lower() == REPORTS]
        if any(re.fullmatch(r"p1\d", name) for name in below) or any(map(_REPORT.fullmatch, files)):
            homes.append(home)
        below[:] = [name for name in below if not re.fullmatch(r"p1\d", name)]
    if len(archives) > 1:
        raise ManifestError(f"MIMIC-CXR-JPG: two archives of reports, {archives[0]} and {archives[1]}; keep one")
    wanted = set(studies["study_id"])
    for path in archives:
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    name = member.rpartition("/")[2].removesuffix(".txt")
                    if member.endswith(".txt") and name in wanted:
                        yield name, archive.read(member)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
            raise ManifestError(
                f"{path}: no readable zip archive ({error}; {path.stat().st_size} bytes); it is damaged or was cut "
                "short, download it again"
            ) from error
        return
    patient, names = studies["patient_id"], studies["study_id"] + ".txt"
    found = False
    for home in homes:
        place = "" if home == Path() else f"{home.as_posix()}/"
        for below in (patient.str[:3] + "/" + patient + "/" + names, names):
            for name in sorted(folder.existing(place + below)):
                found = True
                yield Path(name).stem, (folder.root / name).read_bytes()
    if not found:
        place = "p10/p10000032/s50414267.txt"
        what = "the reports, from https://physionet.org/content/mimic-cxr/ (a download of its own)"
        folder.require({REPORTS: f"{what}, or unpacked, as mimic-cxr-reports/files/{place}"})


WHERE = "from https://physionet.org/content/mimic-cxr-jpg/ (credentialed access)"
TABLE = "mimic-cxr-2*-{}.csv"
NEEDS = {TABLE.format("metadata"): f"a row an image, {WHERE}", TABLE.format("split"): f"the official split, {WHERE}"}
REPORTS = "mimic-cxr-reports.zip"
TEXTS = ["findings", "impression", "last_paragraph"]
SPLITS = {"train": "train", "validate": "valid", "test": "test"}
VIEWS = {"PA": "PA", "AP": "AP", **dict.fromkeys(("LATERAL", "LL", "RL", "XTABLE LATERAL"), "LATERAL")}
NUMBER = {"pattern": r"\d{8}", "remedy": "an id has eight digits"}
COLUMNS = {
    "dicom_id": raw.Column("dicom", unique=True, pattern=r"[\w-]+", remedy="an id has no other signs"),
    "subject_id": raw.Column("patient_id", **NUMBER),
    "study_id": raw.Column("study_id", **NUMBER),
    "ViewPosition": "position",
}
OPTIONAL = {"StudyDate": "meta_date", "PerformedProcedureStepDescription": "meta_procedure"}
MGCA_TOKENS = 3
PRIOR_SENTENCES = 4


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    paper: Literal["mgca", "prior", "cxr_clip"] = "mgca",
    views: raw.ViewRule = "frontal",
    text_rule: Literal["any", "none", "mgca", "prior"] = "any",
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
    """
    folder = raw.RawFolder(root, "MIMIC-CXR-JPG")
    metadata, official, labeler = folder.require({**NEEDS, TABLE.format(labels): f"labels by study, {WHERE}"})
    rows = raw.Rows(_read_images(metadata, official), source=metadata, cell=("dicom_id", "dicom"))
    folder.named.update(rows.table["images"])
    rows.keep_views(views, known="known")
    if check_images:
        rows.exclude_missing(folder.complete(rows.table["images"]), on_error, cell=("dicom_id", "images"))
    rows.check_rest("use views='all'")
    rows.table["row"] = rows.table.index
    rows.table = raw.group_studies(rows.table).set_index("row")
    rows.cell = ("study_id", "study_id")
    reports = read_reports(folder, rows.table)
    rows.source = f"{root}: the reports"
    rows.exclude_missing(rows.table["study_id"].isin(reports.index), on_error, reason="no report in mimic-cxr-reports")
    rows.table = rows.table.join(reports, on="study_id").join(_read_labels(labeler), on="study_id")
    if text_rule in ("any", "none"):
        impression = rows.table["impression"]
        rows.table["impression"] = impression.where(impression != "", rows.table["last_paragraph"])
    rows.exclude(*_too_short(rows.table, text_rule))
    rows.check_rest(f"no study has text enough for text_rule={text_rule!r}; use 'none'")
    if str(hold_out):
        held = rows.table["patient_id"].isin(patients_of(Path(hold_out))) & (rows.table["split"] != "test")
        rows.exclude(held, f"its patient is held out by {Path(hold_out).name}")
    leaks = {}
    if split_rule == "published":
        rows.table, leaks = _published(rows.table, paper)
    rows.source = metadata
    return raw.finish(folder, rows, ["is_ap_view", *CHEXPERT_LABELS], seed=seed, leaks=leaks)


def _read_images(metadata: Path, official: Path) -> pd.DataFrame:
    """One row an image: dicom, study_id, patient_id, images (its path), view, known, split, is_ap_view, metadata."""
    table = raw.read_table(metadata, COLUMNS, optional=OPTIONAL)
    split = raw.Column("split", values=SPLITS, remedy="it is train, validate or test")
    parts = raw.read_table(official, {"dicom_id": raw.Column("dicom", unique=True), "split": split})
    table["split"] = table["dicom"].map(parts.set_index("dicom")["split"])
    remedy = f"it is not in {official.name}; take both anew"
    raw.check_cells(metadata, "dicom_id", table["dicom"], table["split"].notna(), remedy)
    patient, study = "p" + table["patient_id"], "s" + table["study_id"]
    view = table["position"].map(VIEWS)
    return table.assign(
        patient_id=patient,
        study_id=study,
        images="files/" + patient.str[:3] + "/" + patient + "/" + study + "/" + table["dicom"] + ".jpg",
        view=view.fillna("FRONTAL"),
        known=view.notna(),
        is_ap_view=raw.ap_view(view),
    )


def _read_labels(path: Path) -> pd.DataFrame:
    """The 14 labels by study_id; studies that the labeler does not have stay blank."""
    labels = {name: raw.Column(name, **raw.LABEL) for name in CHEXPERT_LABELS}
    table = raw.read_table(path, {"study_id": raw.Column("study_id", unique=True), **labels})
    return table.set_index("s" + table.pop("study_id"))


def _too_short(frame: pd.DataFrame, rule: str) -> tuple[np.ndarray, str]:
    """(n,) bool: the studies without text enough, and the reason."""
    both = list(zip(frame["impression"], frame["findings"], strict=True))
    if rule == "mgca":
        words = [sum(map(len, map(str.split, published_sentences(f"{first} {second}")))) for first, second in both]
        return np.array(words) < MGCA_TOKENS, f"fewer than {MGCA_TOKENS} words (MGCA's rule)"
    if rule == "prior":
        counts = [len(sentences(first)) + len(sentences(second)) for first, second in both]
        return np.array(counts) < PRIOR_SENTENCES, f"fewer than {PRIOR_SENTENCES} sentences (PRIOR's rule)"
    silent = np.array([not first and not second for first, second in both])
    return silent & (rule == "any"), "neither findings nor impression"


def _published(frame: pd.DataFrame, paper: str) -> tuple[pd.DataFrame, dict[str, int]]:
    """The split of a paper, and how many official test (and valid) studies its training or selection sees."""
    official = frame["split"].value_counts()
    if paper == "cxr_clip":
        return frame, {}
    if paper == "mgca":
        leaks = {"official test studies that select the model": int(official.get("test", 0))}
        return frame.assign(split=frame["split"].replace("test", "valid")), leaks
    leaks = {f"official {name} studies in train": int(official.get(name, 0)) for name in ("valid", "test")}
    return frame.assign(split="train"), leaks
