"""How fast this machine reads memory, which bounds decoding."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 512 << 20
_REPETITIONS = 8


def measure(threads: int) -> float:
    """Bytes per second that so many threads read together: the best of some passes over 512 MiB, far beyond caches."""
    block = np.ones(_BYTES // 8, np.int64)
    parts = np.array_split(block, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPETITIONS):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, _BYTES / (time.perf_counter() - started))
    return best
