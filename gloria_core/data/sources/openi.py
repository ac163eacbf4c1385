"""Open-I, the Indiana University collection: 3,955 reports and 7,470 radiographs that need no login.

Demner-Fushman et al. 2016, https://doi.org/10.1093/jamia/ocv080. Reads the owner's XML reports and PNG images; where
the reports are missing, those in the wheel of torchxrayvision. `download(root)` gets both archives from the owner.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from gloria_core.data.download import DownloadError, fetch
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.manifest_rules import Failure
from gloria_core.data.owner_folder import check_option, finish, patient_leaks, settle
from gloria_core.data.owner_studies import VIEW_RULES, ViewRule, group_studies, unseen_studies, wanted_views
from gloria_core.data.sources.openi_tables import (
    LABELS,
    REPORTS,
    UNINDEXED,
    image_key,
    projections,
    read_reports,
    report_files,
)
from gloria_core.data.splits import assign_splits

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
