"""The image cache: the right pixels, made once, and honest about bad files."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data import cache as cache_build
from gloria_core.data.cache import CacheError, ImageCache, cache_key
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


def visible(folder):
    return sorted(file.name for file in Path(folder).iterdir() if not file.name.endswith(".lock"))


@pytest.mark.parametrize("behavior", ["corrected", "published"])
def test_pixels_and_geometry_are_those_of_each_file(root, tmp_path, behavior):
    frame = frame_of("images/003.png;images/001.png", "images/000.png", "images/002.png")
    cache = build(frame, root, tmp_path / "c", behavior=behavior)
    assert len(cache) == 4
    assert cache.paths == ("images/000.png", "images/001.png", "images/002.png", "images/003.png")
    for row, path in enumerate(cache.paths):
        original = np.asarray(Image.open(root / path))
        geometry = Geometry.fit(*original.shape, 32, behavior=behavior)
        assert cache.geometry(path) == geometry
        assert (cache.image(path) == geometry.apply(original)).all()
        assert (cache[row] == cache[path]).all()
        assert cache.row(path) == row
    picked = cache.rows(["images/002.png", "images/000.png", "images/002.png"])
    assert picked.shape == (3, 32, 32)
    assert (picked[1] == cache["images/000.png"]).all()
    assert "images/001.png" in cache
    assert "images/009.png" not in cache
    cache.verify()


def test_images_are_read_only(root, tmp_path):
    cache = build(all_images(root), root, tmp_path / "c")
    with pytest.raises(ValueError, match="read-only"):
        cache["images/000.png"][0, 0] = 1
    cache.rows(["images/000.png"])[0, 0, 0] = 1  # a copy


def test_an_unknown_path_is_refused(root, tmp_path):
    cache = build(frame_of("images/000.png"), root, tmp_path / "c")
    with pytest.raises(CacheError, match=r"'images/001\.png' is not in the cache"):
        cache.image("images/001.png")
    with pytest.raises(CacheError, match="not in the cache"):
        cache.usable(frame_of("images/001.png"))


def test_a_second_build_decodes_nothing(root, tmp_path, monkeypatch):
    frame = all_images(root)
    first = build(frame, root, tmp_path / "c")
    monkeypatch.setattr(cache_build, "_decode", lambda *_: pytest.fail("decoded again"))
    again = build(frame, root, tmp_path / "c")
    assert again.index == first.index
    shutil.rmtree(root / "images")  # the sources are not needed any more
    assert (build(frame, root, tmp_path / "c").rows(first.paths) == first.rows(first.paths)).all()


def test_key_depends_on_images_size_and_behavior_only(root):
    frame = frame_of("a.png;b.png", "c.png")
    key = cache_key(frame, 32)
    assert len(key) == 16
    assert key == cache_key(frame_of("c.png", "b.png", "a.png").assign(impression="other"), 32)
    others = [
        cache_key(frame, 64),
        cache_key(frame, 32, behavior="published"),
        cache_key(frame_of("a.png", "c.png"), 32),
    ]
    assert len({key, *others}) == 4


def test_workers_and_order_do_not_change_a_byte(root, tmp_path):
    frame = all_images(root)
    one = build(frame, root, tmp_path / "one", workers=1)
    three = build(frame.iloc[::-1], root, tmp_path / "three", workers=3)
    assert visible(tmp_path / "one") == visible(tmp_path / "three")
    assert one.index.read_bytes() == three.index.read_bytes()
    assert (one.rows(one.paths) == three.rows(one.paths)).all()


def test_changed_sources_are_decoded_again(root, tmp_path):
    frame = all_images(root)
    before = build(frame, root, tmp_path / "c").rows(frame["images"])
    make_images(root, 12, seed=1)
    after = build(frame, root, tmp_path / "c")
    assert (after.rows(frame["images"]) != before).any()
    assert (
        after["images/002.png"] == Geometry.fit(37, 37, 32).apply(np.asarray(Image.open(root / "images/002.png")))
    ).all()
    assert len(visible(tmp_path / "c")) == 2  # the old pixels are gone


def test_a_copied_root_is_recognised_by_content(root, tmp_path, monkeypatch):
    frame = all_images(root)
    build(frame, root, tmp_path / "c")
    for file in (root / "images").iterdir():
        os.utime(file, (1, 1))
    monkeypatch.setattr(cache_build, "_decode", lambda *_: pytest.fail("decoded again"))
    build(frame, root, tmp_path / "c")
    monkeypatch.setattr(cache_build, "same_source", lambda file, entry: entry.mtime_ns == 1_000_000_000)
    build(frame, root, tmp_path / "c")  # the new times were noted


def test_same_length_and_another_content_is_noticed(root, tmp_path):
    frame = frame_of("images/a.bmp", "images/b.bmp")
    for name, level in [("a", 10), ("b", 20)]:
        Image.fromarray(np.full((32, 32), level, np.uint8)).save(root / f"images/{name}.bmp")
    build(frame, root, tmp_path / "c")
    Image.fromarray(np.full((32, 32), 30, np.uint8)).save(root / "images/b.bmp")
    os.utime(root / "images/b.bmp", (5, 5))
    assert (build(frame, root, tmp_path / "c")["images/b.bmp"] == 30).all()


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
    assert "study s2, row 4: images/002.png: truncated" in text
    assert "study s4, row 6: images/004.png: no such file" in text
    assert "study s7, row 9: images/007.png: the file is empty" in text
    assert "on_error='exclude'" in text
    assert not list((tmp_path / "c").glob("*.json"))


def test_more_than_ten_bad_studies_are_counted(root, tmp_path):
    cells = [f"images/no{i:02d}.png" for i in range(14)]
    with pytest.raises(ImageError, match="and 4 more studies") as caught:
        build(frame_of("images/000.png", *cells), root, tmp_path / "c")
    assert str(caught.value).count("no such file") == 10


def test_after_repair_only_the_repaired_image_is_decoded(root, tmp_path, monkeypatch):
    frame = all_images(root)
    spoil(root)
    with pytest.raises(ImageError):
        build(frame, root, tmp_path / "c")
    good = {path: (root / path).stat().st_mtime_ns for path in frame["images"] if (root / path).exists()}
    make_images(tmp_path / "spare", 12)
    for name in ("002", "004", "007"):
        shutil.copy(tmp_path / f"spare/images/{name}.png", root / f"images/{name}.png")
    assert good  # the others keep their times
    decoded = []
    real = cache_build._decode
    monkeypatch.setattr(cache_build, "_decode", lambda task, path: decoded.append(path) or real(task, path))
    cache = build(frame, root, tmp_path / "c")
    assert sorted(decoded) == ["images/002.png", "images/004.png", "images/007.png"]
    cache.verify()
    assert (cache.rows(cache.paths) == build(frame, tmp_path / "spare", tmp_path / "d").rows(cache.paths)).all()


def test_exclude_lists_every_study_and_cuts_them_from_the_frame(root, tmp_path):
    spoil(root)
    frame = frame_of("images/000.png;images/002.png", "images/001.png", "images/004.png", "images/003.png")
    frame.attrs["excluded"] = [{"study_id": "before", "row": 9, "column": "images", "reason": "earlier"}]
    cache = build(frame, root, tmp_path / "c", on_error="exclude")
    assert [(item["study_id"], item["row"], item["column"]) for item in cache.excluded] == [
        ("s0", 2, "images"),
        ("s2", 4, "images"),
    ]
    assert "images/002.png: truncated" in cache.excluded[0]["reason"]
    kept = cache.usable(frame)
    assert kept["study_id"].tolist() == ["s1", "s3"]
    assert [item["study_id"] for item in kept.attrs["excluded"]] == ["before", "s0", "s2"]
    assert cache.paths == ("images/000.png", "images/001.png", "images/003.png")
    for path in cache.paths:
        original = np.asarray(Image.open(root / path))
        assert (cache[path] == Geometry.fit(*original.shape, 32).apply(original)).all()
    cache.verify()
    with pytest.raises(CacheError, match="truncated"):
        cache.image("images/002.png")


def test_exclusions_are_remembered_and_still_raise_when_asked(root, tmp_path):
    frame = all_images(root)
    spoil(root)
    first = build(frame, root, tmp_path / "c", on_error="exclude")
    assert build(frame, root, tmp_path / "c", on_error="exclude").excluded == first.excluded
    with pytest.raises(ImageError, match="3 of 12"):
        build(frame, root, tmp_path / "c")
    make_images(root, 12)  # repaired: tried again without being told
    repaired = build(frame, root, tmp_path / "c", on_error="exclude")
    assert repaired.excluded == []
    assert len(repaired) == 12


def test_rows_of_a_cut_frame_are_those_of_the_csv(root, tmp_path):
    later = all_images(root).iloc[2:5]  # labels 2, 3, 4 of a read manifest
    spoil(root)
    with pytest.raises(ImageError, match="study s2, row 4"):
        build(later, root, tmp_path / "c")


def test_nothing_usable_is_an_error_even_with_exclude(root, tmp_path):
    with pytest.raises(ImageError, match="none of the 2 images"):
        build(frame_of("x.png", "y.png"), root, tmp_path / "c", on_error="exclude")


@pytest.mark.parametrize("path", ["../outside.png", "images/../../outside.png", "/outside.png"])
def test_a_path_out_of_the_root_is_refused(root, tmp_path, path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "outside.png")
    absolute = str(tmp_path / path[1:]) if path.startswith("/") else path
    with pytest.raises(ImageError, match="leads out of the root"):
        build(frame_of(absolute), root, tmp_path / "c")


def test_options_are_checked(root, tmp_path):
    with pytest.raises(ValueError, match="on_error='skip'"):
        build(all_images(root), root, tmp_path / "c", on_error="skip")
    with pytest.raises(ValueError, match="no images"):
        build(all_images(root).iloc[:0], root, tmp_path / "c")
    with pytest.raises(ValueError, match="at least 1"):
        build(all_images(root), root, tmp_path / "c", workers=0)


def test_a_damaged_cache_is_refused(root, tmp_path):
    frame = all_images(root)
    cache = build(frame, root, tmp_path / "c")
    pixels = next((tmp_path / "c").glob("*.u8"))
    whole, index = pixels.read_bytes(), cache.index.read_text()

    pixels.write_bytes(whole[:-1])
    with pytest.raises(CacheError, match=r"12287 bytes instead of 12288\. Delete .*json"):
        build(frame, root, tmp_path / "c")
    pixels.unlink()
    with pytest.raises(CacheError, match="is missing"):
        ImageCache(cache.index)
    pixels.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CacheError, match=r"'images/000\.png'.*damaged"):
        ImageCache(cache.index).verify()
    pixels.write_bytes(whole)

    for damage in (index[: len(index) // 2], index.replace('"size": 32', '"size": 16'), "[]", ""):
        assert damage != index
        cache.index.write_text(damage)
        with pytest.raises(CacheError, match="checksum differs"):
            build(frame, root, tmp_path / "c")
    with pytest.raises(CacheError, match="no such image cache"):
        ImageCache(tmp_path / "c/none.json")
    cache.index.unlink()
    assert len(build(frame, root, tmp_path / "c")) == 12  # the remedy works


def test_another_format_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "FORMAT", 99)
    with pytest.raises(CacheError, match="format 99, this version reads 1"):
        build(all_images(root), root, tmp_path / "c")


def test_a_cache_pickles_as_a_path(root, tmp_path):
    frame = all_images(root)
    spoil(root)
    cache = build(frame, root, tmp_path / "c", on_error="exclude")
    data = pickle.dumps(cache)
    assert len(data) < 3000
    other = pickle.loads(data)
    assert (other.rows(cache.paths) == cache.rows(cache.paths)).all()
    assert other.excluded == cache.excluded


def test_progress_counts_up_and_prints_whole_lines(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_build, "_BLOCK", 5)
    seen = []
    build(all_images(root), root, tmp_path / "c", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 12), (10, 12), (12, 12)]
    build(all_images(root), root, tmp_path / "d", progress=True)
    assert capsys.readouterr().out == "decoded 12 of 12 images in 0 s\n"


def test_a_read_only_cache_opens(root, tmp_path, monkeypatch):
    frame = all_images(root)
    build(frame, root, tmp_path / "c")
    (tmp_path / f"c/.{cache_key(frame, 32)}.lock").unlink()
    monkeypatch.setattr(cache_build.os, "access", lambda *_: False)
    assert len(build(frame, root, tmp_path / "c")) == 12
    assert not list((tmp_path / "c").glob(".*.lock"))
