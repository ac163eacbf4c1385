"""Open-I, the Indiana University collection: 3,955 reports and 7,470 radiographs that need no login.

Demner-Fushman et al. 2016, https://doi.org/10.1093/jamia/ocv080. Reads the owner's XML reports and PNG images; where
the reports are missing, those in the wheel of torchxrayvision. `download(root)` gets both archives from the owner.

Reports, projections and index terms of Open-I (Demner-Fushman et al. 2016, https://doi.org/10.1093/jamia/ocv080).
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from gloria_core.data.download import DownloadError, fetch
from gloria_core.data.manifest import Failure, ManifestError, OnError
from gloria_core.data.raw_folder import (
    VIEW_RULES,
    ViewRule,
    check_cells,
    check_option,
    finish,
    group_studies,
    patient_leaks,
    read_table,
    settle,
    unseen_studies,
    wanted_views,
)
from gloria_core.data.splits import assign_splits

REPORTS = "NLMCXR_reports.tgz"
LABELS = {
    "No Finding": {"normal"},
    "Atelectasis": {"Pulmonary Atelectasis", "Atelectasis"},
    "Cardiomegaly": {"Cardiomegaly"},
    "Consolidation": {"Consolidation"},
    "Edema": {"Pulmonary Edema"},
    "Emphysema": {"Emphysema", "Pulmonary Emphysema"},
    "Fibrosis": {"Pulmonary Fibrosis"},
    "Fracture": {"Fractures, Bone"},
    "Granuloma": {"Calcified Granuloma", "Granuloma", "Granulomatous Disease"},
    "Hernia": {"Hernia, Hiatal"},
    "Lung Lesion": {"Nodule", "Mass"},
    "Lung Opacity": {"Opacity", "Airspace Disease", "Infiltrate"},
    "Pleural Effusion": {"Pleural Effusion"},
    "Pneumonia": {"Pneumonia"},
    "Pneumothorax": {"Pneumothorax"},
    "Support Devices": {"Catheters, Indwelling", "Implanted Medical Device", "Medical Device", "Tube, Inserted"},
}
"""Label columns, and the main headings (MeSH and more) that the owner's indexers gave to such reports."""
UNINDEXED = "No Indexing"
_VIEWS = {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL", "LARGE LATERAL": "LATERAL"}


def wheel_file(name: str) -> Path | None:
    """A table in the wheel of torchxrayvision, None where that is not installed."""
    found = importlib.util.find_spec("torchxrayvision")
    path = Path(found.origin).parent / "data" / name if found and found.origin else None
    return path if path is not None and path.is_file() else None


def report_files(root: Path) -> tuple[Path, bool]:
    """Where the XML reports are: under `root` (folder or archive), else in the wheel; and whether it is the latter."""
    for name in ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", REPORTS):
        if (root / name).exists():
            return root / name, False
    wheel = wheel_file(REPORTS)
    if wheel is None:
        raise ManifestError(
            f"Open-I: {root} lacks ecgen-radiology/ and {REPORTS}: the reports, from https://openi.nlm.nih.gov/faq "
            "(no login; sources.openi.download gets them), or install torchxrayvision, whose wheel holds them"
        )
    return wheel, True


def read_reports(path: Path) -> pd.DataFrame:
    """One row a report: study, findings, impression, indication, comparison, terms (set), automatic, images (tuple)."""
    rows = []
    for name, raw in _xml(path):
        try:
            rows.append(_report(ElementTree.fromstring(raw)))
        except (ElementTree.ParseError, ValueError) as error:
            raise ManifestError(f"{path}, {name}: no report ({error}); get the archive anew") from error
    if not rows:
        raise ManifestError(f"{path}: no XML report in it; unpack {REPORTS} there")
    table = pd.DataFrame(rows).sort_values("study", ignore_index=True)
    twice = table["study"][table["study"].duplicated()]
    if len(twice):
        raise ManifestError(f"{path}: report {twice.iloc[0]!r} is there twice; remove one of the files")
    return table


def _xml(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.glob("*.xml")):
            yield file.name, file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(".xml"):
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
        raise ManifestError(f"{path}: the archive is cut short or damaged ({error}); download it again") from error


def _report(tree: ElementTree.Element) -> dict:
    number = tree.find("uId")
    if number is None or not number.get("id"):
        raise ValueError("it has no uId")
    texts = {node.get("Label", "").lower(): (node.text or "").strip() for node in tree.iter("AbstractText")}
    major = [(node.text or "").strip() for node in tree.iter("major")]
    return {
        "study": number.get("id"),
        **{name: texts.get(name, "") for name in ("findings", "impression", "indication", "comparison")},
        "terms": frozenset(part.strip() for term in major for part in term.split("/")[:1]),
        "major": " | ".join(major),
        "images": tuple(node.get("id", "") for node in tree.iter("parentImage")),
        "licence": tree.findtext("licenseURL", ""),
    }


def projections(root: Path) -> dict[str, str]:
    """Image key -> PA, AP, FRONTAL or LATERAL, where known.

    From `indiana_projections.csv` (filename, projection) under the root, made by people who looked at the images.
    Else from two tables in the wheel of torchxrayvision. The DICOM headers are wrong too often (1,090 studies have
    "PA" on both images), so more weight has the projection that its authors read off one image a study with a t-SNE
    map. The rules for the other images of a study: a lateral header is believed; a frontal header is believed where no
    other image of the study is frontal; and where the t-SNE image is lateral, the one other image of two is frontal.
    """
    people = root / "indiana_projections.csv"
    if people.is_file():
        table = read_table(people, {"filename": "image", "projection": "view"})
        good = table["view"].isin(["Frontal", "Lateral"])
        check_cells(people, "projection", table["view"], good, "it is Frontal or Lateral")
        return dict(zip(table["image"].map(image_key), table["view"].str.upper(), strict=True))
    headers, seen = wheel_file("nlmcxr_dicom_metadata.csv.gz"), wheel_file("nlmcxr_tsne_pa.csv.gz")
    if headers is None or seen is None:
        return {}
    header = _column(headers, "imageid", "View Position")
    tsne = _column(seen, "imageid", "tsne-view")
    studies: dict[str, list[str]] = {}
    for key in sorted(header.keys() | tsne.keys()):
        studies.setdefault(key.split("_")[0], []).append(key)
    found: dict[str, str] = {}
    for keys in studies.values():
        found |= _views_of_study({key: (header.get(key, ""), tsne.get(key, "")) for key in keys})
    return found


def _views_of_study(claims: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Views of one study's images from (header, t-SNE), where the rules of `projections` give one."""
    found = {}
    for key, (header, tsne) in claims.items():
        claimed = _VIEWS.get(header, "")
        if tsne:
            found[key] = "LATERAL" if tsne == "L" else claimed if claimed in ("PA", "AP") else "FRONTAL"
        elif claimed == "LATERAL":
            found[key] = "LATERAL"
    rest = {key: _VIEWS.get(claims[key][0], "FRONTAL") for key in claims if key not in found}
    if any(view != "LATERAL" for view in found.values()):
        return found
    frontal = [key for key in rest if _VIEWS.get(claims[key][0])]
    if len(claims) == 2 and len(rest) == 1:
        found |= rest
    elif len(frontal) == 1:
        found[frontal[0]] = rest[frontal[0]]
    return found


def _column(path: Path, key: str, value: str) -> dict[str, str]:
    """Image key -> cell, of a packed table."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return {image_key(row[key]): row[value] for row in csv.DictReader(file)}


def image_key(name: str) -> str:
    """`1_IM-0001-3001` of CXR1_1_IM-0001-3001, CXR1_IM-0001-3001.png and 1_IM-0001-3001.dcm.png alike."""
    stem = name.rsplit("/", 1)[-1].removesuffix(".png").removesuffix(".dcm").removeprefix("CXR")
    number, _, rest = stem.partition("_")
    return rest if rest.startswith(f"{number}_") else stem


SITE = "https://openi.nlm.nih.gov/imgs/collections"
IMAGES = "NLMCXR_png.tgz"
CHECKSUMS = {REPORTS: "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a"}
"""SHA-256 of the archives, as far as known: the reports' is that of the copy in the wheel of torchxrayvision."""
_FOLDERS = ("NLMCXR_png", "images", "images/images_normalized", ".")


def prepare(
    root: Path | str,
    *,
    split_rule: Literal["patient", "published"] = "patient",
    views: ViewRule = "frontal",
    texts_only: bool = True,
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder with `NLMCXR_png/` (or `images/`) and `ecgen-radiology/`; a row a report.

    split_rule: "patient" draws 70/10/20 %, stratified by labels; each report is of another patient. "published":
        everything is test, as in CXR-CLIP.
    views: projections are those of `indiana_projections.csv`, else as `openi_tables.projections` gathers them; images
        whose projection stays unknown are kept with views="all" only, as FRONTAL.
    texts_only: leaves out reports with neither findings nor impression. They, and reports without an image of the
        wanted view, are listed in `attrs["excluded"]`.
    on_error: "exclude" leaves out images that are not there. check_images: False skips the look at them.
    Labels: 1 where the owner's indexers gave such a main heading, 0 otherwise, blank for reports never indexed.
    Raises ManifestError naming file and remedy; ValueError for an unknown option value.
    """
    root = Path(root)
    check_option("split_rule", split_rule, ("patient", "published"))
    check_option("views", views, VIEW_RULES)
    check_option("on_error", on_error, ("raise", "exclude"))
    if not root.is_dir():
        raise ManifestError(f"Open-I: the root {root} is not a folder; give the folder that holds NLMCXR_png/")
    files = _image_files(root) if check_images else None
    path, _ = report_files(root)
    reports = read_reports(path)
    left = _without_images(reports)
    silent = (reports["findings"] == "") & (reports["impression"] == "") & texts_only
    left += _failures(reports[silent & (reports["images"].str.len() > 0)], "neither findings nor impression")
    images = _images(reports[~silent], projections(root))
    if files is not None:
        images, gone = _with_files(images, files)
        settle(gone, source=str(root), on_error=on_error, left=len(images))
        left += gone
    kept = wanted_views(images["view"], views) & (images["known"].to_numpy(bool) | (views == "all"))
    left += unseen_studies(images, kept, column="name", reason=f"no image known to be of view {views!r}")
    if not kept.any():
        raise ManifestError(f"{root}: no image known to be of view {views!r}; use views='all'")
    frame = _frame(images[kept], reports)
    frame = assign_splits(frame, seed=seed) if split_rule == "patient" else frame.assign(split="test")
    leaks = patient_leaks(frame["patient_id"], frame["split"])
    return finish(frame, source=f"manifest of {root}", seed=seed, failures=left, leaks=leaks)


def _without_images(reports: pd.DataFrame) -> list[Failure]:
    return [
        Failure(row.study, index + 2, "images", "()", "the report has no image")
        for index, row in zip(reports.index, reports.itertuples(), strict=True)
        if not row.images
    ]


def _with_files(images: pd.DataFrame, files: dict[str, str]) -> tuple[pd.DataFrame, list[Failure]]:
    """The images whose file is there, and a failure for each of the others."""
    images["image"] = images["key"].map(files)
    gone = images[images["image"].isna()]
    failures = [
        Failure(study, int(row), "images", repr(name), "no such image file")
        for study, row, name in zip(gone["study"], gone["row"], gone["name"], strict=True)
    ]
    return images[images["image"].notna()], failures


def download(
    root: Path | str,
    *,
    site: str = SITE,
    images: bool = True,
    checksums: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Get the archives from the owner (reports 1 MB, images about 1.3 GB) and unpack them under `root`.

    May be stopped and called again: bytes that are there are not fetched twice. checksums: archive -> SHA-256; those
    that are known by default. That of the images is not published.
    Raises DownloadError.
    """
    root = Path(root)
    known = CHECKSUMS if checksums is None else checksums
    for name, folder, suffix in ((REPORTS, "ecgen-radiology", ".xml"), (IMAGES, "NLMCXR_png", ".png")):
        if name == IMAGES and not images:
            continue
        archive = fetch(f"{site}/{name}", root / name, sha256=known.get(name), progress=progress)
        _unpack(archive, root / folder, suffix)
    return root


def _unpack(archive: Path, folder: Path, suffix: str) -> None:
    """Files of the archive with this suffix, flat into `folder`; those that are there in full stay."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as members:
            for member in members:
                # the name alone: no member can leave the folder
                target = folder / Path(member.name).name
                if not member.isfile() or target.suffix != suffix:
                    continue
                if target.is_file() and target.stat().st_size == member.size:
                    continue
                part = target.with_name(target.name + ".part")
                with part.open("wb") as file:
                    shutil.copyfileobj(members.extractfile(member), file)
                part.replace(target)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); remove it and call again") from error


def _image_files(root: Path) -> dict[str, str]:
    """Image key -> path below the root, from the first folder that has PNG files."""
    for name in _FOLDERS:
        if (root / name).is_dir():
            with os.scandir(root / name) as entries:
                names = sorted(entry.name for entry in entries if entry.name.endswith(".png"))
            if names:
                prefix = "" if name == "." else f"{name}/"
                return {image_key(file): prefix + file for file in names}
    raise ManifestError(
        f"Open-I: {root} lacks NLMCXR_png/: the PNG images, from {SITE}/{IMAGES} "
        "(no login; sources.openi.download(root) gets and unpacks them)"
    )


def _failures(rows: pd.DataFrame, reason: str) -> list[Failure]:
    return [Failure(study, int(index) + 2, "study", repr(study), reason) for index, study in rows["study"].items()]


def _images(reports: pd.DataFrame, views: dict[str, str]) -> pd.DataFrame:
    """One row an image of the reports."""
    table = reports[["study", "images"]].assign(row=reports.index + 2).explode("images").dropna()
    table = table.rename(columns={"images": "name"}).reset_index(drop=True)
    table["patient"], table["key"] = table["study"], table["name"].map(image_key)
    table["image"] = "NLMCXR_png/" + table["name"] + ".png"
    view = table["key"].map(views)
    table["known"], table["view"] = view.notna(), view.fillna("FRONTAL")
    table["is_ap_view"] = table["view"].map({"AP": 1.0, "PA": 0.0}).astype(float)
    return table


def _frame(images: pd.DataFrame, reports: pd.DataFrame) -> pd.DataFrame:
    frame = group_studies(images, keep=["is_ap_view"])
    of = reports.set_index("study").loc[frame["study_id"]]
    indexed = ~of["terms"].map(lambda terms: UNINDEXED in terms or not terms).to_numpy(bool)
    for name, terms in LABELS.items():
        frame[name] = np.where(indexed, of["terms"].map(lambda found, terms=terms: bool(found & terms)), np.nan)
    texts = {"findings": "findings", "impression": "impression", "meta_indication": "indication"}
    texts |= {"meta_comparison": "comparison", "meta_terms": "major", "meta_licence": "licence"}
    return frame.assign(**{ours: of[theirs].to_numpy() for ours, theirs in texts.items()})
