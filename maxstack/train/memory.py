"""Whether the state of a run can fit at all, asked before anything is allocated."""

import math
from pathlib import Path
from typing import Any

import jax
import psutil

from maxstack.config import UserError
from maxstack.models import TransformerConfig
from maxstack.train.state import Layout

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_state_fits(plan: Layout, config: TransformerConfig) -> None:
    """Raise UserError, with the sizes, when state and gradients alone exceed the memory of the devices.

    A bound from below: activations come on top. Devices that share the host's memory (CPU) are counted together.
    """
    need = device_bytes([plan.abstract(config), gradients_of(plan)])
    device = plan.devices.local_devices[0]
    room = (device.memory_stats() or {}).get("bytes_limit")
    where = "a device has"
    if room is None:
        need *= len(plan.devices.local_devices)
        room, where = host_memory_bytes(), "this machine has"
    if need > room:
        raise UserError(
            "out of memory before the first step: weights, optimizer state and gradients take "
            f"{need / 2**30:,.1f} GiB, {where} {room / 2**30:,.1f} GiB; make the model smaller (--model.width, "
            "--model.vocab-size), or shard it over more devices (--mesh.fsdp)"
        )


def gradients_of(plan: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The gradients of a step as shapes with shardings."""
    cut = plan.weights("gradients")
    return {
        name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=cut[name])
        for name, shape in plan.shapes.items()
    }


def device_bytes(arrays: Any) -> int:
    """Bytes of the shards that one device holds of a tree of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(arrays)
    )


def host_memory_bytes() -> int:
    """Memory of the machine, or of the container this process runs in."""
    total = psutil.virtual_memory().total
    try:
        return min(total, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return total
