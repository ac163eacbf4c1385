"""Open-I: the owner's folder, the real reports, projections, and the download against a local server with Range."""

import hashlib
import io
import shutil
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest
from owner_trees import adapter, prepared_twice, refusal
from PIL import Image

from gloria_core.data.download import DownloadError, fetch
from gloria_core.data.raw_folder import RawFolder
from gloria_core.data.sources.openi import IMAGES, REPORTS, download, image_key, projections, read_reports, wheel_file

prepare = adapter("openi")

needs_wheel = pytest.mark.skipif(wheel_file(REPORTS) is None, reason="torchxrayvision is not installed")


def report(number: int, *, findings="Clear lungs.", impression="Normal XXXX.", major=("normal",), images=2) -> str:
    names = [f"CXR{number}_{number}_IM-0001-{k + 1}001" for k in range(images)]
    return (
        f'<eCitation><uId id="CXR{number}"/><licenseURL>by-nc-nd</licenseURL><Abstract>'
        f'<AbstractText Label="INDICATION">Cough</AbstractText>'
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
        f'<AbstractText Label="IMPRESSION">{impression}</AbstractText></Abstract>'
        f"<MeSH>{''.join(f'<major>{term}</major>' for term in major)}</MeSH>"
        + "".join(f'<parentImage id="{name}"/>' for name in names)
        + "</eCitation>"
    )


def make_tree(root: Path, n: int = 12) -> None:
    """Image 1001 is frontal, 2001 lateral; report 3 has no text, 4 no image, 5 is not indexed."""
    (root / "ecgen-radiology").mkdir(parents=True)
    (root / "NLMCXR_png").mkdir()
    rows = ["uid,filename,projection"]
    for i in range(1, n + 1):
        text = {"findings": "", "impression": ""} if i == 3 else {}
        major = ("No Indexing",) if i == 5 else ("Opacity/lung/base", "Pleural Effusion/left") if i % 2 else ("normal",)
        (root / f"ecgen-radiology/{i}.xml").write_text(report(i, major=major, images=0 if i == 4 else 2, **text))
        for k, view in enumerate(("Frontal", "Lateral")) if i != 4 else ():
            Image.new("L", (4, 4)).save(root / f"NLMCXR_png/CXR{i}_{i}_IM-0001-{k + 1}001.png")
            rows.append(f"{i},{i}_IM-0001-{k + 1}001.dcm.png,{view}")
    (root / "indiana_projections.csv").write_text("\n".join(rows) + "\n")


def test_a_good_manifest(tmp_path):
    make_tree(tmp_path)
    frame = prepared_twice(prepare, tmp_path, tmp_path)
    assert len(frame) == 10 and set(frame["views"]) == {"FRONTAL"}
    row = frame.set_index("study_id").loc["CXR7"]
    assert row["images"] == "NLMCXR_png/CXR7_7_IM-0001-1001.png" and row["impression"] == "Normal XXXX."
    assert row["Lung Opacity"] == 1 and row["Pleural Effusion"] == 1 and row["No Finding"] == 0 and row["Edema"] == 0
    assert row["meta_indication"] == "Cough" and row["meta_terms"] == "Opacity/lung/base | Pleural Effusion/left"
    assert frame.set_index("study_id").loc["CXR5", ["Edema", "No Finding"]].isna().all()
    reasons = {item["study_id"]: item["reason"].split(" - ")[-1] for item in frame.attrs["excluded"]}
    assert reasons == {"CXR3": "neither findings nor impression", "CXR4": "the report has no image"}
    assert set(prepare(tmp_path, split_rule="published")["split"]) == {"test"}
    both = prepare(tmp_path, views="all", texts_only=False)
    assert len(both) == 11 and set(both["views"]) == {"FRONTAL;LATERAL"}


def test_other_image_folders_and_missing_images(tmp_path):
    make_tree(tmp_path)
    whole = prepare(tmp_path)
    (tmp_path / "images").mkdir()
    for file in (tmp_path / "NLMCXR_png").iterdir():
        shutil.move(file, tmp_path / "images" / f"{image_key(file.name)}.dcm.png")
    other = prepare(tmp_path)
    assert other["images"].tolist()[0] == "images/1_IM-0001-1001.dcm.png"
    pd.testing.assert_frame_equal(other.drop(columns="images"), whole.drop(columns="images"))
    (tmp_path / "images/1_IM-0001-1001.dcm.png").unlink()
    assert "CXR1_1_IM-0001-1001" in refusal(prepare, tmp_path) and "no such image file" in refusal(prepare, tmp_path)
    assert len(prepare(tmp_path, on_error="exclude")) == 9


def test_bad_folders_and_reports(tmp_path):
    assert "NLMCXR_png" in refusal(prepare, tmp_path) and "openi.download(root)" in refusal(prepare, tmp_path)
    assert "not a folder" in refusal(prepare, tmp_path / "nowhere")
    make_tree(tmp_path)
    (tmp_path / "ecgen-radiology/99.xml").write_text(report(7))
    assert "'CXR7' occurs twice" in refusal(prepare, tmp_path)
    (tmp_path / "ecgen-radiology/99.xml").write_text(report(99)[:-40])
    assert "99.xml: no report" in refusal(prepare, tmp_path)
    (tmp_path / "ecgen-radiology/99.xml").unlink()
    (tmp_path / "indiana_projections.csv").write_text("filename,views\n1.png,Frontal\n")
    assert "lacks column 'projection'" in refusal(prepare, tmp_path)
    with pytest.raises(ValueError, match="views"):
        prepare(tmp_path, views="side")


def test_image_names_are_the_same_image():
    names = ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-3001.png", "1_IM-0001-3001.dcm.png", "CXR1_IM-0001-3001.png"]
    assert {image_key(name) for name in names} == {"1_IM-0001-3001"}
    assert image_key("CXR11_1_IM-0001-3001") == "11_1_IM-0001-3001"


@needs_wheel
def test_the_real_reports_and_projections(tmp_path):
    reports = read_reports(wheel_file(REPORTS))
    assert len(reports) == 3955 and reports["images"].str.len().sum() == 7470
    assert (reports["findings"] == "").sum() == 530 and (reports["impression"] == "").sum() == 34
    assert ((reports["findings"] == "") & (reports["impression"] == "")).sum() == 28
    known = projections(RawFolder(tmp_path, "Open-I"))
    views = Counter(known.values())
    assert len(known.keys() & {image_key(name) for names in reports["images"] for name in names}) > 4900
    assert views["LATERAL"] > 1300
    frame = prepare(tmp_path, check_images=False)
    assert len(frame) == 3632 and not frame["images"].str.contains(";").any()
    assert Counter(item["reason"].split(" - ")[-1] for item in frame.attrs["excluded"]) == {
        "no image of view 'frontal'": 194,
        "the report has no image": 104,
        "neither findings nor impression": 25,
    }
    whole = prepare(tmp_path, views="all", texts_only=False, check_images=False)
    assert len(whole) == 3851 and whole["images"].str.count(";").add(1).sum() == 7470
    counts = {name: int((whole[name] == 1).sum()) for name in ("No Finding", "Cardiomegaly", "Pleural Effusion")}
    assert counts == {"No Finding": 1379, "Cardiomegaly": 345, "Pleural Effusion": 149}
    (tmp_path / REPORTS).write_bytes(wheel_file(REPORTS).read_bytes()[:100_000])
    assert "cut short or damaged" in refusal(prepare, tmp_path, check_images=False)


# --- download --------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, str | None]]] = []
    cut: int | None = None
    ranges = True

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        type(self).asked.append((name, wanted))
        if name not in self.files:
            self.send_error(404)
            return
        body, start = self.files[name], 0
        if wanted and self.ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.end_headers()
                return
        self.send_response(206 if wanted and self.ranges else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : self.cut if self.cut is not None else None])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site():
    handler = type("Handler", (Server,), {"files": {}, "asked": [], "cut": None, "ranges": True})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def archive(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_stopped_download_is_resumed(tmp_path, site, ranges):
    url, handler = site
    body = bytes(range(256)) * 4000
    handler.files["f"], handler.cut, handler.ranges = body, 300_000, ranges
    seen = []
    with pytest.raises(DownloadError, match=r"300000.*resume"):
        fetch(f"{url}/f", tmp_path / "f", progress=lambda done, total: seen.append((done, total)))
    assert not (tmp_path / "f").exists() and (tmp_path / "f.part").stat().st_size == 300_000
    handler.cut = None
    fetch(f"{url}/f", tmp_path / "f", sha256=hashlib.sha256(body).hexdigest())
    assert (tmp_path / "f").read_bytes() == body and not (tmp_path / "f.part").exists()
    assert [wanted for _, wanted in handler.asked] == [None, "bytes=300000-"]
    fetch(f"{url}/f", tmp_path / "f", sha256=hashlib.sha256(body).hexdigest())
    assert len(handler.asked) == 2 and seen[-1][1] == len(body)


def test_a_whole_part_a_wrong_checksum_and_no_file(tmp_path, site):
    url, handler = site
    handler.files["f"] = b"whole"
    (tmp_path / "f.part").write_bytes(b"whole")
    assert fetch(f"{url}/f", tmp_path / "f").read_bytes() == b"whole"
    (tmp_path / "g.part").write_bytes(b"longer than it")
    assert fetch(f"{url}/f", tmp_path / "g").read_bytes() == b"whole"
    with pytest.raises(DownloadError, match=r"SHA-256 is .* and not 00"):
        fetch(f"{url}/f", tmp_path / "h", sha256="00")
    assert not (tmp_path / "h").exists() and not (tmp_path / "h.part").exists()
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{url}/none", tmp_path / "i")


def test_openi_downloads_and_unpacks(tmp_path, site):
    url, handler = site
    made = tmp_path / "made"
    make_tree(made)
    xml = {f"ecgen-radiology/{file.name}": file.read_bytes() for file in (made / "ecgen-radiology").iterdir()}
    png = {f"./{file.name}": file.read_bytes() for file in (made / "NLMCXR_png").iterdir()}
    outside = {"../../outside.png": b"x"}
    handler.files |= {REPORTS: archive(xml), IMAGES: archive(png | outside)}
    root = tmp_path / "root"
    sums = {name: hashlib.sha256(body).hexdigest() for name, body in handler.files.items()}
    download(root, site=url, checksums=sums)
    assert (root / "NLMCXR_png/outside.png").is_file() and not (tmp_path / "outside.png").exists()
    shutil.copy(made / "indiana_projections.csv", root)
    pd.testing.assert_frame_equal(prepare(root), prepare(made))
    download(root, site=url, checksums=sums)
    assert len(handler.asked) == 2
    with pytest.raises(DownloadError, match="SHA-256"):
        download(tmp_path / "other", site=url, images=False)
    (root / IMAGES).write_bytes(handler.files[IMAGES][:-200])
    for file in (root / "NLMCXR_png").iterdir():
        file.unlink()
    with pytest.raises(DownloadError, match="cannot be unpacked"):
        download(root, site=url, checksums={})
