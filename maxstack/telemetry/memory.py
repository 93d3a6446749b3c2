"""Memory of this process and of its devices, in bytes."""

import sys
from pathlib import Path
from typing import NamedTuple


class MemoryUse(NamedTuple):
    """Bytes now and at most so far."""

    current_bytes: int
    peak_bytes: int


def host_memory() -> MemoryUse:
    """Resident memory of this process."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        now, peak = (1024 * int(fields[key].split()[0]) if key in fields else 0 for key in ("VmRSS", "VmHWM"))
        # The kernel updates the two at different times.
        return MemoryUse(now, max(now, peak))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return MemoryUse(peak, peak)


def device_memory() -> MemoryUse:
    """Memory of the fullest local device, from its allocator; where it keeps no count (CPU) that of the process.

    Asks the allocator only: it does not wait for running work.
    """
    import jax

    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not stats:
        return host_memory()
    now = max(int(s.get("bytes_in_use", 0)) for s in stats)
    return MemoryUse(now, max(now, *(int(s.get("peak_bytes_in_use", 0)) for s in stats)))
