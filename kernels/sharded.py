"""How an array lies on a mesh with explicit axes, read from its type; nothing here moves data."""

import jax
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array

DimAxes = tuple[str, ...]
"""Mesh axes one dimension is cut along, slowest first; () is whole."""


def explicit_mesh(*arrays: Array) -> AbstractMesh | None:
    """The mesh of the first array that lies on one with explicit axes; None when plain jnp is enough.

    None too inside `jax.shard_map`, where arrays are already local.
    """
    for array in arrays:
        mesh = jax.typeof(array).sharding.mesh
        if mesh.empty:
            continue
        if AxisType.Explicit in mesh.axis_types and AxisType.Manual not in mesh.axis_types:
            return mesh
    return None


def automatic_axes(array: Array) -> tuple[str, ...]:
    """Axes of more than one device of the array's mesh that XLA deals out by itself."""
    mesh = jax.typeof(array).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return tuple(name for name, size, kind in kinds if size > 1 and kind == AxisType.Auto)


def varying(array: Array) -> frozenset[str]:
    """Mesh axes an array differs along inside `jax.shard_map`, as far as its type tells; else none."""
    return jax.typeof(array).manual_axis_type.varying


def varying_over[T](axes: frozenset[str], arrays: T) -> T:
    """Arrays (a tree of them) that vary over these mesh axes too. The transpose of this sums over the devices."""

    def cast(array: Array) -> Array:
        missing = tuple(sorted(axes - varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, arrays)


def dim_axes(array: Array) -> tuple[DimAxes, ...]:
    """Mesh axes of each dimension of `array`."""
    spec = jax.typeof(array).sharding.spec
    entries = tuple(spec) + (None,) * (array.ndim - len(spec))
    return tuple(() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries)


def spec(*dims: DimAxes) -> jax.P:
    """PartitionSpec with these axes a dimension, written as `jax.typeof` writes them."""
    return jax.P(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in dims))
