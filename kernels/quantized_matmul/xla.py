"""Products with quantized weights as XLA compiles them.

For few tokens the values go into the product as they are and scales are multiplied with what comes out, so that no
matrix in full precision is written to memory. For many tokens a tile of the matrix in full precision is worth its
memory: it is made once and used by all of them. On a CPU a loop over tiles that stay in a cache serves both.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels.dispatch import chip
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight, dequantize, halves

FEW_TOKENS = 64
"""Up to this many a product for each group is scaled after; beyond, [tokens, groups, outputs] would be the larger."""
TILE_BYTES = 1 << 24
"""Of a tile of the matrix in float32."""
LOOP_BYTES = 1 << 22
"""The same on a CPU: a tile is read again while it is in a cache, and large enough for all cores to share."""
LARGEST_INT8 = 127


def quantized_matmul(x_tk: Float[Array, "t k"], w: QuantizedWeight) -> Float[Array, "t n"]:
    """`x w^T`, summed in float32 and left so."""
    tokens, on_cpu = x_tk.shape[0], chip().platform == "cpu"
    if on_cpu:
        return by_loop(x_tk, w)
    if w.group == w.inputs and w.bits == 8:
        return dot(x_tk, w.values.astype(x_tk.dtype)) * w.scale.astype(jnp.float32)
    return by_groups(x_tk, w) if tokens <= FEW_TOKENS else by_tiles(x_tk, w)


def dot(a_tk: Array, b_nk: Array) -> Array:
    """`a b^T`, summed in float32."""
    return jax.lax.dot_general(a_tk, b_nk, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def operands(x_tk: Array, w: QuantizedWeight) -> tuple[list[tuple[Array, Array]], Array]:
    """Pairs of x [t, g, j] and values [n, g, j] whose products add up, and the sum of x over each group [t, g].

    Two int4 of a byte are not brought in order: x's even and odd inputs are taken apart instead. A shorter last group
    is filled up with zeros.
    """
    groups, group = w.scale.shape[-2], w.group
    x_tk = jnp.pad(x_tk, ((0, 0), (0, groups * group - w.inputs)))
    x_tgk = x_tk.reshape(-1, groups, group)
    sums_tg = x_tgk.astype(jnp.float32).sum(-1)
    if w.values.dtype != jnp.uint8:
        short = groups * group - w.inputs
        values = jnp.pad(w.values, ((0, 0), (0, short))) if short else w.values
        return [(x_tgk, values.reshape(-1, groups, group))], sums_tg
    half = group // 2
    short = groups * half - w.values.shape[1]
    packed = jnp.pad(w.values, ((0, 0), (0, short))) if short else w.values
    parts = halves(packed.reshape(-1, groups, half))
    return [(x_tgk[..., odd::2], parts[odd]) for odd in (0, 1)], sums_tg


def without_zeros(y_tn: Array, sums_tg: Array, w: QuantizedWeight) -> Array:
    """Zero points are one product of few terms: what each group's inputs sum to, times what is too much."""
    if w.zero is None:
        return y_tn
    return y_tn - sums_tg @ (w.scale.astype(jnp.float32) * w.zero.astype(jnp.float32))


def by_loop(x_tk: Array, w: QuantizedWeight) -> Float[Array, "t n"]:
    """On a CPU: outputs tile after tile in a loop, whose weights are made float32 in a cache and multiplied there.

    An axis of groups is kept while weights are scaled: with a scale for each weight, or tiles one after the other in
    place of the loop, XLA:CPU takes 3 to 20 times as long.
    """
    row_bytes = 4 * w.scale.shape[0] * w.group
    rows = min(w.outputs, max(8, LOOP_BYTES // row_bytes // 8 * 8))
    steps, x_tk = w.outputs // rows, x_tk.astype(jnp.float32)

    def product(start: Array | int, count: int) -> Array:
        part = outputs_of(w, start, count)
        pairs, sums_tg = operands(x_tk, part)
        scale_ng1 = part.scale.astype(jnp.float32).T[:, :, None]

        def of(x_tgj: Array, q_ngj: Array) -> Array:
            w_nk = (q_ngj.astype(jnp.float32) * scale_ng1).reshape(count, -1)
            return dot(x_tgj.reshape(len(x_tgj), -1), w_nk)

        y_tn = functools.reduce(jnp.add, [of(*pair) for pair in pairs])
        return without_zeros(y_tn, sums_tg, part)

    tiles_itr = jax.lax.map(lambda i: product(i * rows, rows), jnp.arange(steps))
    y_tn = jnp.moveaxis(tiles_itr, 0, 1).reshape(len(x_tk), steps * rows)
    rest = w.outputs - steps * rows
    return jnp.concatenate([y_tn, product(steps * rows, rest)], 1) if rest else y_tn


def outputs_of(w: QuantizedWeight, start: Array | int, count: int) -> QuantizedWeight:
    """The part of a weight that gives some of its outputs."""

    def of_groups(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, count, 1)

    values = jax.lax.dynamic_slice_in_dim(w.values, start, count, 0)
    zero = None if w.zero is None else of_groups(w.zero)
    return dataclasses.replace(w, values=values, scale=of_groups(w.scale), zero=zero)


def by_groups(x_tk: Array, w: QuantizedWeight) -> Float[Array, "t n"]:
    """A product for each group, scaled after."""
    pairs, sums_tg = operands(x_tk, w)
    y_gtn = sum(
        jnp.einsum("tgj,ngj->gtn", x, q.astype(x.dtype), preferred_element_type=jnp.float32) for x, q in pairs
    )
    y_tn = jnp.sum(y_gtn * w.scale.astype(jnp.float32)[:, None], 0)
    return without_zeros(y_tn, sums_tg, w)


def by_tiles(x_tk: Array, w: QuantizedWeight) -> Float[Array, "t n"]:
    """Some outputs after the other, their weights in x's type."""

    def product(part: QuantizedWeight) -> Array:
        return dot(x_tk, dequantize(part, x_tk.dtype))

    return jnp.concatenate(list(over_outputs(product, w)), -1)


def transposed(dy_tn: Float[Array, "t n"], w: QuantizedWeight) -> Float[Array, "t k"]:
    """`dy w`, the gradient of x: over tiles of outputs whose weights are made in dy's type; summed in float32."""
    start, dx_tk = 0, None
    for part in parts_of(w):
        dy = jax.lax.slice_in_dim(dy_tn, start, start + part.outputs, axis=1)
        more = jnp.dot(dy, dequantize(part, dy.dtype), preferred_element_type=jnp.float32)
        dx_tk = more if dx_tk is None else dx_tk + more
        start += part.outputs
    assert dx_tk is not None  # a weight has outputs
    return dx_tk


def over_outputs(function, w: QuantizedWeight):
    """`function` of each part of the weight."""
    for part in parts_of(w):
        yield function(part)


def parts_of(w: QuantizedWeight):
    """The weight cut into runs of outputs, of which each is no larger than a tile in float32."""
    size = max(8, TILE_BYTES // (4 * w.inputs) // 8 * 8)
    for start in range(0, w.outputs, size):
        stop = min(start + size, w.outputs)
        zero = None if w.zero is None else w.zero[:, start:stop]
        yield QuantizedWeight(
            values=w.values[start:stop],
            scale=w.scale[:, start:stop],
            zero=zero,
            inputs=w.inputs,
            group=w.group,
        )


def rounded_rows(x_tk: Float[Array, "t k"], over: tuple[str, ...] = ()) -> tuple[Array, Array]:
    """x in int8 with one scale [t] a token, whose inputs may be cut `over` mesh axes."""
    wide = x_tk.astype(jnp.float32)
    most_t = jnp.max(jnp.abs(wide), -1)
    scale_t = (jax.lax.pmax(most_t, over) if over else most_t) / LARGEST_INT8
    step = jnp.where(scale_t == 0, 1.0, scale_t)[:, None]
    return jnp.round(wide / step).astype(jnp.int8), scale_t


def int8_product(q_tk: Array, scale_t: Array, w: QuantizedWeight) -> Float[Array, "t n"]:
    """Both in int8, summed in int32: exact but for the rounding of x."""
    contracted = (((1,), (1,)), ((), ()))
    y_tn = jax.lax.dot_general(q_tk, w.values, contracted, preferred_element_type=jnp.int32)
    return y_tn.astype(jnp.float32) * scale_t[:, None] * w.scale.astype(jnp.float32)
