"""The image cache: the right pixels, made once, and honest about bad files."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data import cache as cache_module
from gloria_core.data.cache import CacheError, ImageCache, cache_key, image_paths
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import ImageError

SHAPES = [(40, 30), (30, 40), (37, 37), (64, 20)]


def make_images(root, n, *, seed=0):
    rng = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    paths = [f"images/{i:03d}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, SHAPES[i % 4]).astype(np.uint8)).save(root / path)
    return paths


@pytest.fixture
def root(tmp_path):
    make_images(tmp_path / "root", 12)
    return tmp_path / "root"


def frame_of(*cells):
    return pd.DataFrame({"study_id": [f"s{i}" for i in range(len(cells))], "images": list(cells)})


def all_images(root):
    return frame_of(*sorted(file.relative_to(root).as_posix() for file in (root / "images").iterdir()))


def build(frame, root, folder, **options):
    return ImageCache.build(frame, root, **{"size": 32, "folder": folder, "progress": False, **options})


def content(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by each image that is decoded."""
    paths, real = [], cache_module._decode
    monkeypatch.setattr(
        cache_module, "_decode", lambda root, path, *rest: paths.append(path) or real(root, path, *rest)
    )
    return paths


def intact(cache):
    """Whether all rows have the checksum of the build."""
    rows = [cache._rows[row] for row in cache._row_of.values()]
    return all(row["record"]["done"] == 1 and cache_module._checksum(row) == row["record"]["crc"] for row in rows)


def test_pixels_and_geometry_are_those_of_each_file(root, tmp_path):
    frame = frame_of("images/003.png;images/001.png", "images/000.png", "images/002.png")
    cache = build(frame, root, tmp_path / "c")
    assert len(cache) == 4
    assert cache.paths == ("images/000.png", "images/001.png", "images/002.png", "images/003.png")
    for path in cache.paths:
        original = np.asarray(Image.open(root / path))
        geometry = Geometry.fit(*original.shape, 32)
        assert cache.geometry(path) == geometry
        assert (cache[path] == geometry.apply(original)).all()
    picked = cache.rows(["images/002.png", "images/000.png", "images/002.png"])
    assert picked.shape == (3, 32, 32)
    assert (picked[1] == cache["images/000.png"]).all()
    assert intact(cache)


def test_images_are_read_only(root, tmp_path):
    cache = build(all_images(root), root, tmp_path / "c")
    with pytest.raises(ValueError, match="read-only"):
        cache["images/000.png"][0, 0] = 1
    cache.rows(["images/000.png"])[0, 0, 0] = 1  # a copy


def test_an_unknown_path_is_refused(root, tmp_path):
    cache = build(frame_of("images/000.png"), root, tmp_path / "c")
    with pytest.raises(CacheError, match=r"'images/001\.png' is not in the cache"):
        cache["images/001.png"]


def test_a_second_build_decodes_nothing(root, tmp_path, decoded):
    frame = all_images(root)
    first = build(frame, root, tmp_path / "c")
    assert len(decoded) == 12
    shutil.rmtree(root / "images")  # the sources are not needed any more
    again = build(frame, root, tmp_path / "c")
    assert again.index == first.index
    assert len(decoded) == 12
    assert (again.rows(first.paths) == first.rows(first.paths)).all()


def test_key_depends_on_images_and_size_only():
    paths = ["a.png", "b.png", "c.png"]
    key = cache_key(paths, 32)
    assert len(key) == 16
    assert image_paths(frame_of("c.png", "b.png;a.png").assign(impression="other")) == paths
    assert len({key, cache_key(paths, 64), cache_key(["a.png", "c.png"], 32)}) == 3


def test_workers_and_order_do_not_change_a_byte(root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_BLOCK", 5)
    frame = all_images(root)
    build(frame, root, tmp_path / "one", workers=1)
    build(frame.iloc[::-1], root, tmp_path / "three", workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")
    assert len(content(tmp_path / "one")) == 2


def test_only_changed_sources_are_decoded_again(root, tmp_path, decoded):
    frame = all_images(root)
    build(frame, root, tmp_path / "c")
    for name, time in (("002", (5, 5)), ("003", (6, 6))):
        Image.fromarray(np.full((20, 20), 77, np.uint8)).save(root / f"images/{name}.png")
        os.utime(root / f"images/{name}.png", time)
    del decoded[:]
    cache = build(frame, root, tmp_path / "c")
    assert sorted(decoded) == ["images/002.png", "images/003.png"]
    assert (cache["images/002.png"] == 77).all()
    assert cache.geometry("images/002.png").height == 20
    assert intact(cache)


def test_same_length_and_another_time_is_noticed(root, tmp_path):
    frame = frame_of("images/a.bmp", "images/b.bmp")
    for name, level in [("a", 10), ("b", 20)]:
        Image.fromarray(np.full((32, 32), level, np.uint8)).save(root / f"images/{name}.bmp")
    build(frame, root, tmp_path / "c")
    Image.fromarray(np.full((32, 32), 30, np.uint8)).save(root / "images/b.bmp")
    os.utime(root / "images/b.bmp", (5, 5))
    assert (build(frame, root, tmp_path / "c")["images/b.bmp"] == 30).all()


def test_a_source_that_broke_after_the_build_is_reported(root, tmp_path):
    frame = all_images(root)
    build(frame, root, tmp_path / "c")
    (root / "images/005.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match="1 of 12"):
        build(frame, root, tmp_path / "c")
    assert len(build(frame, root, tmp_path / "c", on_error="exclude")) == 11


def spoil(root):
    whole = (root / "images/002.png").read_bytes()
    (root / "images/002.png").write_bytes(whole[: len(whole) // 2])
    (root / "images/004.png").unlink()
    (root / "images/007.png").write_bytes(b"")


def test_bad_images_are_all_reported_with_study_row_and_file(root, tmp_path):
    frame = all_images(root)
    spoil(root)
    with pytest.raises(ImageError) as caught:
        build(frame, root, tmp_path / "c")
    text = str(caught.value)
    assert "3 of 12 images" in text
    assert "row 4 (study 's2'), column 'images': 'images/002.png' - images/002.png: truncated" in text
    assert "row 6 (study 's4')" in text and "images/004.png: no such file" in text
    assert "row 9 (study 's7')" in text and "images/007.png: the file is empty" in text
    assert "on_error='exclude'" in text
    assert not list((tmp_path / "c").glob("*.json"))


def test_more_than_ten_bad_studies_are_counted(root, tmp_path):
    cells = [f"images/no{i:02d}.png" for i in range(14)]
    with pytest.raises(ImageError, match="and 4 more") as caught:
        build(frame_of("images/000.png", *cells), root, tmp_path / "c")
    assert str(caught.value).count("no such file") == 10


def test_after_repair_only_the_repaired_image_is_decoded(root, tmp_path, decoded):
    frame = all_images(root)
    spoil(root)
    with pytest.raises(ImageError):
        build(frame, root, tmp_path / "c")
    make_images(tmp_path / "spare", 12)
    for name in ("002", "004", "007"):
        shutil.copy(tmp_path / f"spare/images/{name}.png", root / f"images/{name}.png")
    del decoded[:]
    cache = build(frame, root, tmp_path / "c")
    assert sorted(decoded) == ["images/002.png", "images/004.png", "images/007.png"]
    assert intact(cache)
    assert (cache.rows(cache.paths) == build(frame, tmp_path / "spare", tmp_path / "d").rows(cache.paths)).all()


def test_exclude_lists_every_study_and_cuts_them_from_the_frame(root, tmp_path):
    spoil(root)
    frame = frame_of("images/000.png;images/002.png", "images/001.png", "images/004.png", "images/003.png")
    frame.attrs["excluded"] = [{"study_id": "before", "row": 9, "column": "images", "reason": "earlier"}]
    cache = build(frame, root, tmp_path / "c", on_error="exclude")
    kept = cache.usable(frame)
    assert kept["study_id"].tolist() == ["s1", "s3"]
    excluded = kept.attrs["excluded"]
    assert [(item["study_id"], item["row"], item["column"]) for item in excluded] == [
        ("before", 9, "images"),
        ("s0", 2, "images"),
        ("s2", 4, "images"),
    ]
    assert "images/002.png: truncated" in excluded[1]["reason"]
    assert cache.paths == ("images/000.png", "images/001.png", "images/003.png")
    for path in cache.paths:
        original = np.asarray(Image.open(root / path))
        assert (cache[path] == Geometry.fit(*original.shape, 32).apply(original)).all()
    assert intact(cache)
    with pytest.raises(CacheError, match="truncated"):
        cache["images/002.png"]


def test_exclusions_are_remembered_and_still_raise_when_asked(root, tmp_path):
    frame = all_images(root)
    spoil(root)
    first = build(frame, root, tmp_path / "c", on_error="exclude")
    assert len(first.bad) == 3
    assert build(frame, root, tmp_path / "c", on_error="exclude").bad == first.bad
    with pytest.raises(ImageError, match="3 of 12"):
        build(frame, root, tmp_path / "c")
    make_images(root, 12)  # repaired: tried again without being told
    repaired = build(frame, root, tmp_path / "c", on_error="exclude")
    assert repaired.bad == {}
    assert len(repaired) == 12


def test_rows_of_a_cut_frame_are_those_of_the_csv(root, tmp_path):
    later = all_images(root).iloc[2:5]  # labels 2, 3, 4 of a read manifest
    spoil(root)
    with pytest.raises(ImageError, match=r"row 4 \(study 's2'\)"):
        build(later, root, tmp_path / "c")


def test_nothing_usable_is_an_error_even_with_exclude(root, tmp_path):
    with pytest.raises(ImageError, match="none of the 2 images"):
        build(frame_of("x.png", "y.png"), root, tmp_path / "c", on_error="exclude")


@pytest.mark.parametrize(
    ("path", "problem"),
    [("../outside.png", "escapes"), ("images/../../outside.png", "escapes"), ("/outside.png", "is absolute")],
)
def test_a_path_out_of_the_root_is_refused(root, tmp_path, path, problem):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "outside.png")
    absolute = str(tmp_path / path[1:]) if path.startswith("/") else path
    with pytest.raises(ImageError, match=problem):
        build(frame_of(absolute), root, tmp_path / "c")


def test_options_are_checked(root, tmp_path):
    with pytest.raises(ValueError, match=r"on_error\n.*'raise' or 'exclude'"):
        build(all_images(root), root, tmp_path / "c", on_error="skip")
    with pytest.raises(ValueError, match=r"0\n.*at least 1 item"):
        build(all_images(root).iloc[:0], root, tmp_path / "c")
    with pytest.raises(ValueError, match=r"workers\n.*greater than 0"):
        build(all_images(root), root, tmp_path / "c", workers=0)


def test_a_damaged_cache_is_refused(root, tmp_path):
    frame = all_images(root)
    cache = build(frame, root, tmp_path / "c")
    pixels = cache.index.with_suffix(".u8")
    whole, index = pixels.read_bytes(), cache.index.read_text()

    pixels.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"49151 bytes instead of 49152\. Delete .*json"):
        build(frame, root, tmp_path / "c")
    pixels.unlink()
    with pytest.raises(CacheError, match="is missing"):
        ImageCache(cache.index)
    for place in (8, 100):  # the height and a pixel of the first image
        pixels.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not intact(ImageCache(cache.index))

    for damage in (index[: len(index) // 2], index.replace('"size": 32', '"size": 16'), "[]", ""):
        assert damage != index
        cache.index.write_text(damage)
        with pytest.raises(CacheError, match="index is damaged"):
            build(frame, root, tmp_path / "c")
    with pytest.raises(CacheError, match="no such image cache"):
        ImageCache(tmp_path / "c/none.json")
    cache.index.unlink()
    assert intact(build(frame, root, tmp_path / "c"))  # the remedy works, and mends the damaged row
    assert pixels.read_bytes() == whole


def test_another_format_is_refused(root, tmp_path):
    cache = build(all_images(root), root, tmp_path / "c")
    cache.index.write_text(json.dumps(json.loads(cache.index.read_text()) | {"format": 1}))
    with pytest.raises(CacheError, match="format 1, this version reads 2"):
        ImageCache(cache.index)


def test_a_cache_pickles_as_a_path(root, tmp_path):
    frame = all_images(root)
    spoil(root)
    cache = build(frame, root, tmp_path / "c", on_error="exclude")
    data = pickle.dumps(cache)
    assert len(data) < 3000
    other = pickle.loads(data)
    assert (other.rows(cache.paths) == cache.rows(cache.paths)).all()
    assert other.bad == cache.bad


def test_progress_says_what_was_there_already(root, tmp_path, capsys):
    build(all_images(root), root, tmp_path / "c", progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "12/12" in printed.err
    build(all_images(root), root, tmp_path / "c", progress=True)
    assert capsys.readouterr() == ("12 of 12 images are in the cache already\n", "")


def test_a_read_only_cache_opens(root, tmp_path, monkeypatch):
    frame = all_images(root)
    build(frame, root, tmp_path / "c")
    os.utime(root / "images/000.png", (5, 5))
    monkeypatch.setattr(cache_module.os, "access", lambda *_: False)
    monkeypatch.setattr(cache_module, "_write", lambda *_: pytest.fail("written to"))
    assert len(build(frame, root, tmp_path / "c")) == 12
