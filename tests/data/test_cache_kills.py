"""Image cache builds that are killed, or run side by side: no cache or a whole one, and always the same in the end."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data import cache as cache_build
from gloria_core.data.cache import ImageCache

FORK = multiprocessing.get_context("fork")


def make_images(root, n):
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (40 - i % 7, 30)).astype(np.uint8)).save(root / f"images/{i:03d}.png")


@pytest.fixture
def root(tmp_path):
    make_images(tmp_path / "root", 12)
    return tmp_path / "root"


def all_images(root):
    paths = sorted(file.relative_to(root).as_posix() for file in (root / "images").iterdir())
    return pd.DataFrame({"study_id": paths, "images": paths})


def build(frame, root, folder, progress=False):
    return ImageCache.build(frame, root, size=32, folder=folder, progress=progress)


def visible(folder):
    return sorted(file.name for file in Path(folder).iterdir() if not file.name.endswith(".lock"))


def in_child(work):
    """Run `work` in a forked process and give back its exit code (-9: it was killed)."""
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def killed_at(moment):
    """A build step that kills its own process the way a scheduler does: at once, without clean-up."""

    def step(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def after_blocks(number):
        return lambda done, total: step() if done >= number else None

    if isinstance(moment, int):
        return {"progress": after_blocks(moment)}, None
    return {}, (moment, step)


@pytest.mark.parametrize(
    "moment", [4, 8, 12, "_commit", "write_index", "os.fsync", "write_journal", "Path.unlink", "Path.replace"]
)
def test_a_killed_build_leaves_no_cache_or_a_whole_one(root, tmp_path, moment, monkeypatch):
    frame = all_images(root)
    whole = build(frame, root, tmp_path / "undisturbed")
    monkeypatch.setattr(cache_build, "_BLOCK", 4)
    options, patch = killed_at(moment)

    def work():
        if patch and patch[0].startswith("Path."):
            setattr(Path, patch[0][5:], patch[1])
        elif patch and patch[0] == "os.fsync":
            os.fsync = patch[1]
        elif patch:
            setattr(cache_build, patch[0], patch[1])
        build(frame, root, tmp_path / "c", **options)

    assert in_child(work) == -signal.SIGKILL
    indexes = list((tmp_path / "c").glob("*.json"))
    if indexes:
        ImageCache(indexes[0]).verify()
    cache = build(frame, root, tmp_path / "c")
    assert cache.index.read_bytes() == whole.index.read_bytes()
    assert (cache.rows(cache.paths) == whole.rows(whole.paths)).all()
    assert visible(tmp_path / "c") == visible(tmp_path / "undisturbed")


def test_a_killed_build_is_taken_up_where_it_stopped(root, tmp_path, monkeypatch):
    frame = all_images(root)
    monkeypatch.setattr(cache_build, "_BLOCK", 4)
    options, _ = killed_at(8)
    assert in_child(lambda: build(frame, root, tmp_path / "c", **options)) == -signal.SIGKILL
    journal = next((tmp_path / "c").glob(".*.jsonl"))
    lines = journal.read_text().splitlines()
    assert len(lines) == 8
    # a torn last line, and one line whose pixels never reached the disk
    torn = json.loads(lines[3]) | {"pixels_crc": 1}
    journal.write_text("\n".join([*lines[:3], json.dumps(torn), *lines[4:7], lines[7][:20]]))
    decoded = []
    real = cache_build._decode
    monkeypatch.setattr(cache_build, "_decode", lambda task, path: decoded.append(path) or real(task, path))
    build(frame, root, tmp_path / "c").verify()
    assert sorted(decoded) == [f"images/{i:03d}.png" for i in (3, 7, 8, 9, 10, 11)]


def test_kills_at_random_times_end_with_the_right_cache(tmp_path, monkeypatch):
    make_images(tmp_path / "root", 60)
    frame = all_images(tmp_path / "root")
    whole = build(frame, tmp_path / "root", tmp_path / "undisturbed")
    monkeypatch.setattr(cache_build, "_BLOCK", 2)
    real = cache_build._decode
    monkeypatch.setattr(cache_build, "_decode", lambda task, path: time.sleep(0.004) or real(task, path))
    rng = np.random.default_rng(0)
    kills = 0
    for delay in rng.uniform(0.01, 0.09, 12):
        child = FORK.Process(target=build, args=(frame, tmp_path / "root", tmp_path / "c"))
        child.start()
        child.join(delay)
        kills += child.is_alive()
        child.kill()
        child.join()
        for index in (tmp_path / "c").glob("*.json"):
            ImageCache(index).verify()
    assert kills >= 2
    cache = build(frame, tmp_path / "root", tmp_path / "c")
    assert cache.index.read_bytes() == whole.index.read_bytes()
    assert (cache.rows(cache.paths) == whole.rows(whole.paths)).all()


@pytest.mark.parametrize("locks", [True, False], ids=["with-locks", "without-locks"])
def test_rival_builders_do_not_harm_each_other(root, tmp_path, monkeypatch, locks):
    frame = all_images(root)
    whole = build(frame, root, tmp_path / "undisturbed")
    log = tmp_path / "decoded"
    real = cache_build._decode

    def slow(task, path):
        with log.open("a") as file:
            file.write(path + "\n")
        time.sleep(0.01)
        return real(task, path)

    monkeypatch.setattr(cache_build, "_decode", slow)
    if not locks:
        monkeypatch.setattr(cache_build, "_lock", lambda *_: False)
    rivals = [FORK.Process(target=build, args=(frame, root, tmp_path / "c")) for _ in range(4)]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join(30)
    assert [rival.exitcode for rival in rivals] == [0, 0, 0, 0]
    if locks:
        assert len(log.read_text().split()) == 12  # the other three waited and decoded nothing
    cache = build(frame, root, tmp_path / "c")
    assert cache.index.read_bytes() == whole.index.read_bytes()
    cache.verify()
    assert visible(tmp_path / "c") == visible(tmp_path / "undisturbed")


def test_the_lock_of_a_dead_builder_is_free(root, tmp_path):
    frame = all_images(root)
    options, _ = killed_at(12)
    assert in_child(lambda: build(frame, root, tmp_path / "c", **options)) == -signal.SIGKILL
    start = time.monotonic()
    build(frame, root, tmp_path / "c")
    assert time.monotonic() - start < 5
