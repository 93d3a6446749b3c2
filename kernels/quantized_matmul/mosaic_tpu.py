"""TPU: weights travel to VMEM as they are kept, and become bfloat16 there.

One step of the grid takes a tile of x [tokens, inputs], a tile of values [outputs, inputs] and its scales; the compiler
fetches the next tiles meanwhile. Groups of 128 inputs have a product each, and its sum is scaled: no weight is rounded
again. Groups of 32 are a quarter of what the matrix unit takes at once, so there weights are scaled before their
product, and rounded to bfloat16 then. Their scales are spread over the inputs by a product with ones and zeros, which
is exact, since moving numbers along the lanes is slow.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from maxstack.kernels import tiles as tiling
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

LANES = 128
TOKENS = 16
"""Tokens are filled up to a multiple of this: a tile of bfloat16 has 16 rows."""
INT8_TOKENS = 32
"""The same for int8."""
MOST_TOKENS, MOST_OUTPUTS, MOST_INPUTS = 256, 512, 2048
"""Of a tile. With two tiles of each in flight and the weights in bfloat16 they take 7 MiB of VMEM."""
AXES = {"tokens": (64, 128, 256, 512), "outputs": (256, 512, 1024), "inputs": (512, 1024, 2048, 4096)}
"""Worth trying."""
WITHOUT_INT8 = ("v2", "v3", "v4")
"""Generations whose matrix unit has no int8."""


class Tiles(NamedTuple):
    """What one step of the grid works on."""

    tokens: int
    outputs: int
    inputs: int


def declined(x_tk: Array, w: QuantizedWeight) -> str | None:
    """Why the kernel cannot serve a call; None: it can."""
    if w.values.dtype == jnp.uint8:
        return "int4 lies two in a byte: keep the weight as int4, `stored(w, 'int4')`"
    if x_tk.dtype != jnp.bfloat16:
        return f"x is {x_tk.dtype}; it takes bfloat16"
    if w.inputs % LANES or w.outputs % LANES:
        return f"w is {w.shape}; it takes multiples of {LANES}"
    if w.group != w.inputs and w.group not in (32, LANES):
        return f"groups of {w.group}; it takes 32, {LANES} or all inputs"
    return None


def tiles_for(tokens: int, w: QuantizedWeight, step: int = TOKENS) -> Tiles:
    """The largest tiles that divide the weight, and tokens filled up to whole ones."""
    rows = -(-tokens // step) * step
    rule = {
        "tokens": min(rows, MOST_TOKENS),
        "outputs": next(n for n in range(MOST_OUTPUTS, 0, -LANES) if w.outputs % n == 0),
        "inputs": next(k for k in range(MOST_INPUTS, 0, -LANES) if w.inputs % k == 0),
    }

    def fault(sizes: tiling.Sizes) -> str | None:
        bt, bn, bk = sizes["tokens"], sizes["outputs"], sizes["inputs"]
        if bt > rows or bt % step:
            return f"a tile of {bt} tokens; it takes multiples of {step} up to {rows}"
        if bn % LANES or bk % LANES or w.outputs % bn or w.inputs % bk:
            return f"tiles of {bn} outputs and {bk} inputs; they must be multiples of {LANES} that divide {w.shape}"
        return None

    name, dtype = f"quantized_matmul.mosaic_tpu.int{w.bits}", "bfloat16" if step == TOKENS else "int8"
    shape = {"t": tiling.about(tokens), "n": w.outputs, "k": w.inputs, "g": w.group}
    return Tiles(**tiling.chosen(name, dtype, shape, rule, axes=AXES, fault=fault))


def quantized_matmul(
    x_tk: Float[Array, "t k"], w: QuantizedWeight, *, tiles: Tiles | None = None, interpret: Any = False,
    dtype: jnp.dtype | type = jnp.float32,
) -> Float[Array, "t n"]:  # fmt: skip
    """`x w^T`, summed in float32 and rounded once; with zero points it stays float32."""
    tiles = tiles or tiles_for(x_tk.shape[0], w)
    y_tn = run(x_tk, w, tiles, jnp.dtype(jnp.float32), interpret, dtype if w.zero is None else jnp.float32)
    if w.zero is None:
        return y_tn
    # What is too much is a product of few terms: the sum of each group's inputs, times scale and zero point.
    sums_tg = x_tk.astype(jnp.float32).reshape(-1, w.inputs // w.group, w.group).sum(-1)
    offset_gn = w.scale.astype(jnp.float32) * w.zero.astype(jnp.float32)
    return y_tn - jnp.dot(sums_tg, offset_gn, precision=jax.lax.Precision.HIGHEST)


def int8_product(
    q_tk: Array, scale_t: Array, w: QuantizedWeight, *, tiles: Tiles | None = None, interpret: Any = False
) -> Float[Array, "t n"]:
    """`x w^T` with x in int8 and one scale a token; products are summed in int32."""
    tiles = tiles or tiles_for(q_tk.shape[0], w, INT8_TOKENS)
    return run(q_tk, w, tiles, jnp.dtype(jnp.int32), interpret) * scale_t[:, None]


def run(
    x_tk: Array, w: QuantizedWeight, tiles: Tiles, sum_dtype: jnp.dtype, interpret: Any,
    dtype: jnp.dtype | type = jnp.float32,
) -> Array:  # fmt: skip
    """The kernel over all tiles, of the one layer if the values are a stack of many."""
    tokens, (bt, bn, bk) = x_tk.shape[0], tiles
    x_tk = jnp.pad(x_tk, ((0, -tokens % bt), (0, 0)))
    whole = w.group == w.inputs
    group = bk if whole else w.group
    stacked = w.layer is not None
    values_lnk = w.values if stacked else w.values[None]
    layer = jnp.reshape(jnp.asarray(w.layer if stacked else 0, jnp.int32), (1,))
    # A block of scales has all its groups as a dimension of its own: it need not be a multiple of 8.
    scales_kgn = w.scale.reshape(-1, 1 if whole else bk // group, w.outputs)
    grid = (x_tk.shape[0] // bt, w.outputs // bn, w.inputs // bk)
    body = functools.partial(tile, group=None if whole else group, steps=grid[2])
    y_tn = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(
            (x_tk.shape[0], w.outputs), dtype, manual_axis_type=jax.typeof(x_tk).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((bt, bk), lambda t, n, k, at: (t, k)),
                pl.BlockSpec((None, bn, bk), lambda t, n, k, at: (at[0], n, k)),
                pl.BlockSpec((1, scales_kgn.shape[1], bn), lambda t, n, k, at: (0 if whole else k, 0, n)),
            ],
            out_specs=pl.BlockSpec((bt, bn), lambda t, n, k, at: (t, n)),
            scratch_shapes=[pltpu.VMEM((bt, bn), sum_dtype)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * x_tk.size * w.outputs,
            transcendentals=0,
            bytes_accessed=w.outputs * w.inputs * w.bits // 8
            + x_tk.size * x_tk.dtype.itemsize
            + 4 * x_tk.shape[0] * w.outputs,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer, x_tk, values_lnk, scales_kgn)
    return y_tn[:tokens]


def tile(layer_ref, x_ref, w_ref, s_ref, y_ref, sum_ref, *, group: int | None, steps: int):
    """One step: adds a run of inputs to the sums of a tile of outputs."""
    bk, k = x_ref.shape[1], pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if group is None:
        sum_ref[...] += product(x_ref[...], in_type(w_ref[...], x_ref.dtype), sum_ref.dtype)
    elif group == 32:
        sum_ref[...] += product(x_ref[...], scaled(w_ref[...], s_ref[0]), sum_ref.dtype)
    else:
        total = sum_ref[...]
        for g in range(bk // group):
            at = pl.ds(g * group, group)
            part = product(x_ref[:, at], in_type(w_ref[:, at], x_ref.dtype), sum_ref.dtype)
            total += part * s_ref[0, g, :][None, :].astype(jnp.float32)
        sum_ref[...] = total

    @pl.when(k == steps - 1)
    def _():
        y_tn = sum_ref[...].astype(jnp.float32)
        y_ref[...] = (y_tn * s_ref[0] if group is None else y_tn).astype(y_ref.dtype)


def product(a_tk: Array, b_nk: Array, dtype: jnp.dtype) -> Array:
    """`a b^T`."""
    return jax.lax.dot_general(a_tk, b_nk, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def in_type(values: Array, dtype: jnp.dtype) -> Array:
    """Values as operands of a product with x."""
    return values if values.dtype == dtype else values.astype(dtype)


def scaled(values_nk: Array, scale_gn: Array) -> Array:
    """Weights in bfloat16, of groups of 32."""
    groups, inputs = scale_gn.shape[0], values_nk.shape[1]
    size, shape = inputs // groups, (groups, inputs)
    first = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * size
    at = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen = (at >= first) & (at < first + size)
    ones_gk = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
    scale_nk = jax.lax.dot_general(
        scale_gn, ones_gk, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return (values_nk.astype(jnp.float32) * scale_nk).astype(jnp.bfloat16)
