"""The GPU interpreter, with the races of every kernel that runs in it, on one device or several simulated ones.

jax 0.11.2 keeps the race report of the kernel that ran last, and when a block ends on any device it sets back the
clocks of the threads of all devices: `cluster_finished` says that "no code is running" then, which holds for one device
alone. A thread in the middle of a block on another device so forgets what it has waited for, and its next access looks
unordered: a race that is not there. Here a block that ends sets back the clocks of its own device only.
"""

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory
from jax.experimental.pallas import mosaic_gpu as plgpu


@contextlib.contextmanager
def interpreted(**settings: Any) -> Iterator[list[Any]]:
    """Mosaic GPU kernels run in the interpreter; the race reports of all of them, at the end."""
    reports: list[Any] = []
    make = gpu_callbacks.GPURaceDetectionState

    def kept(**sizes: Any) -> Any:
        reports.append(make(**sizes))
        return reports[-1]

    gpu_callbacks.reset_gpu_interpret_mode_state()
    with (
        mock.patch.object(gpu_callbacks, "GPURaceDetectionState", kept),
        mock.patch.object(gpu_callbacks.memory, "GPUSharedMemory", Apart),
        plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True, **settings)),
    ):
        yield reports


def races_in(reports: list[Any]) -> bool:
    """Whether any kernel had one."""
    assert reports, "no kernel was interpreted"
    return any(report.races_found for report in reports)


class Apart(GPUSharedMemory):
    """Simulated devices of which none sets back the clocks of another."""

    def __init__(self, **sizes: Any):
        self.ended: Counter[int] | None = None
        self.devices = sizes["num_devices"]
        super().__init__(**sizes)
        self.ended = Counter()

    def reset_per_cluster_state(self) -> None:
        """When a block has ended: `kernel_thread_finished` has done it for its device."""
        if self.ended is None or self.devices == 1:
            super().reset_per_cluster_state()

    def kernel_thread_finished(self, thread: Any) -> None:
        super().kernel_thread_finished(thread)
        if self.devices == 1 or self.ended is None:
            return
        own = [each for each in self.all_concurrent_threads if each.device_id == thread.device_id]
        with self.lock:
            self.ended[thread.device_id] += 1
            if self.ended[thread.device_id] < self.num_blocks_per_cluster * self.num_pallas_threads_per_block:
                return
            self.ended[thread.device_id] = 0
            for each in own:
                self.clocks[each] = self.VectorClock(self.vector_clock_size)
                self.pending_smem_to_gmem_read_clocks[each] = deque()
                self.pending_smem_to_gmem_write_clocks[each] = deque()

    def assert_no_barriers_allocated(self) -> None:
        """Not where several devices run: it looks for those of all, and others may still use theirs."""
        if self.devices == 1:
            super().assert_no_barriers_allocated()
