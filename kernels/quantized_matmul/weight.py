"""Weights in few bits: what they hold, how they are rounded, and how int4 lies in memory.

Each weight is `scale * (value - zero)`, with one scale for each output ("int8") or for each group of inputs of an
output ("int4-g32", "int4-g128"). Values are rounded to nearest, so that a weight is at most half a step, half its
scale, away from what it was.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

Kind = Literal["int8", "int4-g32", "int4-g128"]
KINDS: tuple[str, ...] = get_args(Kind)
Storage = Literal["bytes", "int4"]


class Form(NamedTuple):
    """What a kind stands for."""

    most: int
    """Largest value; the smallest is its negative (and one less with zero points)."""
    group: int | None
    """Inputs that share a scale; None: all of an output."""
    scale: jnp.dtype
    """Type of the scales. A rounded scale moves the grid; the error stays half a step of it."""


FORMS = {
    "int8": Form(127, None, jnp.dtype(jnp.float32)),
    "int4-g32": Form(7, 32, jnp.dtype(jnp.bfloat16)),
    "int4-g128": Form(7, 128, jnp.dtype(jnp.bfloat16)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A matrix [N outputs, K inputs]. Arrays may have further axes in front, alike in all of them."""

    # Any: jax puts other things where arrays are.
    values: Any
    """int8 [N, K]; or int4 [N, K], two a byte on an accelerator; or uint8 [N, ⌈K/2⌉] with two int4 in a byte, the even
    input in the low half."""
    scale: Any
    """[⌈K/group⌉, N]: the last group may be a shorter one."""
    zero: Any
    """Whole numbers, shaped and typed as `scale`; None: 0 everywhere."""
    inputs: int = dataclasses.field(metadata={"static": True})
    """K."""
    group: int = dataclasses.field(metadata={"static": True})
    """Inputs that share a scale."""
    layer: Any = None
    """Where `values` are a stack of many layers', [layers, N, K]: the one that is meant. A kernel finds it there; cut
    out of its stack by XLA it would be a copy. Scales are those of the layer: XLA would fetch all of their stack."""

    @property
    def outputs(self) -> int:
        """N."""
        return self.values.shape[-2]

    @property
    def bits(self) -> int:
        """Of a value."""
        return 8 if self.values.dtype == jnp.int8 else 4

    def one(self) -> "QuantizedWeight":
        """The weight of the layer that is meant, cut out of its stack."""
        if self.layer is None:
            return self
        values = jax.lax.dynamic_index_in_dim(self.values, self.layer, keepdims=False)
        return dataclasses.replace(self, values=values, layer=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it stands for: (..., N, K)."""
        return (*self.values.shape[:-1], self.inputs)


def quantize(
    w_nk: Float[Array, "n k"], kind: Kind, *, zero_points: bool = False, storage: Storage = "bytes"
) -> QuantizedWeight:
    """`w_nk`, one row an output, rounded to nearest.

    `zero_points` (int4 only) lets a group's values lie unevenly around 0: 15 steps from its least to its greatest
    weight. `storage` is "bytes", what the CPU reads and files hold, or "int4", what the kernels for GPU and TPU take.
    A weight that is not finite makes its group's scale not finite. Raises ValueError for an unknown kind, another
    number of dimensions, no weights, or zero points with int8.
    """
    if kind not in FORMS:
        raise ValueError(f"quantize: unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if w_nk.ndim != 2 or 0 in w_nk.shape:
        raise ValueError(f"quantize: w must be [outputs, inputs] and hold something, not {w_nk.shape}")
    if zero_points and kind == "int8":
        raise ValueError("quantize: int8 has no zero points; leave them out, or take an int4 kind")
    (n, k), form = w_nk.shape, FORMS[kind]
    group = form.group or k
    groups = -(-k // group)
    w_ngk = jnp.pad(w_nk.astype(jnp.float32), ((0, 0), (0, groups * group - k))).reshape(n, groups, group)
    if zero_points:
        scale, zero = uneven_steps(w_ngk, form)
    else:
        scale, zero = (jnp.max(jnp.abs(w_ngk), -1) / form.most).astype(form.scale), None
    step = scale.astype(jnp.float32)[..., None]
    q = jnp.round(w_ngk / jnp.where(step == 0, 1.0, step))
    q = q if zero is None else q + zero.astype(jnp.float32)[..., None]
    q = jnp.clip(q, -form.most - (zero is not None), form.most).astype(jnp.int8)
    q = q.reshape(n, -1)[:, :k]
    values = q if kind == "int8" else in_bytes(q) if storage == "bytes" else q.astype(jnp.int4)
    return QuantizedWeight(
        values=values, scale=scale.T, zero=None if zero is None else zero.T, inputs=k, group=group
    )


def uneven_steps(w_ngk: Array, form: Form) -> tuple[Array, Array]:
    """Scale and zero point of each group: 0 is among the values, and they span least to greatest."""
    least, greatest = jnp.minimum(w_ngk.min(-1), 0.0), jnp.maximum(w_ngk.max(-1), 0.0)
    # A rounded scale may be too small by half a unit in its last place; a whole unit more makes the span long enough.
    wide = (greatest - least) / (2 * form.most + 1) * (1 + float(jnp.finfo(form.scale).eps))
    scale = wide.astype(form.scale)
    step = scale.astype(jnp.float32)
    zero = jnp.round(-form.most - 1 - least / jnp.where(step == 0, 1.0, step))
    return scale, zero.astype(form.scale)


def dequantize(w: QuantizedWeight, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, "n k"]:
    """The matrix [N, K] that a weight stands for, in a type."""
    values_nk = whole_values(w).astype(jnp.float32)
    if w.zero is not None:
        values_nk = values_nk - each_input(w, w.zero)
    return (values_nk * each_input(w, w.scale)).astype(dtype)


def each_input(w: QuantizedWeight, of_groups_gn: Array) -> Float[Array, "n k"]:
    """A number for each group, for each of its inputs."""
    return jnp.repeat(of_groups_gn.astype(jnp.float32).T, w.group, axis=1)[:, : w.inputs]


def whole_values(w: QuantizedWeight) -> Shaped[Array, "n k"]:
    """Values one by one: int8, or int4 where they are kept so."""
    if w.values.dtype != jnp.uint8:
        return w.values
    low, high = halves(w.values)
    return jnp.stack([low, high], -1).reshape(w.outputs, -1)[:, : w.inputs]


def halves(bytes_nj: Array) -> tuple[Array, Array]:
    """The values of the even and of the odd inputs, as int8."""
    signed = jax.lax.bitcast_convert_type(bytes_nj, jnp.int8)
    four = jnp.int8(4)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(signed, four), four)
    return low, jax.lax.shift_right_arithmetic(signed, four)


def in_bytes(values_nk: Array) -> Array:
    """Values of four bits, two in a byte, the even input in the low half."""
    pairs = jnp.pad(values_nk.astype(jnp.int8), ((0, 0), (0, values_nk.shape[1] % 2)))
    pairs = jax.lax.bitcast_convert_type(pairs, jnp.uint8).reshape(values_nk.shape[0], -1, 2)
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def stored(w: QuantizedWeight, storage: Storage) -> QuantizedWeight:
    """The same weight with its int4 values in bytes or as int4; int8 is what it is."""
    if w.bits == 8 or (w.values.dtype == jnp.uint8) == (storage == "bytes"):
        return w
    values = whole_values(w)
    return dataclasses.replace(w, values=in_bytes(values) if storage == "bytes" else values.astype(jnp.int4))
