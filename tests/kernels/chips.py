"""Machine code for chips that are not there: the real compilers, from the `libtpu` and `jax-cuda13-pjrt` packages."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from maxstack.kernels.dispatch import Chip, compiling_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
TPUS = tuple(TOPOLOGIES)
HOPPER = Chip("gpu", "sm90")
H200 = Path(__file__).with_name("h200.txtpb")
"""What XLA's compiler wants to know of an H200."""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the libtpu package"
)
needs_cuda_compiler = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_pjrt") is None and importlib.util.find_spec("jax_plugins") is None,
    reason="needs the jax-cuda13-pjrt and jax-cuda13-plugin packages",
)


@functools.cache
def device_of(chip: str) -> Any:
    """A device of a topology description: of a TPU generation, or "h200"."""
    if chip == "h200":
        description = topologies.get_topology_desc(
            platform="cuda", target_config=H200.read_text(), topology="1x1x1"
        )
        return description.devices[0]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is claimed
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    return topologies.get_topology_desc(TOPOLOGIES[chip], "tpu").devices[0]


def compiled_for(
    chip: str,
    function: Callable,
    *arguments: jax.ShapeDtypeStruct | Any,
    donate_argnums: int | tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """`function` of (trees of) shapes, compiled to machine code of a chip: "h200" or a TPU generation. Arguments whose
    places are in `donate_argnums` may be written."""
    mesh = jax.sharding.Mesh([device_of(chip)], ("x",))
    where = NamedSharding(mesh, jax.P())

    def placed(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    target, platform = (HOPPER, "cuda") if chip == "h200" else (Chip("tpu", chip), "tpu")
    with compiling_for(target), as_users_compile():
        # A function of its own, so that no trace for another chip is found.
        traced = jax.jit(lambda *args: function(*args), donate_argnums=donate_argnums).trace(
            *jax.tree.map(placed, arguments)
        )
        return traced.lower(lowering_platforms=(platform,)).compile()


@contextlib.contextmanager
def as_users_compile() -> Iterator[None]:
    """All optimizations, and no cache: a program for an absent chip can be written there, but not read again."""
    settings = {"jax_persistent_cache_min_compile_time_secs": 1e9, "jax_disable_most_optimizations": False}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def shapes(*wanted: tuple[Sequence[int], Any]) -> list[jax.ShapeDtypeStruct]:
    """(shape, dtype) pairs as arguments of `compiled_for`."""
    return [jax.ShapeDtypeStruct(tuple(shape), dtype) for shape, dtype in wanted]
