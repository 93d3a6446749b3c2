"""How fast memory can be read here: published for accelerators, measured for processors."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from maxstack.serve.cost import CHIPS

# Names of JAX devices, and the chips of the table. A TPU7x chip is two devices.
KINDS = {
    "tpu v5 lite": ("v5e", 1.0), "tpu v5e": ("v5e", 1.0), "tpu v5": ("v5p", 1.0), "tpu v5p": ("v5p", 1.0),
    "tpu v6 lite": ("v6e", 1.0), "tpu v6e": ("v6e", 1.0), "tpu7x": ("v7x", 0.5),
}  # fmt: skip
SAMPLE_BYTES = 1 << 27
TRIES = 3


def peak_bandwidth(kind: str) -> float | None:
    """Bytes a second of a JAX device's memory (`device_kind`); None where it is not known."""
    kind = kind.lower().strip()
    if kind == "cpu":
        return measured()
    if kind in KINDS:
        chip, share = KINDS[kind]
        return CHIPS[chip].bytes_a_second * share
    words = kind.replace("-", " ").split()
    return next((chip.bytes_a_second for name, chip in CHIPS.items() if name in words), None)


def measured() -> float:
    """Bytes a second that all cores together read, the best of a few tries: about a tenth of a second."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [np.ones(SAMPLE_BYTES // threads // 8) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(TRIES):
            began = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, SAMPLE_BYTES / (time.perf_counter() - began))
    return best
