"""Image cache builds that are killed, run side by side or in shards: no cache or a whole one, always the same bytes."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data import cache as cache_module
from gloria_core.data.cache import CacheError, ImageCache, fill, image_paths, main
from gloria_core.data.dataset import save_dataset
from gloria_core.data.sources import prepare

FORK = multiprocessing.get_context("fork")
N, SIZE, ROW = 12, 32, 4096  # images, pixels, bytes of a row


@pytest.fixture
def root(tmp_path):
    """A folder of images with the table of `own_csv`."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "root"
    folder.mkdir()
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (40 - i % 7, 30)).astype(np.uint8)).save(folder / f"s{i:02d}.png")
    rows = [f"s{i:02d}.png,p{i},finding" for i in range(N)]
    (folder / "studies.csv").write_text("\n".join(["image,patient,impression", *rows]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_module, "_BLOCK", 4)


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by each image that is decoded."""
    paths, real = [], cache_module._decode
    monkeypatch.setattr(
        cache_module, "_decode", lambda root, path, *rest: paths.append(path) or real(root, path, *rest)
    )
    return paths


def frame_of(root):
    paths = sorted(file.name for file in root.glob("*.png"))
    return pd.DataFrame({"study_id": paths, "images": paths})


def intact(cache):
    rows = [cache._rows[row] for row in cache._row_of.values()]
    return all(row["record"]["done"] == 1 and cache_module._checksum(row) == row["record"]["crc"] for row in rows)


def build(root, folder):
    return ImageCache.build(frame_of(root), root, size=SIZE, folder=folder, progress=False)


def fill_shard(root, folder, number, count):
    return fill(image_paths(frame_of(root)), root, size=SIZE, folder=folder, shard=(number, count), progress=False)


def content(folder):
    """The bytes of the cache's files; a killed rename may leave a hidden temporary file."""
    return {file.name: file.read_bytes() for file in Path(folder).iterdir() if not file.name.startswith(".")}


def in_child(work):
    """Run `work` in a forked process and give back its exit code (-9: it was killed)."""
    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def kill_at_call(module, name, number, *, after):
    """Kills this process, as a scheduler does, before or after the n-th call of a function."""
    real, calls = getattr(module, name), itertools.count(1)

    def wrapped(*arguments, **options):
        call = next(calls)
        if call == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, wrapped)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        *[(cache_module, "_write", number) for number in range(1, 7)],  # three blocks: rows, flags, rows, ...
        *[(os, "fsync", number) for number in range(1, 8)],  # and the index
        *[(cache_module, "_decode", number) for number in (1, 6, 12)],
        (cache_module, "atomic_write", 1),
        (Path, "replace", 1),
    ],
)
def test_a_killed_build_leaves_no_cache_or_a_whole_one(root, tmp_path, module, name, number, after):
    build(root, tmp_path / "undisturbed")

    def work():
        kill_at_call(module, name, number, after=after)
        build(root, tmp_path / "c")

    assert in_child(work) == -signal.SIGKILL
    for index in (tmp_path / "c").glob("*.json"):
        assert intact(ImageCache(index))
    build(root, tmp_path / "c")
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed")


def test_flags_are_set_after_the_pixels_are_synced(root, tmp_path, monkeypatch):
    states = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        file = next((tmp_path / "c").glob("*.u8"))
        rows = np.fromfile(file, cache_module._row_type(SIZE))
        states.append((int(rows["record"]["crc"].astype(bool).sum()), int(rows["record"]["done"].sum())))

    monkeypatch.setattr(os, "fsync", fsync)
    build(root, tmp_path / "c")
    assert states[:6] == [(4, 0), (4, 4), (8, 4), (8, 8), (12, 8), (12, 12)]


def test_a_killed_build_goes_on_and_torn_rows_are_decoded_again(root, tmp_path, decoded):
    build(root, tmp_path / "undisturbed")
    del decoded[:]

    def work():
        kill_at_call(cache_module, "_write", 4, after=True)
        build(root, tmp_path / "c")

    assert in_child(work) == -signal.SIGKILL
    file = next((tmp_path / "c").glob("*.u8"))
    done = np.flatnonzero(np.fromfile(file, cache_module._row_type(SIZE))["record"]["done"])
    assert len(done) == 8
    data = bytearray(file.read_bytes())
    data[done[1] * ROW + 500 : done[1] * ROW + 900] = bytes(400)  # pixels that never reached the disk
    data[done[5] * ROW + 8] ^= 1  # the height
    file.write_bytes(data)
    assert intact(build(root, tmp_path / "c"))
    missing = set(range(N)) - set(done) | {done[1], done[5]}
    assert sorted(decoded) == [f"s{row:02d}.png" for row in sorted(missing)]
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed")


def test_kills_at_random_times_end_with_the_right_cache(root, tmp_path, monkeypatch):
    build(root, tmp_path / "undisturbed")
    monkeypatch.setattr(cache_module, "_BLOCK", 1)
    real = cache_module._decode
    monkeypatch.setattr(cache_module, "_decode", lambda *arguments: time.sleep(0.01) or real(*arguments))
    kills = 0
    for delay in np.random.default_rng(0).uniform(0.01, 0.09, 8):
        child = FORK.Process(target=build, args=(root, tmp_path / "c"))
        child.start()
        child.join(delay)
        kills += child.is_alive()
        child.kill()
        child.join()
        for index in (tmp_path / "c").glob("*.json"):
            assert intact(ImageCache(index))
    assert kills >= 2
    build(root, tmp_path / "c")
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed")


def test_rival_builds_share_the_work(root, tmp_path, monkeypatch):
    build(root, tmp_path / "undisturbed")
    log = tmp_path / "decoded"
    real = cache_module._decode
    monkeypatch.setattr(cache_module, "_BLOCK", 1)

    def slow(root, path, *rest):
        with log.open("a") as file:
            file.write(path + "\n")
        time.sleep(0.05)
        return real(root, path, *rest)

    monkeypatch.setattr(cache_module, "_decode", slow)

    def rival(seed):
        cache_module.random.seed(seed)
        build(root, tmp_path / "c")

    rivals = [FORK.Process(target=rival, args=(seed,)) for seed in range(4)]
    for process in rivals:
        process.start()
    for process in rivals:
        process.join(30)
    assert [process.exitcode for process in rivals] == [0, 0, 0, 0]
    assert N <= len(log.read_text().split()) < 3 * N  # four builds that know nothing of each other decode 4 * N
    assert content(tmp_path / "c") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("count", [1, 3])
def test_shards_fill_one_file_with_the_bytes_of_a_single_build(root, tmp_path, decoded, count):
    build(root, tmp_path / "alone")
    del decoded[:]
    for number in reversed(range(1, count + 1)):
        assert not list((tmp_path / "c").glob("*.json"))
        assert fill_shard(root, tmp_path / "c", number, count) == {}
    assert len(decoded) == N
    build(root, tmp_path / "c")
    assert len(decoded) == N
    assert content(tmp_path / "c") == content(tmp_path / "alone")


def test_a_shard_is_every_nth_image(root, tmp_path, decoded):
    fill_shard(root, tmp_path / "c", 2, 4)
    assert sorted(decoded) == ["s01.png", "s05.png", "s09.png"]
    assert fill_shard(root, tmp_path / "c", 13, 20) == {}
    assert len(decoded) == 3


def test_shards_at_once(root, tmp_path):
    build(root, tmp_path / "alone")
    shards = [FORK.Process(target=fill_shard, args=(root, tmp_path / "c", k, 3)) for k in (1, 2, 3, 3)]
    for process in shards:
        process.start()
    for process in shards:
        process.join(60)
    assert [process.exitcode for process in shards] == [0, 0, 0, 0]
    build(root, tmp_path / "c")
    assert content(tmp_path / "c") == content(tmp_path / "alone")


def test_save_dataset_completes_the_shards(root, tmp_path, decoded, capsys):
    fill_shard(root, tmp_path / "c", 1, 3)
    Image.fromarray(np.full((30, 24), 200, np.uint8)).save(root / "s03.png")  # changed since
    os.utime(root / "s03.png", (5, 5))
    file = next((tmp_path / "c").glob("*.u8"))
    with file.open("r+b") as rows:  # damaged since
        rows.seek(6 * ROW + 100)
        rows.write(b"damaged")
    del decoded[:]
    frame = prepare("own_csv", root)
    data = save_dataset(tmp_path / "run", frame, name="own_csv", root=root, size=SIZE, shards=tmp_path / "c")
    assert sorted(decoded) == [f"s{row:02d}.png" for row in range(N) if row not in (0, 9)]
    assert "2 of 12 images are in the cache already" in capsys.readouterr().out
    assert data.cache.index.parent == tmp_path / "c"
    assert (data.cache["s03.png"][:, 10:20] == 200).all()
    build(root, tmp_path / "alone")
    assert content(tmp_path / "c") == content(tmp_path / "alone")


def test_an_unusable_image_of_a_shard_is_left_to_the_whole_cache(root, tmp_path):
    (root / "s02.png").write_bytes(b"no image")
    assert list(fill_shard(root, tmp_path / "c", 1, 2)) == ["s02.png"]
    with pytest.raises(ValueError, match=r"1 of 12 images .*\n.*s02"):
        build(root, tmp_path / "c")


def test_shards_of_other_images_or_none(root, tmp_path):
    frame = prepare("own_csv", root)
    given = {"name": "own_csv", "root": root, "size": 16, "shards": tmp_path / "c"}
    with pytest.raises(CacheError, match=r"no shard of these images at 16 pixels \(it is empty or missing\)"):
        save_dataset(tmp_path / "run", frame, **given)
    fill_shard(root, tmp_path / "c", 1, 1)
    with pytest.raises(CacheError, match=r"it holds 1 caches of other images, sizes or options.*--size 16"):
        save_dataset(tmp_path / "run", frame, **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["9/8", "0/8", "x", "1/0", "-1/8", "1/8/2", ""])
def test_bad_shards(text, root, tmp_path, capsys):
    command = ["--dataset", "own_csv", "--data-root", str(root), "--size", "16", "--folder", str(tmp_path / "f")]
    with pytest.raises(SystemExit, match="2"):
        main([*command, f"--shard={text}"])
    error = capsys.readouterr().err
    assert "second of eight" in error and repr(text) in error and not (tmp_path / "f").exists()


def test_the_command_line(root, tmp_path):
    (root / "studies.csv").rename(root / "mine.csv")
    table = pd.read_csv(root / "mine.csv").rename(columns={"image": "file"})
    table.to_csv(root / "mine.csv", index=False)
    command = [sys.executable, "-m", "gloria_core.data.cache", "--dataset", "own_csv", "--data-root", root]
    command += ["--size", SIZE, "--folder", tmp_path / "c", "--shard", "2/2", "--workers", 1]
    command += ["--option", "table=mine.csv", "--option", "columns={image: file}", "--option", "seed=3"]
    repository = Path(__file__).parents[2]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    assert "shard 2/2: 6 images, in" in done.stdout
    rows = np.fromfile(next((tmp_path / "c").glob("*.u8")), cache_module._row_type(SIZE))
    assert rows["record"]["done"].tolist() == [0, 1] * 6


def test_options_of_the_command_line(root, tmp_path, capsys):
    command = ["--data-root", str(root), "--size", "16", "--folder", str(tmp_path / "f"), "--shard", "1/1"]
    for extra, text in (
        (["--dataset", "own_cvs"], "own_csv"),
        (["--dataset", "own_csv", "--option", "tabel=mine.csv"], "no option 'tabel'"),
        (["--dataset", "own_csv", "--option", "table=none.csv"], "none.csv"),
        (["--dataset", "own_csv", "--workers", "0"], "greater than 0"),
    ):
        assert main([*command, *extra]) == 2
        assert text in capsys.readouterr().err
    for option, text in (("seed", "name=value"), ("columns={image", "name=value")):
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--dataset", "own_csv", "--option", option])
        assert text in capsys.readouterr().err
    assert main([*command, "--dataset", "own_csv"]) == 0
    assert "shard 1/1: 12 images" in capsys.readouterr().out
    for file in root.glob("*.png"):
        file.write_bytes(b"no image")
    assert main([*command, "--dataset", "own_csv"]) == 2
    assert "none of the 12 images" in capsys.readouterr().err
