"""Open-I, the Indiana University collection: 3,955 reports and 7,470 radiographs that need no login.

Demner-Fushman et al. 2016, https://doi.org/10.1093/jamia/ocv080. Reads the owner's XML reports and PNG images; where
the reports are missing, those in the wheel of torchxrayvision. `download(root)` gets both archives from the owner.
"""

import importlib.util
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from gloria_core.data import raw_folder as raw
from gloria_core.data.download import DownloadError, fetch
from gloria_core.data.manifest import ManifestError, OnError
from gloria_core.data.sources import vocabulary

REPORTS = "NLMCXR_reports.tgz"
# Label columns, and the main headings (MeSH and more) that the owner's indexers gave to such reports
LABELS = vocabulary("openi", "labels")
UNINDEXED = "No Indexing"
_VIEWS = {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL", "LARGE LATERAL": "LATERAL"}


def wheel_file(name: str) -> Path | None:
    """A table in the wheel of torchxrayvision, None where that is not installed."""
    found = importlib.util.find_spec("torchxrayvision")
    path = Path(found.origin).parent / "data" / name if found and found.origin else None
    return path if path is not None and path.is_file() else None


def report_files(root: Path) -> Path:
    """Where the XML reports are: under `root` (folder or archive), else in the wheel."""
    places = [root / name for name in ("ecgen-radiology", "NLMCXR_reports/ecgen-radiology", REPORTS)]
    path = next((path for path in places if path.exists()), None) or wheel_file(REPORTS)
    if path is None:
        raise ManifestError(
            f"Open-I: {root} lacks ecgen-radiology/ and {REPORTS}: the reports, from https://openi.nlm.nih.gov/faq "
            "(no login; sources.openi.download gets them), or install torchxrayvision, whose wheel holds them"
        )
    return path


def read_reports(path: Path) -> pd.DataFrame:
    """One row a report: study_id, findings, impression, terms (set), images (list), meta_indication and others."""
    rows = []
    for name, content in _xml(path):
        try:
            rows.append(_report(ElementTree.fromstring(content)))
        except (ElementTree.ParseError, ValueError) as error:
            raise ManifestError(f"{path}, {name}: no report ({error}); get the archive anew") from error
    if not rows:
        raise ManifestError(f"{path}: no XML report in it; unpack {REPORTS} there")
    table = pd.DataFrame(rows).sort_values("study_id", ignore_index=True)
    twice = table["study_id"][table["study_id"].duplicated()]
    if len(twice):
        raise ManifestError(f"{path}: report {twice.iloc[0]!r} occurs twice; remove one of the files")
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
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ManifestError(f"{path}: the archive is cut short or damaged ({error}); download it again") from error


def _report(tree: ElementTree.Element) -> dict:
    number = tree.find("uId")
    if number is None or not number.get("id"):
        raise ValueError("it has no uId")
    texts = {node.get("Label", "").lower(): (node.text or "").strip() for node in tree.iter("AbstractText")}
    major = [(node.text or "").strip() for node in tree.iter("major")]
    return {
        "study_id": number.get("id"),
        "findings": texts.get("findings", ""),
        "impression": texts.get("impression", ""),
        "terms": frozenset(term.split("/")[0].strip() for term in major),
        "images": [node.get("id", "") for node in tree.iter("parentImage")],
        "meta_indication": texts.get("indication", ""),
        "meta_comparison": texts.get("comparison", ""),
        "meta_terms": " | ".join(major),
        "meta_licence": tree.findtext("licenseURL", ""),
    }


def projections(folder: raw.RawFolder) -> dict[str, str]:
    """Image key -> PA, AP, FRONTAL or LATERAL, where known.

    From `indiana_projections.csv` (filename, projection) under the root, made by people who looked at the images.
    Else from two tables in the wheel of torchxrayvision. The DICOM headers are wrong too often (1,090 studies have
    "PA" on both images), so more weight has the projection that its authors read off one image a study with a t-SNE
    map. The rules for the other images of a study: a lateral header is believed; a frontal header is believed where no
    other image of the study is frontal; and where the t-SNE image is lateral, the one other image of two is frontal.
    """
    people = folder.optional("indiana_projections.csv", without="projections by people: those of the wheel are used")
    if people is not None:
        view = raw.Column("view", values={"Frontal": "FRONTAL", "Lateral": "LATERAL"})
        return _by_image(raw.read_table(people, {"filename": "image", "projection": view}))
    headers, seen = wheel_file("nlmcxr_dicom_metadata.csv.gz"), wheel_file("nlmcxr_tsne_pa.csv.gz")
    if headers is None or seen is None:
        return {}
    header = _by_image(raw.read_table(headers, {"imageid": "image", "View Position": "view"}))
    tsne = _by_image(raw.read_table(seen, {"imageid": "image", "tsne-view": "view"}))
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


def _by_image(table: pd.DataFrame) -> dict[str, str]:
    return dict(zip(table["image"].map(image_key), table["view"], strict=True))


def image_key(name: str) -> str:
    """`1_IM-0001-3001` of CXR1_1_IM-0001-3001, CXR1_IM-0001-3001.png and 1_IM-0001-3001.dcm.png alike."""
    stem = name.rsplit("/", 1)[-1].removesuffix(".png").removesuffix(".dcm").removeprefix("CXR")
    number, _, rest = stem.partition("_")
    return rest if rest.startswith(f"{number}_") else stem


SITE = "https://openi.nlm.nih.gov/imgs/collections"
IMAGES = "NLMCXR_png.tgz"
# SHA-256 of the archives, as far as known: the reports' is that of the copy in the wheel of torchxrayvision
CHECKSUMS = {REPORTS: "8fb6de7eec73d8c3665067ad4bb003ccd57f971ae316d2642e1627ac7268667a"}
FOLDERS = ("NLMCXR_png", "images", "images/images_normalized", "")


def prepare(
    root: Path,
    *,
    split_rule: raw.SplitRule = "patient",
    views: raw.ViewRule = "frontal",
    texts_only: bool = True,
    seed: int = 0,
    on_error: OnError = "raise",
    check_images: bool = True,
) -> pd.DataFrame:
    """The checked manifest of the folder with `NLMCXR_png/` (or `images/`) and `ecgen-radiology/`; a row a report.

    split_rule: "patient" draws 70/10/20 %, stratified by labels; each report is of another patient. "published":
        everything is test, as in CXR-CLIP.
    views: projections are those of `indiana_projections.csv`, else as `projections` gathers them; images
        whose projection stays unknown are kept with views="all" only, as FRONTAL.
    texts_only: leaves out reports with neither findings nor impression. They, and reports without an image of the
        wanted view, are listed in `attrs["excluded"]`.
    on_error: "exclude" leaves out images that are not there. check_images: False skips the look at them.
    Labels: 1 where the owner's indexers gave such a main heading, 0 otherwise, blank for reports never indexed.
    Raises ManifestError naming file and remedy; ValueError for an unknown option value.
    """
    folder = raw.RawFolder(root, "Open-I")
    files = _image_files(folder) if check_images else None
    path = report_files(root)
    rows = raw.Rows(read_reports(path), source=path, cell=("study", "study_id"))
    if files is not None:
        keys = {image_key(name) for names in rows.table["images"] for name in names}
        folder.named.update(path for key, path in files.items() if key in keys)
    rows.exclude(rows.table["images"].str.len() == 0, "the report has no image")
    if texts_only:
        silent = (rows.table["findings"] == "") & (rows.table["impression"] == "")
        rows.exclude(silent, "neither findings nor impression")
    table = rows.table.explode("images").rename(columns={"images": "name"})
    keys = table["name"].map(image_key)
    rows.table = table.assign(
        images="NLMCXR_png/" + table["name"] + ".png" if files is None else keys.map(files),
        view=keys.map(projections(folder)).fillna(""),
    )
    rows.cell = ("images", "name")
    rows.exclude_missing(rows.table["images"].notna(), on_error)
    rows.table["known"] = rows.table["view"] != ""
    rows.table["view"] = rows.table["view"].replace("", "FRONTAL")
    rows.keep_views(views, known="known")
    rows.check_rest("use views='all'")
    table = raw.group_studies(rows.table)
    indexed = ~table["terms"].map(lambda terms: UNINDEXED in terms or not terms).to_numpy(bool)
    for name, terms in LABELS.items():
        table[name] = np.where(
            indexed, table["terms"].map(lambda found, terms=terms: not found.isdisjoint(terms)), np.nan
        )
    rows.table = table.assign(is_ap_view=raw.ap_view(table["view"]))
    if split_rule == "published":
        rows.table["split"] = "test"
    return raw.finish(folder, rows, ["is_ap_view", *LABELS], seed=seed, draw="all" if split_rule == "patient" else "")


def download(
    root: Path,
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
    """Files of the archive with this suffix, flat into `folder`."""
    try:
        with tarfile.open(archive) as content:
            files = [member for member in content if member.isfile() and member.name.endswith(suffix)]
            # the name alone: no member can leave the folder
            flat = [member.replace(name=Path(member.name).name) for member in files]
            content.extractall(folder, flat, filter="data")
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DownloadError(f"{archive}: cannot be unpacked ({error}); remove it and call again") from error


def _image_files(folder: raw.RawFolder) -> dict[str, str]:
    """Image key -> path below the root, from the first folder that has PNG files."""
    for home in FOLDERS:
        if files := folder.by_stem([home], [".png"]):
            return {image_key(stem): paths[0] for stem, paths in files.items()}
    raise ManifestError(
        f"Open-I: {folder.root} lacks NLMCXR_png/: the PNG images, from {SITE}/{IMAGES} "
        "(no login; sources.openi.download(root) gets and unpacks them)"
    )
