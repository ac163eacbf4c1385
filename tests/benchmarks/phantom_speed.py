"""Phantom images a second on one core: `OMP_NUM_THREADS=1 python tests/benchmarks/phantom_speed.py [size ...]`.

Promise: at least 50 images/s at 128 px, report and masks included.
"""

import sys
import time

from gloria_core import phantom


def rate(size: int, view: str, *, seconds: float = 4.0) -> float:
    """Images of one view drawn in a second of one core's time."""
    keys = [(p.patient, k) for p in phantom.patients(0, 400) for k in range(1, p.studies + 1)]
    phantom.study(0, *keys[0], size=size, views=(view,))
    start, count = time.process_time(), 0
    for key in keys:
        phantom.study(0, *key, size=size, views=(view,))
        count += 1
        if time.process_time() - start > seconds:
            break
    return count / (time.process_time() - start)


if __name__ == "__main__":
    for size in [int(argument) for argument in sys.argv[1:]] or [64, 128, 256, 512]:
        print(f"{size:4d} px: " + ", ".join(f"{view} {rate(size, view):.0f}/s" for view in phantom.VIEWS))
