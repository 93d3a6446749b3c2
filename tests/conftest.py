"""The environment of the whole test run, set before jax is imported: 8 simulated CPU devices, a compilation cache."""

import gc
import hashlib
import os
import platform
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8


def _cache_folder() -> Path:
    """A cache of compiled programs for this kind of processor: code compiled for another one may not run here."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    name = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    return ROOT / ".cache" / "jax" / name


def _prepare_environment() -> None:
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could set the number of devices")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        flags = f"{flags} --xla_force_host_platform_device_count={DEVICES}"
    # XLA:CPU would set up a compiler of its own, MLIR with all its dialects, for each fused loop of a program: most of
    # the time that tests take. Its older way of writing such loops is meant to give the same numbers.
    if "xla_backend_extra_options" not in flags:
        flags = f"{flags} --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = flags.strip()
    # JAX_PLATFORMS=cuda pytest … runs the same tests on a GPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    # Most of the run is compilation of programs that compute for microseconds: LLVM's optimizations are left out, but
    # where a test says otherwise (`optimized`).
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["MAXSTACK_TILES"] = ""  # no table of this user's
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")


_prepare_environment()
# Tracing makes many objects and little garbage: looking for it as often as usual is a quarter of the time of a trace.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
    """Let go of compiled programs before their memory mappings reach what Linux allows a process (65,530): XLA then
    fails to map a new one and the process dies. This run compiles several thousand of them."""
    yield
    if "jax" in sys.modules and mappings() > 30_000:
        sys.modules["jax"].clear_caches()
        gc.collect()


@pytest.fixture
def optimized():
    """For tests of what the compiler makes of a program, or of how large models compute."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def mappings() -> int:
    """Memory mappings of this process; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
