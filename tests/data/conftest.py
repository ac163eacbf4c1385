"""Real report text: the Open-I archive that ships with torchxrayvision."""

import importlib.util
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import pytest


@pytest.fixture(scope="session")
def open_i() -> dict[str, dict[str, str]]:
    """File name -> section label -> text."""
    found = importlib.util.find_spec("torchxrayvision")
    archive = Path(found.origin).parent / "data" / "NLMCXR_reports.tgz" if found else None
    if archive is None or not archive.is_file():
        pytest.skip("torchxrayvision with its Open-I reports is not installed")
    reports = {}
    with tarfile.open(archive) as files:
        for member in files:
            if member.name.endswith(".xml"):
                tree = ElementTree.fromstring(files.extractfile(member).read())
                texts = {node.get("Label"): node.text or "" for node in tree.iter("AbstractText")}
                reports[Path(member.name).name] = texts
    return reports
