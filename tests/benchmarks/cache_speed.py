"""How fast an image cache is built, opened and read: `python tests/benchmarks/cache_speed.py ROOT [SIZE]`.

ROOT is a folder whose `images/` holds PNG, JPEG or DICOM files. Prints images per second for one and two threads, and
the split between decoding and resizing for one thread. No test: the numbers depend on the machine and its load.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from gloria_core.data.cache import ImageCache
from gloria_core.data.geometry import Geometry
from gloria_core.data.images import read_gray


def main(root: Path, size: int) -> None:
    paths = sorted(file.relative_to(root).as_posix() for file in (root / "images").rglob("*") if file.is_file())
    frame = pd.DataFrame({"study_id": [str(i) for i in range(len(paths))], "images": paths})

    sample = [root / path for path in paths[:: max(1, len(paths) // 200)]]
    start = time.perf_counter()
    images = [read_gray(file) for file in sample]
    decode = (time.perf_counter() - start) / len(sample)
    start = time.perf_counter()
    for image in images:
        Geometry.fit(*image.shape, size).apply(image)
    resize = (time.perf_counter() - start) / len(sample)
    print(f"{root.name}, {len(paths)} images, size {size}: decode {decode * 1e3:.2f} ms, resize {resize * 1e3:.2f} ms")

    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            cache = ImageCache.build(frame, root, size=size, folder=folder, workers=workers, progress=False)
            built = time.perf_counter() - start
            start = time.perf_counter()
            ImageCache.build(frame, root, size=size, folder=folder, progress=False)
            opened = time.perf_counter() - start
            order = np.random.default_rng(0).permutation(len(paths))
            start = time.perf_counter()
            for row in order:
                cache[paths[row]].max()
            read = time.perf_counter() - start
        print(
            f"  {workers} threads: build {len(paths) / built:.0f} images/s, reopen {opened:.2f} s, "
            f"random reads {len(paths) / read:.0f} images/s"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 128)
