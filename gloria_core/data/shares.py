"""Decoding the images of one dataset on several machines that see the same disk.

    python -m gloria_core.data.shares --dataset chexpert --data-root /data/chexpert --size 256 \
        --folder /disk/shares --part 2/8 [--option views=all] [--workers 16]

decodes the 2nd of every 8 images into an image cache of its own in `--folder`; parts may run at once, in any order, and
a part that was killed goes on when the command is given again. Then notebook 01 with `shares: /disk/shares` (or
`save_dataset(..., shares=...)`) takes its images from there and decodes what is missing: the result has the same bytes
as without shares. Give the options that notebook 01 is given, so that both find the same images.

Exit codes: 0 the part is finished; 2 the command, the dataset or all images of the part are wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from gloria_core.data import sources
from gloria_core.data.cache import ImageCache, image_paths
from gloria_core.data.cache_files import CacheError, Entry, checksum, read_index, same_source
from gloria_core.types import Behavior

COMMAND = "python -m gloria_core.data.shares"


class Shares:
    """The images in the finished shares of a folder; threads may ask at the same time.

    Attributes:
        number: how many shares there are; taken: how many images were given out
        damaged: index file -> what is wrong with it; its images are not given out
    """

    def __init__(self, folder: str | Path, *, size: int, behavior: Behavior = "corrected") -> None:
        """Open the shares of this size (pixels). Raises: CacheError for a folder that has none."""
        self.folder, self.taken, self.damaged = Path(folder), 0, {}
        self._lock, self._bodies, self._pixels = Lock(), [], []
        self._places: dict[str, tuple[int, int]] = {}
        for index in sorted(self.folder.glob("*.json")):
            try:
                body = read_index(index)
            except CacheError as error:
                self.damaged[index] = str(error)
                continue
            if (body["size"], body["behavior"]) == (size, behavior):
                self._add(index, body)
        if not self._bodies and not self.damaged:
            raise CacheError(
                f"{self.folder} has no finished share of {size} pixels{self._others()}; "
                f"make them with {COMMAND} --size {size}, or give no shares"
            )

    def find(self, path: str, file: Path) -> tuple[Entry, NDArray[np.uint8]] | None:
        """Index entry and pixels (size, size) uint8 of an image, None if no share has it as `file` is now."""
        if path not in self._places:
            return None
        share, row = self._places[path]
        index, body = self._bodies[share]
        entry = Entry(*(body[name][row] for name in Entry.__dataclass_fields__))
        square = np.array(self._pixels[share][row])
        if checksum(square) != entry.pixels_crc:
            with self._lock:
                self.damaged.setdefault(index, f"{index}: the pixels of {path!r} are damaged")
            return None
        if not same_source(file, entry):
            return None
        with self._lock:
            self.taken += 1
        return replace(entry, mtime_ns=file.stat().st_mtime_ns), square

    @property
    def number(self) -> int:
        return len(self._bodies)

    def summary(self, total: int) -> str:
        """What was taken for a cache of `total` images, and a line for each damaged share."""
        from_where = f"from {self.number} share{'s'[: self.number != 1]} in {self.folder}"
        lines = [f"took {self.taken:,} of {total:,} images {from_where}; the others were decoded here, now or before"]
        lines += [f"damaged share, decoded here instead: {text}" for text in self.damaged.values()]
        return "\n".join(lines)

    def _add(self, index: Path, body: dict) -> None:
        number = len(self._bodies)
        self._bodies.append((index, body))
        shape = (len(body["path"]), body["size"], body["size"])
        self._pixels.append(np.memmap(index.parent / body["pixels"], np.uint8, mode="r", shape=shape))
        for row, path in enumerate(body["path"]):
            self._places.setdefault(path, (number, row))

    def _others(self) -> str:
        """What there is instead."""
        if not self.folder.is_dir():
            return " (there is no such folder)"
        unfinished = len(list(self.folder.glob(".*.part.jsonl")))
        others = len(list(self.folder.glob("*.json")))
        return f" ({others} of another size, {unfinished} unfinished)" if others or unfinished else ""


def parse_part(text: str) -> tuple[int, int]:
    """ "2/8" -> (2, 8). Raises ValueError unless it is k/n with 1 <= k <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise ValueError(f"part {text!r} is not k/n with 1 <= k <= n: 2/8 is the second of eight")
    return part, parts


def build_share(
    dataset: str,
    root: str | Path,
    *,
    size: int,
    folder: str | Path,
    part: str,
    options: Mapping[str, object] | None = None,
    workers: int = 2,
    progress: bool = True,
) -> ImageCache | None:
    """Decode a part ("2/8") of the images of `sources.prepare(dataset, root, options)` into a cache in `folder`.

    An image that cannot be used is left out: the cache that is built from the shares tells about it. None where there
    are fewer images than parts, and this part has none. Raises what `prepare` raises for the dataset and ImageError
    where no image of the part can be used; ValueError for a part that is none.
    """
    place, parts = parse_part(part)
    known = sources.options_of(dataset)
    for option in options or {}:
        if option not in known:
            raise ValueError(f"dataset {dataset!r} has no option {option!r}; it has: {', '.join(known)}")
    paths = image_paths(sources.prepare(dataset, root, options))[place - 1 :: parts]
    if not paths:
        return None
    frame = pd.DataFrame({"study_id": paths, "images": paths})
    return ImageCache.build(
        frame, root, size=size, folder=folder, workers=workers, on_error="exclude", progress=progress
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        cache = build_share(
            given.dataset,
            given.data_root,
            size=given.size,
            folder=given.folder,
            part=given.part,
            options=dict(_assignment(text) for text in given.option),
            workers=given.workers,
        )
    except ValueError as error:  # ManifestError, ImageError and CacheError are such
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if cache is None:
        print(f"part {given.part}: there are fewer images than parts; nothing to do")
    else:
        unusable = f", {len(cache.excluded)} cannot be used" if cache.excluded else ""
        print(f"part {given.part}: {len(cache):,} images{unusable}, in {cache.index}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Decode a part of a dataset's images.")
    parser.add_argument("--dataset", required=True, help="a module of gloria_core.data.sources, as in notebook 01")
    parser.add_argument("--data-root", required=True, help="the raw folder")
    parser.add_argument("--size", required=True, type=int, help="pixels of the squares: notebook 01's image_size")
    parser.add_argument("--folder", required=True, help="where the shares are put; the same for all machines")
    parser.add_argument("--part", required=True, metavar="K/N", help="which part, such as 2/8")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of the dataset; YAML")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="threads")
    return parser


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"option {text!r} must be written name=value")
    try:
        return name.strip(), yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise ValueError(f"option {text!r}: the value cannot be read; put quotes around text") from None


if __name__ == "__main__":
    sys.exit(main())
