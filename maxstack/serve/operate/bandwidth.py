"""How fast memory can be read here: published for accelerators, measured for processors."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from maxstack.serve.cost import CHIPS

# Names of JAX devices, and the chips of the table. A TPU7x chip is two devices.
KINDS = {
    "tpu v5 lite": ("v5e", 1.0), "tpu v5e": ("v5e", 1.0), "tpu v5": ("v5p", 1.0), "tpu v5p": ("v5p", 1.0),
    "tpu v6 lite": ("v6e", 1.0), "tpu v6e": ("v6e", 1.0), "tpu7x": ("v7x", 0.5),
}  # fmt: skip
SAMPLE_BYTES = 1 << 27
TRIES = 3


def peak_bandwidth(kind: str, lying: Sequence[Any] = ()) -> float | None:
    """Bytes a second of a JAX device's memory (`device_kind`); None where it is not known. On a CPU the arrays `lying`
    in memory are read for it, where they are enough."""
    kind = kind.lower().strip()
    if kind == "cpu":
        return measured(lying)
    if kind in KINDS:
        chip, share = KINDS[kind]
        return CHIPS[chip].bytes_a_second * share
    words = kind.replace("-", " ").split()
    return next((chip.bytes_a_second for name, chip in CHIPS.items() if name in words), None)


def measured(lying: Sequence[Any] = ()) -> float:
    """Bytes a second that all cores together read, the best of a few tries: less than a tenth of a second."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = pieces(lying, SAMPLE_BYTES // threads // 8, threads)
    if len(parts) < threads:
        parts = [np.ones(SAMPLE_BYTES // threads // 8, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIES):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - began))
    return best


def pieces(lying: Sequence[Any], size: int, most: int) -> list[np.ndarray]:
    """So many pieces of `size` numbers of 8 bytes, from arrays that lie in memory, of those on several devices from the
    first part that is here; fewer where they are not enough."""
    found: list[np.ndarray] = []
    for array in lying:
        if len(found) >= most:
            break
        here = getattr(array, "addressable_shards", None)
        numbers = np.asarray(here[0].data if here else array).reshape(-1).view(np.uint8)
        numbers = numbers[: numbers.size // 8 * 8].view(np.uint64)
        starts = range(0, numbers.size - size + 1, size)
        found += [numbers[start : start + size] for start in starts][: most - len(found)]
    return found
