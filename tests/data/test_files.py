"""Atomic writes, hashes and the hint for a misspelt name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gloria_core.data.files import atomic_file, atomic_write, content_hash, did_you_mean, file_hash


def test_a_file_is_written_whole_with_its_folders_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    assert path.stat().st_mode & 0o777 == 0o644
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    atomic_write(path, "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half of the n")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_hashes_are_the_first_digits_of_sha256(tmp_path: Path) -> None:
    whole = hashlib.sha256(b"text").hexdigest()
    atomic_write(tmp_path / "f", "text")
    assert content_hash("text") == content_hash(b"text") == file_hash(tmp_path / "f") == whole[:16]
    assert content_hash("text", digits=64) == file_hash(tmp_path / "f", digits=64) == whole


def test_json_content_has_one_hash_whatever_the_order_of_its_keys() -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) == content_hash('{"a":1,"b":[2]}')
    assert content_hash({"a": 1}) != content_hash({"a": 2})


def test_the_nearest_name_is_hinted_at_and_a_distant_one_is_not() -> None:
    assert did_you_mean("Edemma", ["Edema", "Fracture"]) == " Did you mean 'Edema'?"
    assert did_you_mean("xyz", ["Edema", "Fracture"]) == did_you_mean("Edema", []) == ""
    assert did_you_mean("xyz", ["Edema"], cutoff=0.0) == " Did you mean 'Edema'?"
