"""Images decoded in parts: the cache made from them has the bytes of one made alone, whatever happened to a part."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from gloria_core.data import cache as cache_build
from gloria_core.data.cache import CacheError, Shares, build_share, main, parse_part
from gloria_core.data.dataset import save_dataset
from gloria_core.data.sources import prepare

N, SIZE = 11, 16


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "root"
    folder.mkdir()
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24)).astype(np.uint8)).save(folder / f"s{i:02d}.png")
    rows = [f"s{i:02d}.png,p{i},finding" for i in range(N)]
    (folder / "studies.csv").write_text("\n".join(["image,patient,impression", *rows]) + "\n")
    return folder


@pytest.fixture
def save(root, tmp_path, capsys):
    """A function that prepares the dataset into a new folder; gives the cache's files and what was printed."""

    def run(name, **options):
        capsys.readouterr()
        folder = tmp_path / name
        save_dataset(folder, prepare("own_csv", root), name="own_csv", root=root, size=SIZE, **options)
        content = {file.name: file.read_bytes() for file in (folder / "cache").iterdir() if file.suffix != ".lock"}
        return content, capsys.readouterr().out

    return run


def share(root, folder, part, size=SIZE):
    return build_share("own_csv", root, size=size, folder=folder, part=part, progress=False)


def count_decoded(monkeypatch):
    """A list that grows by each file that is read for decoding."""
    decoded, real = [], cache_build.read_bytes
    monkeypatch.setattr(cache_build, "read_bytes", lambda file, name: decoded.append(name) or real(file, name=name))
    return decoded


@pytest.mark.parametrize("parts", [1, 3])
def test_the_bytes_are_those_of_a_cache_made_alone(root, tmp_path, save, monkeypatch, parts):
    alone, _ = save("alone")
    sizes = [len(share(root, tmp_path / "shares", f"{k}/{parts}")) for k in range(1, parts + 1)]
    assert sizes == {1: [11], 3: [4, 4, 3]}[parts]
    decoded = count_decoded(monkeypatch)
    shared, text = save("shared", shares=tmp_path / "shares")
    assert shared == alone and len(alone) == 2 and decoded == []
    assert f"took 11 of 11 images from {parts} share" in text and "damaged" not in text


def test_a_part_is_every_nth_image(root, tmp_path):
    assert share(root, tmp_path / "shares", "2/4").paths == ("s01.png", "s05.png", "s09.png")
    assert share(root, tmp_path / "shares", "12/20") is None


def test_what_no_part_has_is_decoded(root, tmp_path, save, monkeypatch):
    alone, _ = save("alone")
    for part in ("1/3", "3/3"):
        share(root, tmp_path / "shares", part)
    decoded = count_decoded(monkeypatch)
    shared, text = save("shared", shares=str(tmp_path / "shares"))
    assert shared == alone and sorted(decoded) == ["s01.png", "s04.png", "s07.png", "s10.png"]
    assert "took 7 of 11 images from 2 shares" in text


def test_a_source_that_changed_after_sharing_is_decoded_again(root, tmp_path, save):
    share(root, tmp_path / "shares", "1/1")
    Image.fromarray(np.full((30, 24), 200, np.uint8)).save(root / "s03.png")
    os.utime(root / "s05.png", ns=(10**18, 10**18))  # touched, but with the same content
    alone, _ = save("alone")
    shared, text = save("shared", shares=tmp_path / "shares")
    assert shared == alone and "took 10 of 11" in text


@pytest.mark.parametrize("harm", ["pixels", "index", "short"])
def test_a_damaged_share_is_told_and_decoded_again(root, tmp_path, save, harm):
    alone, _ = save("alone")
    for part in ("1/2", "2/2"):
        cache = share(root, tmp_path / "shares", part)
    pixels = next((tmp_path / "shares").glob(f"{cache.index.stem}-*.u8"))
    if harm == "pixels":  # the second of five images
        content = bytearray(pixels.read_bytes())
        content[SIZE**2 + 7] ^= 1
        pixels.write_bytes(content)
    elif harm == "short":
        os.truncate(pixels, SIZE**2)
    else:
        cache.index.write_text(cache.index.read_text().replace("s03.png", "s33.png"))
    shared, text = save("shared", shares=tmp_path / "shares")
    assert shared == alone
    assert f"took {10 if harm == 'pixels' else 6} of 11" in text
    assert text.count("damaged share, decoded here instead") == 1 and cache.index.stem in text


def test_all_shares_damaged_is_no_reason_to_stop(root, tmp_path, save):
    share(root, tmp_path / "shares", "1/1").index.write_text("{}")
    alone, _ = save("alone")
    shared, text = save("shared", shares=tmp_path / "shares")
    assert shared == alone and "took 0 of 11 images from 0 shares" in text and "damaged share" in text


def test_an_unusable_image_is_left_to_the_whole_cache(root, tmp_path, save):
    (root / "s02.png").write_bytes(b"no image")
    assert "s02.png" not in share(root, tmp_path / "shares", "1/2")
    alone, _ = save("alone", on_error="exclude")
    shared, _ = save("shared", on_error="exclude", shares=tmp_path / "shares")
    assert shared == alone
    with pytest.raises(ValueError, match=r"1 of 11 images .*\n.*s02"):
        save("strict", shares=tmp_path / "shares")


def test_shares_of_another_size_or_none(root, tmp_path, save):
    with pytest.raises(CacheError, match="there is no such folder"):
        save("shared", shares=tmp_path / "nowhere")
    share(root, tmp_path / "shares", "1/1", size=8)
    (tmp_path / "shares/.0123.part.jsonl").touch()
    with pytest.raises(CacheError, match=r"no finished share of 16 pixels \(1 of another size, 1 unfinished\)"):
        save("shared", shares=tmp_path / "shares")
    with pytest.raises(CacheError, match="of 8 pixels"):
        Shares(tmp_path / "shares", size=8, behavior="published")
    assert Shares(tmp_path / "shares", size=8).number == 1
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("text", ["9/8", "0/8", "x", "1/0", "-1/8", "1/8/2", ""])
def test_bad_parts(text, root, tmp_path, capsys):
    with pytest.raises(ValueError, match="second of eight"):
        parse_part(text)
    command = ["--dataset", "own_csv", "--data-root", str(root), "--size", "16", "--folder", str(tmp_path / "f")]
    assert main([*command, f"--part={text}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: part") and repr(text) in error and not (tmp_path / "f").exists()


def test_two_parts_at_once(root, tmp_path, save):
    alone, _ = save("alone")
    context = multiprocessing.get_context("fork")
    at_work = [context.Process(target=share, args=(root, tmp_path / "shares", f"{k}/2")) for k in (1, 2, 2)]
    for process in at_work:
        process.start()
    for process in at_work:
        process.join(60)
    assert [process.exitcode for process in at_work] == [0, 0, 0]
    shared, text = save("shared", shares=tmp_path / "shares")
    assert shared == alone and "took 11 of 11 images from 2 shares" in text


def test_the_command_line(root, tmp_path):
    (root / "studies.csv").rename(root / "mine.csv")
    table = pd.read_csv(root / "mine.csv").rename(columns={"image": "file"})
    table.to_csv(root / "mine.csv", index=False)
    command = [sys.executable, "-m", "gloria_core.data.cache", "--dataset", "own_csv", "--data-root", root]
    command += ["--size", SIZE, "--folder", tmp_path / "shares", "--part", "2/2", "--workers", 1]
    command += ["--option", "table=mine.csv", "--option", "columns={image: file}", "--option", "seed=3"]
    repository = Path(__file__).parents[2]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=repository, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "part 2/2: 5 images, in" in done.stdout and Shares(tmp_path / "shares", size=SIZE).number == 1


def test_options_of_the_command_line(root, tmp_path, capsys):
    command = ["--data-root", str(root), "--size", "16", "--folder", str(tmp_path / "f"), "--part", "1/1"]
    for extra, text in (
        (["--dataset", "own_cvs"], "did you mean 'own_csv'"),
        (["--dataset", "own_csv", "--option", "seed"], "name=value"),
        (["--dataset", "own_csv", "--option", "tabel=mine.csv"], "no option 'tabel'; it has: table"),
        (["--dataset", "own_csv", "--option", "columns={image"], "cannot be read"),
        (["--dataset", "own_csv", "--option", "table=none.csv"], "none.csv"),
        (["--dataset", "own_csv", "--workers", "0"], "must both be at least 1"),
    ):
        assert main([*command, *extra]) == 2
        assert text in capsys.readouterr().err
    assert main([*command, "--dataset", "own_csv"]) == 0
    assert "part 1/1: 11 images" in capsys.readouterr().out
