"""Low-rank deltas beside linear maps (LoRA, Hu et al. 2021, arXiv:2106.09685): `y = x w + b + scale · x A B`.

Of several adapters that are there at once each row of a batch has its own, by number, or none. The factors lie stacked
beside the weights, not in them: they are arguments of compiled programs, padded to one rank, so that an adapter comes
and goes without a compilation. The scale is in B. Where there are fewer rows than adapters, each row's factors are
looked up; otherwise x meets the factors of all and what belongs to others is left out, one product that reads every
factor once.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from maxstack import sharding
from maxstack.config import UserError
from maxstack.models.generation.weights import RowsLinear, with_parts
from maxstack.models.layers import Buffer, Linear, Weight
from maxstack.models.packed import PackedLinear

ADAPTABLE = (Linear, RowsLinear, PackedLinear)
HIGHEST_RANK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSlots:
    """Room for adapters: what programs are compiled for."""

    count: int = 8
    """Adapters at once."""
    rank: int = 16
    """The highest that an adapter may have; lower ones are padded to it."""
    targets: tuple[str, ...] | None = None
    """Linear maps that adapters may change ("attention.q", "feed_forward.up"); None is all of the layers'. Every one of
    them costs time, also for requests without an adapter."""

    def __post_init__(self):
        if self.count < 1:
            raise UserError(f"adapters: count is {self.count}: it must be at least 1")
        if not 1 <= self.rank <= HIGHEST_RANK:
            raise UserError(f"adapters: rank is {self.rank}: it must be 1 to {HIGHEST_RANK}")


class Factors(NamedTuple):
    """Those of one linear map, of all adapters; stacked over repeats where its weight is."""

    a: Float[Array | np.ndarray, "..."]
    """[adapters, inputs…, rank]."""
    b: Float[Array | np.ndarray, "..."]
    """[adapters, rank, outputs…], times the scale."""


class Adapted(nnx.Module):
    """A linear map with the deltas of adapters beside it."""

    def __init__(self, base: Any, factors: Factors, rows_b: Int[Array, "*l b"] | None = None):
        """`rows_b` is each row's adapter, from 1; 0 is none. Without it every row has the first."""
        inputs, outputs = axes_of(base)
        self.base = base
        self.a = Weight(factors.a, axes=("whole", *inputs, "whole"))
        self.b = Weight(factors.b, axes=("whole", "whole", *outputs))
        self.rows = None if rows_b is None else Buffer(rows_b, axes=("whole",))
        self.outputs = outputs

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = self.base(x)
        cut = sharding.activation_spec("batch", "sequence", *self.outputs)
        rows_b = None if self.rows is None else self.rows[...]
        delta = low_rank(x, Factors(self.a[...], self.b[...]), rows_b, cut)
        return (y + delta).astype(y.dtype)


def low_rank(
    x: Float[Array, "b t ..."], factors: Factors, rows_b: Int[Array, "b"] | None = None, cut: Any = None
) -> Float[Array, "b t ..."]:
    """`x A B` of each row's adapter in float32, sharded as `cut` says."""
    a, b = (factor.astype(x.dtype) for factor in factors)
    inner = tuple(range(1, a.ndim - 1))
    of_x = tuple(range(2, x.ndim))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if rows_b is not None and x.shape[0] < a.shape[0] and sharding.on_one_device():
        at_b = jnp.maximum(rows_b - 1, 0)
        met = jax.lax.dot_general(x, a[at_b], ((of_x, inner), ((0,), (0,))), preferred_element_type=wide)
        met = jnp.where((rows_b > 0)[:, None, None], met, 0).astype(x.dtype)
        return jax.lax.dot_general(met, b[at_b], (((2,), (1,)), ((0,), (0,))), preferred_element_type=wide)
    within = None if cut is None else sharding.activation_spec("batch", "sequence", None, None)
    met = jax.lax.dot_general(
        x, a, ((of_x, inner), ((), ())), preferred_element_type=wide, out_sharding=within
    )
    if rows_b is not None:  # exact zeros: whoever else is there adds nothing
        own_bn = rows_b[:, None] == jnp.arange(1, a.shape[0] + 1)
        met = jnp.where(own_bn[:, None, :, None], met, 0)
    contracted = (((2, 3), (0, 1)), ((), ()))
    return jax.lax.dot_general(
        met.astype(x.dtype), b, contracted, preferred_element_type=wide, out_sharding=cut
    )


def axes_of(base: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Logical axes of a linear map's inputs and outputs."""
    if isinstance(base, Linear):
        return base.axes[: base.contract], base.axes[base.contract :]
    if isinstance(base, PackedLinear):
        return ("whole",) * len(base.inputs), base.axes
    return ("whole",) * len(base.inputs), ("whole",) * len(base.outputs)


def sizes_of(base: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Inputs and outputs of a linear map, without what stacking puts in front."""
    if isinstance(base, Linear):
        own = base.w[...].shape[-len(base.axes) :]
        return own[: base.contract], own[base.contract :]
    return tuple(base.inputs), tuple(base.outputs)


def adaptable(block: Any, before: str = "") -> Iterable[tuple[str, Any]]:
    """The linear maps of a layer that can have a delta, by dotted name: those whose weights are not used otherwise."""
    whole = getattr(type(block), "used_whole", ())
    for name, part in vars(block).items():
        if isinstance(part, ADAPTABLE):
            if name not in whole:
                yield f"{before}{name}", part
        elif isinstance(part, nnx.Module):
            yield from adaptable(part, f"{before}{name}.")


def attached(
    block: Any, factors: Mapping[str, Factors], rows_b: Array | None = None, before: str = ""
) -> Any:
    """A copy of a layer with deltas beside the maps that have factors."""
    copy = with_parts(block, lambda part: part)
    for name, part in list(vars(copy).items()):
        path = f"{before}{name}"
        if path in factors:
            setattr(copy, name, Adapted(part, factors[path], rows_b))
        elif isinstance(part, nnx.Module) and any(key.startswith(f"{path}.") for key in factors):
            setattr(copy, name, attached(part, factors, rows_b, f"{path}."))
    return copy


def empty_factors(
    block: Any, slots: AdapterSlots, dtype: jnp.dtype, front: tuple[int, ...] = (), mesh: Mesh | None = None
) -> dict[str, Factors]:
    """Room for adapters beside the maps of a layer; `front` is what stacking puts in front. On a mesh factors are cut
    as the weights that they are beside."""

    def zeros(shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        axes = ("layers",) * len(front) + axes
        return jnp.zeros((*front, *shape), dtype, device=sharding.place_of(mesh, axes))

    found = dict(adaptable(block))
    if slots.targets is not None:
        found = {name: part for name, part in found.items() if name in slots.targets}
    room: dict[str, Factors] = {}
    for name, part in found.items():
        (inputs, outputs), (of_inputs, of_outputs) = sizes_of(part), axes_of(part)
        room[name] = Factors(
            zeros((slots.count, *inputs, slots.rank), ("whole", *of_inputs, "whole")),
            zeros((slots.count, slots.rank, *outputs), ("whole", "whole", *of_outputs)),
        )
    return room


def put(factors: Any, slot: Int[Array, ""], new: Any, axis: int) -> Any:
    """Room with an adapter in one place of it."""

    def one(room: Array, own: Array) -> Array:
        own = jnp.expand_dims(own.astype(room.dtype), axis)
        return jax.lax.dynamic_update_slice_in_dim(room, sharding.as_cut(own, room), slot, axis)

    return jax.tree.map(one, factors, new)


class LowRank(NamedTuple):
    """One adapter of one linear map in float32: [inputs…, rank] and [rank, outputs…], the scale in the second."""

    a: np.ndarray
    b: np.ndarray


Adapter = Mapping[tuple[int, int, int, str], LowRank]
"""By stack, place in its pattern, repeat, and name of the map in its layer."""


def padded(adapter: Adapter, where: tuple[int, int, int, str], like: Factors, lead: int) -> Factors:
    """An adapter's factors of one map as wide as the room for them; zeros where it has none. `lead` are the axes of
    the room before those of one adapter."""
    shapes = like.a.shape[lead:], like.b.shape[lead:]
    a, b = (np.zeros(shape, like.a.dtype) for shape in shapes)
    own = adapter.get(where)
    if own is not None:
        rank = own.a.shape[-1]
        a[..., :rank], b[:rank] = own.a, own.b
    return Factors(a, b)


def merged(w: Float[Array, "..."], own: LowRank) -> Float[Array, "..."]:
    """A weight [inputs…, outputs…] with an adapter's delta in it, for those that want one model."""
    inputs = own.a.ndim - 1
    rank = own.a.shape[-1]
    delta = own.a.reshape(-1, rank) @ own.b.reshape(rank, -1)
    if math.prod(w.shape[:inputs]) != delta.shape[0] or w.size != delta.size:
        raise UserError(
            f"a weight of shape {w.shape} is no match for factors {own.a.shape} and {own.b.shape}"
        )
    return (w.astype(jnp.float32) + delta.reshape(w.shape)).astype(w.dtype)
