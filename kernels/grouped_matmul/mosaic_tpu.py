"""TPU: a matrix is fetched once for all rows of its group, and rows of other groups in a tile are neither
multiplied (in runs of `part` rows) nor written.

    grid   tiles of outputs × visits (as many as the sizes of the groups make) × tiles of inputs (one where it fits)
    visit  rows of one group: the tile of x and of y, the matrix. The next visit of the group fetches no matrix, that of
           the tile no rows; y stays on the chip until all groups of its tile have written theirs

Of the gradient by matrices the grid is tiles of the matrix × visits; a group's sum stays on the chip until its last
visit. Which visits there are is in scalar memory (`visits`); what comes next is fetched meanwhile by the compiler's
pipeline. Weights of 8 or 4 bits travel as they are kept and become bfloat16 in VMEM, as in `quantized_matmul`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from maxstack.kernels.dispatch import chip
from maxstack.kernels.grouped_matmul.mosaic_tpu_sizes import (
    LANES,
    MOST_WHOLE,
    Tiles,
    matrix_tiles,
    scale_lies,
    tiles_of,
    vmem_bytes,
)
from maxstack.kernels.grouped_matmul.visits import Visits, of_groups, of_rows
from maxstack.kernels.quantized_matmul.mosaic_tpu import in_type, scaled
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

WITHOUT_BFLOAT16 = ("v2", "v3")
MOST_VISITS = 40_000
"""Five numbers each in scalar memory, which holds 2**18."""


def declined(x_td: Array, w: Array | QuantizedWeight, group_sizes_e: Array) -> str | None:
    """Why the kernels cannot serve a call or its gradients; None: they can."""
    if chip().name in WITHOUT_BFLOAT16:
        return f"kernels of a {chip().name} multiply no bfloat16; it needs a v4"
    quantized = isinstance(w, QuantizedWeight)
    if x_td.dtype != jnp.bfloat16 and (quantized or x_td.dtype != jnp.float32):
        return f"x is {x_td.dtype}; it takes bfloat16{'' if quantized else ' or float32'}"
    if 0 in (*x_td.shape, *w.shape):
        return f"it takes no empty arrays, and x is {x_td.shape}, w {w.shape}"
    if quantized and w.values.dtype == jnp.uint8:
        return "int4 lies two in a byte: keep the weight as int4, `stored(w, 'int4')`"
    for size in w.shape[1:]:
        if size % LANES and (quantized or size % 8 or size > MOST_WHOLE):
            return f"w is {w.shape}; it takes sizes that are multiples of {LANES}, or of 8 up to {MOST_WHOLE}"
    if quantized and w.zero is not None:
        return "it reads no zero points"
    if quantized and w.group != w.inputs and w.group not in (32, LANES):
        return f"groups of {w.group}; it takes 32, {LANES} or all inputs"
    visits = x_td.shape[0] // LANES + group_sizes_e.shape[0]
    if visits > MOST_VISITS:
        return f"{visits:,} visits of groups to tiles of rows; scalar memory holds {MOST_VISITS:,}: use fewer rows"
    return None


def product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """Summed in float32; products of float32 are not rounded to bfloat16."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def rows(
    x_td: Float[Array, "t d"], w: Array | QuantizedWeight, group_sizes_e: Int[Array, "e"], transposed: bool = False,
    *, first: Int[Array, ""] | None = None, tiles: Tiles | None = None, interpret: Any = False,
) -> Float[Array, "t f"]:  # fmt: skip
    """Each row times the matrix of its group: [e, d, f], or [e, f, d] if `transposed` or quantized; rows of no group
    give 0. In the dtype of the rows. With `first` there are more matrices, and it is the number of group 0's."""
    quantized = isinstance(w, QuantizedWeight)
    transposed = transposed or quantized
    groups, d, f = len(group_sizes_e), x_td.shape[1], w.shape[1 if transposed else 2]
    tiles = tiles or tiles_of(x_td, w, groups, transposed)
    bt, _, bn, bk = tiles
    count = x_td.shape[0]
    x_td = jnp.pad(x_td, ((0, max(bt - count, 0)), (0, 0)))  # a larger array may end within its last tile
    visits = of_rows(group_sizes_e, count, bt)
    scalars = _scalars(visits, visits.real_v)
    # Read by the specs alone.
    stack = [] if first is None else [jnp.reshape(first, (1,)).astype(jnp.int32)]

    def at_w(n, v, k, *refs):
        at = matrix(v, refs)
        return (at, n, k) if transposed else (at, k, n)

    def matrix(v, refs):
        group, *_ = refs
        return group[v] + refs[len(scalars)][0] if stack else group[v]

    arrays: list[Any] = [w]
    specs = [pl.BlockSpec((None, bn, bk) if transposed else (None, bk, bn), at_w)]
    if quantized:
        each = bk // w.group if w.group != w.inputs else 1
        # The groups of a tile's inputs are a dimension of their own: they need not be a multiple of 8.
        whole, scale = w.group == w.inputs, w.scale
        lies = scale_lies(w, bk)
        if first is not None and not lies:
            scale = jax.lax.dynamic_slice_in_dim(scale, first, groups)
        arrays = [w.values, scale.reshape(scale.shape[0], -1, each, f)]

        def at_scale(n, v, k, *refs):
            return (matrix(v, refs) if lies else refs[0][v]), (0 if whole else k), 0, n

        specs.append(pl.BlockSpec((None, None, each, bn), at_scale))
    own = [jax.ShapeDtypeStruct((groups, *a.shape[1:]), a.dtype) for a in arrays]
    if stack and not interpret:  # else XLA may copy scales of all layers into VMEM
        arrays = [pltpu.with_memory_space_constraint(a, pltpu.HBM) for a in arrays]
    steps = d // bk
    kernel = functools.partial(_rows_kernel, part=tiles.part, steps=steps, multiply=_multiply(w, transposed))

    def body(*refs):
        kernel(*refs[: len(scalars)], *refs[len(scalars) + len(stack) :])

    y_tf = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(
            (x_td.shape[0], f), x_td.dtype, manual_axis_type=jax.typeof(x_td).manual_axis_type
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + len(stack),
            grid=(f // bn, visits.count, steps),
            in_specs=[pl.BlockSpec((bt, bk), lambda n, v, k, group, tile, *_: (tile[v], k)), *specs],
            out_specs=pl.BlockSpec((bt, bn), lambda n, v, k, group, tile, *_: (tile[v], n)),
            scratch_shapes=[pltpu.VMEM((bt, bn), jnp.float32)] if steps > 1 else [],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=_cost(
            2 * x_td.size * f, (x_td,) * (f // bn), own, x_td.shape[0] * f * x_td.dtype.itemsize
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*scalars, *stack, x_td, *arrays)
    return y_tf[:count]


def _scalars(visits: Visits, mark_v: Array) -> tuple[Array, ...]:
    return visits.group_v, visits.tile_v, visits.first_v, visits.end_v, mark_v.astype(jnp.int32)


def _cost(flops: int, again, once, out_bytes: int) -> pl.CostEstimate:
    bits = sum(a.size * (4 if a.dtype == jnp.int4 else 8 * a.dtype.itemsize) for a in (*again, *once))
    moved = bits // 8 + out_bytes
    return pl.CostEstimate(flops=int(flops), transcendentals=0, bytes_accessed=int(moved))


class Multiply(NamedTuple):
    """How rows are multiplied with a tile of the matrix, and what is done to the sum over all inputs."""

    product: Callable
    finish: Callable


def _multiply(w: Array | QuantizedWeight, transposed: bool) -> Multiply:
    if not isinstance(w, QuantizedWeight):
        contracted = (1, 1) if transposed else (1, 0)
        return Multiply(lambda x, w_ref: product(x, w_ref[...], contracted), lambda y, *_: y)
    if w.group == w.inputs:
        return Multiply(
            lambda x, w_ref, _: product(x, in_type(w_ref[...], x.dtype), (1, 1)),
            lambda y, _, scale_ref: y * scale_ref[...],
        )
    return Multiply(_by_scales_of_32 if w.group == 32 else _by_scales, lambda y, *_: y)


def _by_scales_of_32(x: Array, w_ref, scale_ref) -> Array:
    return product(x, scaled(w_ref[...], scale_ref[...]), (1, 1))


def _by_scales(x: Array, w_ref, scale_ref) -> Array:
    """Each group's sum is scaled after its product: no weight is rounded again."""
    each = scale_ref.shape[0]
    size = x.shape[1] // each
    total = jnp.zeros((x.shape[0], w_ref.shape[0]), jnp.float32)
    for g in range(each):
        at = slice(g * size, (g + 1) * size)
        part = product(x[:, at], in_type(w_ref[:, at], x.dtype), (1, 1))
        total += part * scale_ref[g, :][None, :].astype(jnp.float32)
    return total


def _rows_kernel(
    group_ref, tile_ref, first_ref, end_ref, real_ref, x_ref, *refs, part: int, steps: int, multiply: Multiply
):
    """One visit with one tile of inputs."""
    sums: Any = refs[-1] if steps > 1 else None
    *w_refs, y_ref = refs[:-1] if steps > 1 else refs
    v, k = pl.program_id(1), pl.program_id(2)
    first, end, real = first_ref[v], end_ref[v], real_ref[v] == 1

    def work(start: Any, size: int, masked: bool):
        at = pl.ds(start, size)

        def keep(y):
            if masked:
                row = start + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
                y = jnp.where((row >= first) & (row < end), y, y_ref[at].astype(jnp.float32))
            y_ref[at] = y.astype(y_ref.dtype)

        @pl.when(real)
        def _():
            y = multiply.product(x_ref[at], *w_refs)
            if sums is None:
                keep(multiply.finish(y, *w_refs))
                return

            @pl.when(k == 0)
            def _():
                sums[at] = y

            @pl.when(k > 0)
            def _():
                sums[at] += y

            @pl.when(k == steps - 1)
            def _():
                keep(multiply.finish(sums[at], *w_refs))

        @pl.when(jnp.logical_not(real) & (k == 0))
        def _():
            keep(jnp.zeros((size, y_ref.shape[1]), jnp.float32))

    _each_part(x_ref.shape[0], part, first, end, work)


def _each_part(rows: int, part: int, first, end, work: Callable) -> None:
    """`work(first row, rows, masked)` of the whole tile, or of the parts of it that the group has rows of."""
    whole = (first == 0) & (end == rows)
    pl.when(whole)(lambda: work(0, rows, False))

    @pl.when(jnp.logical_not(whole) & (end > first))
    def _():
        def one(i, _):
            work(pl.multiple_of(i * part, part), part, True)

        begin, behind = (jax.lax.div(row, jnp.int32(part)) for row in (first, end + part - 1))
        jax.lax.fori_loop(begin, behind, one, None)


def matrices(
    x_td: Float[Array, "t d"], dy_tf: Float[Array, "t f"], group_sizes_e: Int[Array, "e"],
    *, tiles: Tiles | None = None, interpret: Any = False,
) -> Float[Array, "e d f"]:  # fmt: skip
    """xᵀ·dy over the rows of each group, summed in float32; 0 for a group without rows."""
    (count, d), f, groups = x_td.shape, dy_tf.shape[1], len(group_sizes_e)
    tiles = tiles or matrix_tiles(count, groups, d, f, x_td.dtype.itemsize, vmem_bytes())
    bt, part, bf, bd = tiles
    x_td, dy_tf = (jnp.pad(a, ((0, max(bt - count, 0)), (0, 0))) for a in (x_td, dy_tf))
    visits = of_groups(group_sizes_e, count, bt)
    marks = visits.opens_v + 2 * visits.closes_v.astype(jnp.int32)
    out = jax.ShapeDtypeStruct((groups, d, f), x_td.dtype, manual_axis_type=jax.typeof(x_td).manual_axis_type)
    return pl.pallas_call(
        functools.partial(_matrices_kernel, part=part),
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(d // bd, f // bf, visits.count),
            in_specs=[
                pl.BlockSpec((bt, bd), lambda i, j, v, group, tile, *_: (tile[v], i)),
                pl.BlockSpec((bt, bf), lambda i, j, v, group, tile, *_: (tile[v], j)),
            ],
            out_specs=pl.BlockSpec((None, bd, bf), lambda i, j, v, group, *_: (group[v], i, j)),
            scratch_shapes=[pltpu.VMEM((bd, bf), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes()
        ),
        cost_estimate=_cost(
            2 * count * d * f,
            (x_td,) * (f // bf) + (dy_tf,) * (d // bd),
            (),
            math.prod(out.shape) * out.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul_matrices",
    )(*_scalars(visits, marks), x_td, dy_tf)


def _matrices_kernel(
    group_ref, tile_ref, first_ref, end_ref, mark_ref, x_ref, dy_ref, dw_ref, sum_ref, *, part
):
    """One visit: adds the products of a group's rows of a tile to the group's sum."""
    v = pl.program_id(2)
    first, end, mark = first_ref[v], end_ref[v], mark_ref[v]

    @pl.when((mark & 1) != 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def work(start: Any, size: int, masked: bool):
        def own(ref):
            block = ref[pl.ds(start, size)]
            if not masked:
                return block
            row = start + jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
            return jnp.where((row >= first) & (row < end), block, jnp.zeros_like(block))

        # Both are masked: 0 · NaN of a row of another group would be NaN.
        sum_ref[...] += product(own(x_ref), own(dy_ref), (0, 0))

    _each_part(x_ref.shape[0], part, first, end, work)

    @pl.when((mark & 2) != 0)
    def _():
        dw_ref[...] = sum_ref[...].astype(dw_ref.dtype)
