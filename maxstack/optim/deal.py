"""Dealing the matrices of a leaf out over a mesh: each device gets whole matrices instead of a piece of every one."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from maxstack.optim.layout import MatrixDims

Entries = tuple[tuple[str, ...], ...]
"""Mesh axes of each dim of a leaf."""


class Deal(NamedTuple):
    """A way from pieces of every matrix to whole matrices on each device."""

    stages: tuple[Entries, ...]
    """One mesh axis moves at a time: that is one all-to-all, or one slice of what was replicated; several at once make
    the compiler replicate the whole leaf."""
    dim: int = 0
    """The batch dim that is dealt out."""
    padding: int = 0
    """Zero matrices added to it in the first stage, so that all devices get the same number."""


def per_matrix(function: Callable[[jax.Array], jax.Array], x: jax.Array, dims: MatrixDims) -> jax.Array:
    """`function` of a leaf, which works on each matrix apart, with the matrices dealt out; sharded as `x`.

    Where the mesh does not show in the types (no mesh, axes left to the compiler, inside shard_map) it is just called.
    """
    home = jax.typeof(x).sharding
    if home.mesh.empty or not home.mesh.are_all_axes_explicit:
        return function(x)
    deal = plan(x.shape, dims, _entries(home.spec, x.ndim), home.mesh)
    specs = [PartitionSpec(*(axes or None for axes in stage)) for stage in deal.stages]
    count = x.shape[deal.dim]
    x = jax.reshard(x, specs[0])
    if deal.padding:
        x = jnp.pad(x, [(0, deal.padding if i == deal.dim else 0) for i in range(x.ndim)])
    for spec in specs[1:]:
        x = jax.reshard(x, spec)
    x = jax.shard_map(function, mesh=home.mesh, in_specs=specs[-1], out_specs=specs[-1])(x)
    for spec in reversed(specs[:-1]):
        x = jax.reshard(x, spec)
    if deal.padding:
        x = jax.lax.slice_in_dim(x, 0, count, axis=deal.dim)
    return jax.reshard(x, home)


def plan(shape: tuple[int, ...], dims: MatrixDims, home: Entries, mesh: AbstractMesh) -> Deal:
    """How to deal out a leaf of this shape that is sharded as `home`.

    Axes that already shard a batch dim stay. Each other axis is given to the batch dim with most matrices a device, as
    long as it has any to split; then its devices compute the same. A leaf without batch dims is gathered whole.
    """
    now = list(home)
    moving = [(i, axis) for i in (*dims.inputs, *dims.outputs) for axis in reversed(home[i])]
    dim = max(dims.batch, key=lambda i: shape[i] // _ways(home[i], mesh), default=0)
    used = {axis for entry in home for axis in entry}
    idle = [(None, axis) for axis in mesh.axis_names if axis not in used and mesh.shape[axis] > 1]
    stages = [tuple(now)]
    for source, axis in moving + (idle if dims.batch else []):
        splits = bool(dims.batch) and _ways(now[dim], mesh) < shape[dim]
        if source is None and not splits:
            continue
        if source is not None:
            now[source] = now[source][:-1]
        if splits:
            now[dim] = (*now[dim], axis)
        stages.append(tuple(now))
    padding = -shape[dim] % _ways(now[dim], mesh) if dims.batch else 0
    if padding and home[dim]:
        free = tuple(() if i == dim else entry for i, entry in enumerate(home))
        return plan(shape, dims, free, mesh)
    return Deal(tuple(stages), dim, padding)


def _ways(axes: tuple[str, ...], mesh: AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _entries(spec: PartitionSpec, ndim: int) -> Entries:
    padded = (*spec, *[None] * (ndim - len(spec)))
    return tuple(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in padded
    )
