"""What a run tells about itself: metrics files, terminal display, where the time and the memory went, profiler.

Nothing here waits for a device, and jax is imported only where devices are asked.
"""

from maxstack.telemetry.config import TelemetryConfig
from maxstack.telemetry.display import Display
from maxstack.telemetry.goodput import ACTIVITIES, Goodput
from maxstack.telemetry.memory import MemoryUse, device_memory, host_memory
from maxstack.telemetry.peak import mfu, peak_flops
from maxstack.telemetry.profiler import Profiler
from maxstack.telemetry.rows import MetricsFile, read_rows
from maxstack.telemetry.timing import StepTime, StepTimer
from maxstack.telemetry.writers import TensorBoardWriter, WandbWriter, Writer, open_writers

__all__ = [
    "ACTIVITIES",
    "Display",
    "Goodput",
    "MemoryUse",
    "MetricsFile",
    "Profiler",
    "StepTime",
    "StepTimer",
    "TelemetryConfig",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "device_memory",
    "host_memory",
    "mfu",
    "open_writers",
    "peak_flops",
    "read_rows",
]
