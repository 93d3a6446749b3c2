"""Where every array lives: mesh axes, the one table from logical to mesh axes, and how weights are gathered.

Weights are born with *logical* axes (`("embed", "heads", "head_dim")`); only this file knows which mesh
axis each of them is cut along. Meshes have explicit axes: an array's sharding is part of its type, so a
layout that cannot work is refused while tracing. Without a mesh every function here is the identity.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from maxstack.config import UserError

MESH_AXES = ("data", "fsdp", "tensor", "expert", "context", "stage")
BATCH_AXES = ("data", "fsdp")

Kind = Literal["parameters", "gradients", "optimizer", "compute"]
MeshAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axes for weights kept whole over `fsdp`; SHARDED_OVER_FSDP adds the `fsdp` cut.
WEIGHT_RULES: Mapping[str, MeshAxes] = {
    "layers": None,
    "vocab": "tensor",
    "position": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": None,
    "q_lora": None,
    "kv_lora": None,
    "norm": None,
    "whole": None,  # a dimension of a user's own layer that no mesh axis cuts
}
SHARDED_OVER_FSDP = "embed"

ACTIVATION_RULES: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "sequence": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": None,
    "q_lora": None,
    "kv_lora": None,
    "whole": None,
}

# From which ZeRO stage on an array kind is cut over `fsdp` (Rajbhandari et al. 2020, arXiv:1910.02054).
ZERO_STAGE = {"parameters": 3, "gradients": 2, "optimizer": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each mesh axis spans. At most one size may be -1: it takes the devices left over."""

    data: int = 1
    """Replicas of the model, each with its own part of the batch (devices); across slices or slow links."""
    fsdp: int = -1
    """Devices that share one replica's weights and optimizer state, each with its own part of the batch."""
    tensor: int = 1
    """Devices that share each matrix product (heads, feed-forward columns, vocabulary)."""
    expert: int = 1
    """Devices that share the experts of a mixture of experts. Only 1 for now."""
    context: int = 1
    """Devices that share each sequence. Only 1 for now."""
    stage: int = 1
    """Devices that share the layers as a pipeline. Only 1 for now."""
    zero: Literal[0, 1, 2, 3] = 3
    """What is cut over `fsdp`: 1 optimizer state, 2 and gradients, 3 and parameters, 0 nothing (stage)."""

    def sizes(self, device_count: int) -> tuple[int, ...]:
        """Size of each of MESH_AXES on `device_count` devices. Raises UserError when they do not multiply out."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        described = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh {described}: sizes are positive, and at most one of them -1 (what is left)"
            )
        for axis in ("expert", "context", "stage"):
            if getattr(self, axis) not in (1, -1):
                raise UserError(
                    f"mesh.{axis} is {getattr(self, axis)}: sharding over {axis} is not built yet, use 1"
                )
        known = math.prod(size for size in sizes if size != -1)
        if (-1 not in sizes and known != device_count) or device_count % known:
            raise UserError(
                f"mesh {described} takes {known} devices"
                f"{' or a multiple' if -1 in sizes else ''}, but there are {device_count}: "
                "change the --mesh.* sizes so that their product is the device count"
            )
        return tuple(device_count // known if size == -1 else size for size in sizes)


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with explicit axes MESH_AXES over `devices` (default: all). Raises UserError when sizes do not fit."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    kinds = (jax.sharding.AxisType.Explicit,) * len(MESH_AXES)
    if devices[0].platform == "cpu":  # no topology to optimise for; keeps the order of processes
        return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=kinds)
    return jax.make_mesh(sizes, MESH_AXES, kinds, devices=devices)


def weight_spec(axes: tuple[str, ...], kind: Kind, zero: int) -> PartitionSpec:
    """Mesh axes of a weight-shaped array with logical `axes`, as a parameter, gradient, state or operand."""
    cut = kind != "compute" and zero >= ZERO_STAGE[kind]
    rules = {**WEIGHT_RULES, SHARDED_OVER_FSDP: "fsdp"} if cut else WEIGHT_RULES
    return PartitionSpec(*(_rule(rules, axis) for axis in axes))


def _rule(rules: Mapping[str, MeshAxes], axis: str) -> MeshAxes:
    if axis not in rules:
        raise UserError(
            f"no logical axis {axis!r}: the known ones are {', '.join(rules)}; 'whole' is for a dimension that is "
            "never cut, and a new name needs a row in maxstack/sharding.py"
        )
    return rules[axis]


def present(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> PartitionSpec:
    """`spec` without the mesh axes of size 1, so that on one device no type mentions a mesh axis."""

    return PartitionSpec(*(_entry(name for name in _names(axes) if mesh.shape[name] > 1) for axes in spec))


def parts(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
    """Into how many parts a dimension is cut along mesh axes."""
    return math.prod(mesh.shape[axis] for axis in _names(axes))


def _names(axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one dimension, slowest first."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _entry(names: Iterable[str]) -> MeshAxes:
    """The mesh axes of one dimension, written as types write them."""
    names = tuple(names)
    return names if len(names) > 1 else next(iter(names), None)


def weight_shardings(
    mesh: Mesh | AbstractMesh, axes: Mapping[str, tuple[str, ...]], kind: Kind, zero: int
) -> dict[str, NamedSharding]:
    """A sharding for each named weight, for one of the kinds of array that have a weight's shape."""
    return {
        name: NamedSharding(mesh, present(mesh, weight_spec(ax, kind, zero))) for name, ax in axes.items()
    }


def place_of(mesh: Mesh | None, axes: tuple[str, ...]) -> NamedSharding | None:
    """Where an operand with logical `axes` lies; None without a mesh."""
    return None if mesh is None else NamedSharding(mesh, present(mesh, weight_spec(axes, "compute", 0)))


def check_divides(shapes: Mapping[str, tuple[int, ...]], shardings: Mapping[str, NamedSharding]) -> None:
    """Raise UserError naming the first array whose dimension does not divide by its mesh axes, with the numbers."""
    for name, sharding in shardings.items():
        for size, mesh_axes in zip(shapes[name], sharding.spec, strict=False):
            names = _names(mesh_axes)
            parts = math.prod(sharding.mesh.shape[axis] for axis in names)
            if size % parts:
                raise UserError(
                    f"{name} {shapes[name]}: {size} does not divide by mesh {'x'.join(names)} = {parts}; "
                    f"change the model size or --mesh.{' or --mesh.'.join(names)}"
                )


def current_mesh() -> AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree are cut over; None on one device."""
    for leaf in jax.tree.leaves(tree):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and where.mesh.size > 1:
            return where.mesh
    return None


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """What is traced inside is for the mesh; None changes nothing."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def activation_spec(*axes: str | None) -> PartitionSpec | None:
    """Spec of an activation with logical `axes`, or None without a mesh: fits any `out_sharding` argument."""
    mesh = current_mesh()
    if mesh is None:
        return None
    return present(mesh, PartitionSpec(*(_rule(ACTIVATION_RULES, axis) if axis else None for axis in axes)))


def on_one_device() -> bool:
    """Whether the program being traced runs on a single device."""
    mesh = current_mesh()
    return mesh is None or mesh.size == 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` moved to the sharding of an activation with logical `axes`."""
    spec = activation_spec(*axes)
    return x if spec is None else jax.reshard(x, spec)


def gather(weight: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
    """A weight as an operand: cast first, so that half the bytes travel, then gathered over `fsdp`."""
    weight, mesh = weight.astype(dtype), current_mesh()
    if mesh is None:
        return weight
    return jax.reshard(weight, present(mesh, weight_spec(axes, "compute", 0)))


def whole(array: jax.Array) -> jax.Array:
    """`array`, all of it on every device of the mesh it lies on."""
    return array if on_one_device() else jax.reshard(array, PartitionSpec(*(None,) * array.ndim))


def as_cut(array: jax.Array, like: jax.Array) -> jax.Array:
    """`array`, cut over the mesh as another of its rank is."""
    return array if on_one_device() else jax.reshard(array, jax.typeof(like).sharding.spec)


def gather_local(cut: jax.Array, spec: PartitionSpec, tokens: PartitionSpec, dtype: jnp.dtype) -> jax.Array:
    """Inside `jax.shard_map`: the local part `cut` of a weight of `spec`, gathered over the axes that cut the tokens.

    It travels in `dtype`; its gradient is summed over the devices in float32, each getting its own part.
    """
    over = [axis for axes in tokens[:2] for axis in _names(axes)]
    dims = [(i, axis) for i, axes in enumerate(spec) for axis in _names(axes) if axis in over]
    copied = tuple(axis for axis in over if axis not in [gathered for _, gathered in dims])
    # The transpose of this sums over the axes that copy the weight.
    cut = jax.lax.pcast(cut, copied, to="varying")

    @jax.custom_vjp
    def gathered(w: jax.Array) -> jax.Array:
        w = w.astype(dtype)
        for dim, axis in dims:
            w = jax.lax.all_gather(w, axis, axis=dim, tiled=True)
        return w

    def summed(_: None, g: jax.Array) -> tuple[jax.Array]:
        g = g.astype(cut.dtype)
        for dim, axis in reversed(dims):
            g = jax.lax.psum_scatter(g, axis, scatter_dimension=dim, tiled=True)
        return (g,)

    gathered.defvjp(lambda w: (gathered(w), None), summed)
    return gathered(cut)


def gather_frozen(cut: jax.Array, spec: PartitionSpec, tokens: PartitionSpec) -> jax.Array:
    """As `gather_local` for an array that is not trained: it travels as it is."""
    for dim, axes in enumerate(spec):
        for axis in _names(axes):
            if any(axis in _names(of) for of in tokens[:2]):
                cut = jax.lax.all_gather(cut, axis, axis=dim, tiled=True)
    return cut


def rows(table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`table[ids]` in `dtype` as an activation [b, t, d], of a table [v, d] cut as any weight is.

    Rows travel, not the table: each device looks up its columns of its rows for the tokens of all devices that share
    the columns, and each of them gets its own. The gradient of the table is added where the table lies.
    """
    if on_one_device():
        return table[ids].astype(dtype)
    vocabulary, columns = jax.typeof(table).sharding.spec
    out = activation_spec("batch", "sequence", "embed")
    assert out is not None
    kept = _entry(axis for axis in _names(out[0]) if axis not in _names(columns))

    def found(table: jax.Array, ids: jax.Array) -> jax.Array:
        if vocabulary is None:
            return table[ids].astype(dtype)
        local = ids - jax.lax.axis_index(vocabulary) * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        x = jnp.where(here[..., None], table[jnp.where(here, local, 0)].astype(dtype), 0)
        return jax.lax.psum(x, vocabulary)  # one summand is not zero, so this is exact in any type

    specs = (PartitionSpec(vocabulary, columns), PartitionSpec(kept, None))
    look_up = jax.shard_map(found, in_specs=specs, out_specs=PartitionSpec(kept, None, columns))
    return jax.reshard(look_up(table, jax.reshard(ids, specs[1])), out)


def unreduced(operand: jax.Array, x: jax.Array) -> PartitionSpec:
    """Spec of a gradient of `operand` of which each device has the part of its own tokens of `x` [b, t, ...] yet."""
    over = {axis for axes in jax.typeof(x).sharding.spec[:2] for axis in _names(axes)}
    return PartitionSpec(*jax.typeof(operand).sharding.spec, unreduced=over)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Sharding of host batches [*leading, b, t]."""
    return NamedSharding(mesh, present(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES, None)))


def global_arrays[T](sharding: NamedSharding, local: T, global_shape: tuple[int, ...]) -> T:
    """Global arrays, all of one shape, from the rows this process holds of each (`local_rows` says which)."""
    if jax.process_count() == 1:  # all rows are here, and go to the devices in one call
        return jax.device_put(local, sharding)
    return jax.tree.map(
        lambda part: jax.make_array_from_process_local_data(sharding, part, global_shape), local
    )


def local_rows(mesh: Mesh, batch_rows: int) -> slice:
    """Rows of a global batch that this process feeds. Raises UserError when rows do not divide over devices."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_rows % parts:
        raise UserError(
            f"batch of {batch_rows} rows does not divide over data x fsdp = {parts} devices; "
            f"make the micro-batch a multiple of {parts}"
        )
    index = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((batch_rows,))
    bounds = [part[0].indices(batch_rows)[:2] for part in index.values() if part is not None]
    start, stop = min(low for low, _ in bounds), max(high for _, high in bounds)
    if len({low for low, _ in bounds}) * (batch_rows // parts) != stop - start:
        raise UserError(
            "this process's devices hold rows that are not contiguous: order mesh devices by process"
        )
    return slice(start, stop)
