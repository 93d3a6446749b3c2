"""Peak speeds, utilisation, memory, step times, the profiler's window, other writers, settings."""

import importlib
import math
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxstack import telemetry
from maxstack.config import UserError
from maxstack.telemetry import (
    Profiler,
    StepTimer,
    TelemetryConfig,
    device_memory,
    host_memory,
    mfu,
    peak_flops,
)
from maxstack.telemetry.profiler import parse_window
from maxstack.telemetry.writers import open_writers, scalars


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        # The kinds that libtpu's topologies and CUDA's driver report.
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA L4", 121), ("NVIDIA L40S", 362.05),
        ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
    ],
)  # fmt: skip
def test_peaks_are_those_published(kind, tera):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v99", "NVIDIA GeForce RTX 4090", "NVIDIA A1000", "AMD Instinct MI300X", ""]
)
def test_unknown_devices_have_no_peak_and_no_utilisation(kind):
    assert peak_flops(kind) is None
    assert mfu(1e9, 1e5, 1, peak_flops(kind)) is None


def test_peaks_depend_on_the_type_of_the_products():
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    assert peak_flops("TPU v5 lite", "int8") == 393e12
    assert peak_flops("TPU7x", "float8_e4m3fn") == 2307e12
    assert peak_flops("TPU v4", "float32") is None
    with pytest.raises(ValueError, match="dtype must be one of"):
        peak_flops("TPU v4", "complex64")


def test_utilisation_gives_a_published_figure():
    # MaxText on v6e-8, Llama-3.1-8B at 8k: 7,139 tokens/s/chip are 45 % full (57.9 GFLOP a token), 40 % causal (51.5).
    peak = peak_flops("TPU v6 lite")
    assert mfu(57.9e9, 8 * 7139, 8, peak) == pytest.approx(0.45, abs=0.005)
    assert mfu(51.5e9, 8 * 7139, 8, peak) == pytest.approx(0.40, abs=0.005)
    with pytest.raises(ValueError, match="devices must be at least 1, got 0"):
        mfu(1.0, 1.0, 0, peak)


def test_host_memory_sees_an_allocation():
    before = host_memory()
    # Pages of its own: an array could be given memory that the process has freed and still holds.
    with mmap.mmap(-1, 64 * 2**20) as held:
        held.write(b"1" * len(held))
        after = host_memory()
    assert after.current_bytes - before.current_bytes > 60 * 2**20
    assert after.peak_bytes >= after.current_bytes >= 64 * 2**20


def test_device_memory_is_that_of_the_process_on_a_cpu():
    assert device_memory().current_bytes > 10 * 2**20
    assert device_memory().peak_bytes >= device_memory().current_bytes // 2


def test_step_times_are_between_ticks_and_pauses_left_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    timer = StepTimer()
    assert timer.seconds_left(10) is None
    now[0] = 2.0
    assert timer.tick(100.0) == (2.0, 50.0)
    now[0] = 50.0
    timer.restart()
    now[0] = 54.0
    assert timer.tick(100.0) == (4.0, 25.0)
    now[0] = 56.0
    timer.tick(100.0)
    assert timer.seconds_left(10) == 20.0


@pytest.mark.parametrize("window", ["5", "0:3", "4:2", "a:b", "1:2:3", ":", "-1:2", "1.5:2"])
def test_a_bad_profile_window_is_refused(window):
    with pytest.raises(UserError, match=r"telemetry\.profile must be A:B"):
        TelemetryConfig(profile=window)


def test_a_profile_window_includes_both_ends():
    assert parse_window("3:5") == (3, 5)
    assert parse_window("") is None


def test_the_profiler_traces_its_window_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    with Profiler("3:4", tmp_path) as profiler:
        for step in range(1, 8):
            profiler.before(step)
            calls.append(step)
            profiler.after(step, lambda: calls.append("wait"))
    assert calls == [1, 2, ("start", str(tmp_path)), 3, 4, "wait", ("stop",), 5, 6, 7]


def test_a_profile_that_an_error_cuts_short_is_still_written(tmp_path):
    def fail() -> None:
        with Profiler("1:100", tmp_path) as profiler:
            profiler.before(1)
            jnp.ones(3).sum().block_until_ready()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_scalars_are_the_finite_numbers_with_their_place():
    row = {
        "step": 3, "kind": "evaluation", "loss": 1, "bad": math.nan, "none": None, "text": "x", "flag": True,
        "held_out": {"books": {"nll": 2.0}},
    }  # fmt: skip
    assert dict(scalars(row)) == {"evaluation/loss": 1.0, "evaluation/held_out/books/nll": 2.0}


def tensorboard_values(folder: Path, event_type: Any) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every number in the one file of a folder, in the order they were written."""
    (file,) = folder.iterdir()
    found, data = [], file.read_bytes()
    while data:  # records of: length u64, its checksum u32, an event, its checksum u32
        size = int.from_bytes(data[:8], "little")
        event = event_type.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_tensorboard_files_hold_the_numbers(tmp_path):
    event_type: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event

    for writer in open_writers(TelemetryConfig(), tmp_path):
        writer.write({"step": 7, "kind": "train", "loss": 2.5})
        writer.close()
    found = tensorboard_values(tmp_path / "tensorboard", event_type)
    assert found == [("train/loss", 7, 2.5)]


def test_tensorboard_gets_the_last_of_rows_that_come_too_fast_to_draw(tmp_path):
    event_type: Any = importlib.import_module("tensorboardX.proto.event_pb2").Event
    (writer,) = open_writers(TelemetryConfig(), tmp_path)
    for step in range(1, 6):
        writer.write({"step": step, "kind": "train", "loss": float(step)})
    writer.write({"step": 5, "kind": "evaluation", "nll": 1.5})
    writer.close()
    found = tensorboard_values(tmp_path / "tensorboard", event_type)
    assert found[0] == ("train/loss", 1, 1.0)
    assert ("evaluation/nll", 5, 1.5) in found
    assert found[-1] == ("train/loss", 5, 5.0)


def test_wandb_without_its_package_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'maxstack\[wandb\]'"):
        open_writers(TelemetryConfig(wandb=True), tmp_path)


def test_wandb_gets_the_numbers_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    class Run:
        id = "abc"

        def log(self, numbers, step):
            logged.append((numbers, step))

        def finish(self):
            logged.append("finished")

    class Wandb:
        Error = OSError

        @staticmethod
        def init(**settings):
            started.append(settings["id"])
            return Run()

    logged, started = [], []
    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for step in (1, 2):
        (writer,) = open_writers(TelemetryConfig(wandb=True, tensorboard=False), tmp_path)
        writer.write({"step": step, "loss": 0.5})
        writer.close()
    assert started == [None, "abc"]
    assert logged == [({"train/loss": 0.5}, 1), "finished", ({"train/loss": 0.5}, 2), "finished"]


def test_wandb_that_does_not_start_is_a_message(tmp_path, monkeypatch):
    class Wandb:
        class Error(Exception):
            pass

        @staticmethod
        def init(**_):
            raise Wandb.Error("no API key")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    with pytest.raises(UserError, match=r"no API key.*WANDB_MODE=offline"):
        open_writers(TelemetryConfig(wandb=True), tmp_path)


def test_importing_telemetry_imports_no_jax():
    program = "import sys, maxstack.telemetry; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False).returncode
        == 0
    )


def test_every_public_name_is_there():
    assert all(hasattr(telemetry, name) for name in telemetry.__all__)
