"""Reports, projections and index terms of Open-I (Demner-Fushman et al. 2016, https://doi.org/10.1093/jamia/ocv080)."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd

from gloria_core.data.manifest import ManifestError
from gloria_core.data.owner_folder import check_cells, read_table

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
