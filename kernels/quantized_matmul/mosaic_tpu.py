"""TPU: weights travel to VMEM as they are kept, and become bfloat16 there.

One step of the grid takes a tile of x [tokens, inputs], a tile of values [outputs, inputs] and its scales; the compiler
fetches the next tiles meanwhile. Groups of 128 inputs have a product each, and its sum is scaled: no weight is rounded
again. Groups of 32 are a quarter of what the matrix unit takes at once, so there weights are scaled before their
product, and rounded to bfloat16 then. Their scales are spread over the inputs by a product with ones and zeros, which
is exact, since moving numbers along the lanes is slow.

Many tokens: a tile of them is larger, a step widens its weights once for all of them, and multiplies some rows after
others. Of sizes that fit into VMEM those are taken with which least is read again: a weight is, for each tile of
tokens, and x for each tile of outputs, unless all inputs of its tile lie in VMEM.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from maxstack.kernels import tiles as tiling
from maxstack.kernels.dispatch import chip
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

LANES = 128
TOKENS = 16
"""Tokens are filled up to a multiple of this: a tile of bfloat16 has 16 rows."""
INT8_TOKENS = 32
"""The same for int8."""
MOST_TOKENS, MOST_OUTPUTS, MOST_INPUTS = 256, 512, 2048
"""Of a tile where tokens are few, and of what is multiplied at a time. With two tiles of each in flight and the weights
in bfloat16 they take 7 MiB of VMEM."""
MANY_TOKENS, MANY_OUTPUTS = (1024, 512, 256), 1024
"""Of a tile where tokens are many."""
ROW_STEP = 128
"""Many tokens are filled up to a multiple of this."""
RESIDENT_BYTES = 4 << 20
"""What all inputs of a tile of few tokens, and of the next, may take."""
VMEM_MIB = {"v5e": 96, "v5p": 56, "v6e": 96, "v7x": 56}
"""On-chip memory a kernel may take: three quarters of the 128 MiB of a v5e or v6e, seven eighths of 64 MiB."""
FEWEST_VMEM_MIB = 14
"""Of a generation without a number above: no more than the 16 MiB of the smallest."""
AXES = {"tokens": (64, 128, 256, 512, 1024), "outputs": (256, 512, 1024), "inputs": (512, 1024, 2048, 4096)}
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
    """The largest tiles that divide the weight, and tokens filled up to whole ones; of many tokens those with which
    the least is read."""
    many = tokens > MOST_TOKENS
    step = ROW_STEP if many else step
    rows = -(-tokens // step) * step
    outputs, inputs = (
        divisor(w.outputs, MANY_OUTPUTS if many else MOST_OUTPUTS),
        divisor(w.inputs, MOST_INPUTS),
    )
    most_tokens = MANY_TOKENS if many else (min(rows, MOST_TOKENS),)
    tiles = [Tiles(even(rows, most, step) if many else most, outputs, inputs) for most in most_tokens]
    fitting = [each for each in tiles if vmem_of(each, w) <= vmem_bytes()] or tiles[-1:]
    rule = min(fitting, key=lambda each: read(rows, w, each))._asdict()

    def fault(sizes: tiling.Sizes) -> str | None:
        bt, bn, bk = sizes["tokens"], sizes["outputs"], sizes["inputs"]
        if bt > rows or bt % step:
            return f"a tile of {bt} tokens; it takes multiples of {step} up to {rows}"
        if bn % LANES or bk % LANES or w.outputs % bn or w.inputs % bk:
            return f"tiles of {bn} outputs and {bk} inputs; they must be multiples of {LANES} that divide {w.shape}"
        if (held := vmem_of(Tiles(bt, bn, bk), w)) > vmem_bytes():
            return f"tiles of {bt} tokens, {bn} outputs and {bk} inputs take {held} bytes of VMEM"
        return None

    name, dtype = f"quantized_matmul.mosaic_tpu.int{w.bits}", "int8" if step == INT8_TOKENS else "bfloat16"
    shape = {"t": tiling.about(tokens), "n": w.outputs, "k": w.inputs, "g": w.group}
    return Tiles(**tiling.chosen(name, dtype, shape, rule, axes=AXES, fault=fault))


def even(rows: int, most: int, step: int) -> int:
    """Tokens of tiles of at most `most`, a multiple of `step`, that have about as many each."""
    each = -(-rows // -(-rows // most))
    return -(-each // step) * step


def divisor(size: int, most: int) -> int:
    """The largest multiple of the lanes up to `most` that divides a size."""
    return next(n for n in range(most, 0, -LANES) if size % n == 0)


def vmem_bytes() -> int:
    """What a kernel may take."""
    return VMEM_MIB.get(chip().name, FEWEST_VMEM_MIB) * 2**20


def resident(tokens: int, inputs: int) -> bool:
    """Whether all inputs of a tile of tokens lie in VMEM, and of the next one, so that x is read once."""
    most = vmem_bytes() // 2 if tokens > MOST_TOKENS else RESIDENT_BYTES
    return 2 * 2 * tokens * inputs <= most


def vmem_of(tiles: Tiles, w: QuantizedWeight) -> int:
    """Bytes, of two of everything that is fetched or written in float32, of the sums and of widened weights."""
    bt, bn, bk = tiles
    x = 2 * 2 * bt * (w.inputs if resident(bt, w.inputs) else bk)
    return x + bn * bk * (2 * w.bits // 8 + 2) + 3 * 4 * bt * bn + 4 * bn * bk * 32 // w.group


def read(rows: int, w: QuantizedWeight, tiles: Tiles) -> int:
    """Bytes of weights, scales and x that a call reads."""
    bt, bn, bk = tiles
    weights = w.outputs * w.inputs * w.bits // 8 + w.scale.size * w.scale.dtype.itemsize
    again = 1 if resident(bt, w.inputs) or bk == w.inputs else w.outputs // bn
    return weights * -(-rows // bt) + 2 * rows * w.inputs * again


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
    body = functools.partial(tile, group=None if whole else group, bk=bk)
    many, x_inputs = bt > MOST_TOKENS, w.inputs if resident(bt, w.inputs) else bk
    wide = [pltpu.VMEM((bn, bk), x_tk.dtype)] if many and w.values.dtype != x_tk.dtype else []
    y_tn = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(
            (x_tk.shape[0], w.outputs), dtype, manual_axis_type=jax.typeof(x_tk).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                pl.BlockSpec((bt, x_inputs), lambda t, n, k, at: (t, k if x_inputs == bk else 0)),
                pl.BlockSpec((None, bn, bk), lambda t, n, k, at: (at[0], n, k)),
                pl.BlockSpec((1, scales_kgn.shape[1], bn), lambda t, n, k, at: (0 if whole else k, 0, n)),
            ],
            out_specs=pl.BlockSpec((bt, bn), lambda t, n, k, at: (t, n)),
            scratch_shapes=[pltpu.VMEM((bt, bn), sum_dtype), *wide],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes() if many else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * x_tk.size * w.outputs,
            transcendentals=0,
            bytes_accessed=read(x_tk.shape[0], w, tiles)
            + x_tk.shape[0] * w.outputs * jnp.dtype(dtype).itemsize,
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(layer, x_tk, values_lnk, scales_kgn)
    return y_tn[:tokens]


def tile(layer_ref, x_ref, w_ref, s_ref, y_ref, sum_ref, *wide_ref, group: int | None, bk: int):
    """One step: adds a run of inputs to the sums of a tile of outputs."""
    tokens, k, steps = x_ref.shape[0], pl.program_id(2), pl.num_programs(2)
    first = 0 if x_ref.shape[1] == bk else pl.multiple_of(k * bk, bk)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    if wide_ref:
        widen(w_ref, s_ref, wide_ref[0], group)
        w_ref = wide_ref[0]
    each = next(
        size for size in (tokens, MOST_TOKENS, ROW_STEP) if size <= MOST_TOKENS and tokens % size == 0
    )
    by_part(tokens, each, lambda rows: add(rows, first, x_ref, w_ref, s_ref, sum_ref, group, bk))

    @pl.when(k == steps - 1)
    def _():
        def write(rows):
            y_tn = sum_ref[rows].astype(jnp.float32)
            y_ref[rows] = (y_tn * s_ref[0] if group is None else y_tn).astype(y_ref.dtype)

        by_part(tokens, each, write)


def by_part(size: int, each: int, run: Callable) -> None:
    """`run` of all rows, or of some after others in a loop, whose code stands once."""
    if size == each:
        run(pl.ds(0, size))
        return

    @pl.loop(0, size // each)
    def _(i):
        run(pl.ds(pl.multiple_of(i * each, each), each))


def add(rows, first, x_ref, w_ref, s_ref, sum_ref, group: int | None, bk: int) -> None:
    """Add to the sums of some rows; `first` is the place of the step's inputs in x."""
    dtype = x_ref.dtype
    if group is None or group == 32:
        w_nk = w_ref[...]
        if w_nk.dtype != dtype:
            w_nk = w_nk.astype(dtype) if group is None else scaled(w_nk, s_ref[0])
        sum_ref[rows] += product(x_ref[rows, pl.ds(first, bk)], w_nk, sum_ref.dtype)
        return
    total = sum_ref[rows]
    for g in range(bk // group):
        w_nk = in_type(w_ref[:, pl.ds(g * group, group)], dtype)
        part = product(x_ref[rows, pl.ds(first + g * group, group)], w_nk, sum_ref.dtype)
        total += part * s_ref[0, g, :][None, :].astype(jnp.float32)
    sum_ref[rows] = total


def widen(w_ref, s_ref, wide_ref, group: int | None) -> None:
    """Weights as operands of a product, some outputs after others."""

    def some(outputs):
        values = w_ref[outputs]
        wide_ref[outputs] = (
            scaled(values, s_ref[0, :, outputs]) if group == 32 else values.astype(wide_ref.dtype)
        )

    by_part(w_ref.shape[0], LANES, some)


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
