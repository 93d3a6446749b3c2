"""Hopper: tiles of rows begin where groups do, so that only a group's last tile multiplies many rows in vain.

TMA fetches a tile from every eighth row on, and stores the group's rows of a tile as runs of 1, 2, 4, ... rows. Three
warpgroups a block, and what each does over time:

    loads    |x0 w0|x1 w1|x2 w2|x3 w3|  wait: a stage is free  |x4 w4| ...
    sums 0   |     |wait|wgmma 0|wgmma 1: stage 0 is free|wgmma 2: stage 1 is free| ...            |to shared, store|
    sums 1   |     |wait|wgmma 0|wgmma 1: stage 0 is free|wgmma 2: stage 1 is free| ...            |to shared, store|

A stage is 64 inputs of a tile of rows and of a tile of outputs of the group's matrix. Blocks that run together share
eight tiles of rows, so that a matrix is read from memory once for them. Of the gradient by matrices a block is a tile
of one group's matrix, and a stage 64 rows; what a group's first and last stage hold of other groups is set to 0 in
shared memory. Blocks beyond the visits that the sizes make have no stages and store nothing.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul import mosaic_gpu_quantized
from maxstack.kernels.grouped_matmul.mosaic_gpu_tile import store_rows, summed
from maxstack.kernels.grouped_matmul.quantized import whole
from maxstack.kernels.grouped_matmul.visits import EIGHT, own_tiles
from maxstack.kernels.hopper_stages import load_stages
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

ROWS, GROUPS = 64, 2
"""Rows of a product of a warpgroup, and warpgroups that multiply."""
DEPTH = 64
"""Inputs of a stage; of the gradient by matrices rows of a stage."""
STAGES = 4
TOGETHER = 8
"""Tiles of rows whose blocks run one after the other, before those of the next tile of outputs."""
REGISTERS = 232
SWIZZLE = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
FEW_ROWS = 64
"""Groups with fewer rows than this (the mean) have tiles of one product, whose outputs two warpgroups share."""


class Tiles(NamedTuple):
    """What a block works on."""

    rows: int
    """64 or 128."""
    outputs: int


def declined(x_td: Array, w: Array | QuantizedWeight) -> str | None:
    """Why the kernels cannot serve a call or its gradients; None: they can."""
    if x_td.dtype != jnp.bfloat16:
        return f"x is {x_td.dtype}; it takes bfloat16"
    if 0 in (*x_td.shape, *w.shape):
        return f"it takes no empty arrays, and x is {x_td.shape}, w {w.shape}"
    if isinstance(w, QuantizedWeight):
        if w.zero is not None:
            return "it reads no zero points"
        if w.values.dtype == jnp.uint8:
            return "int4 lies two in a byte: keep the weight as int4, `stored(w, 'int4')`"
        if w.group != w.inputs and w.group not in (32, 128):
            return f"groups of {w.group}; it takes 32, 128 or all inputs"
    if any(size % (2 * DEPTH) for size in w.shape[1:]):
        return f"w is {w.shape}; it takes sizes that are multiples of {2 * DEPTH}"
    return None


def in_place(x_td: Array, w: Array | QuantizedWeight, groups: int) -> bool:
    """Whether `rows` reads a stack where it lies. A slice of bfloat16 XLA makes no copy for, one of int4 it does."""
    return isinstance(w, QuantizedWeight) and as_kept(x_td, groups)


def as_kept(x_td: Array, groups: int) -> bool:
    """Whether rows are multiplied with weights of few bits as they are kept."""
    return x_td.shape[0] <= mosaic_gpu_quantized.WORTH_ROWS * groups


def tiles_for(rows: int, groups: int, outputs: int) -> Tiles:
    """Small tiles where groups have few rows: the matrix is then all that is read, by as many blocks as can be."""
    few = rows < FEW_ROWS * groups
    wide = next(n for n in (128,) * few + (256, 192, 128) if outputs % n == 0)
    return Tiles(ROWS if few else GROUPS * ROWS, wide)


def shared(stages: int, *shape: int) -> Any:
    """Blocks in stages, as `wgmma` and TMA want them."""
    return plgpu.SMEM((stages, *shape), jnp.bfloat16, transforms=SWIZZLE)


def rows(
    x_td: Float[Array, "t d"], w: Array | QuantizedWeight, group_sizes_e: Int[Array, "e"], transposed: bool = False,
    *, first: Int[Array, ""] | None = None, tiles: Tiles | None = None,
) -> Float[Array, "t f"]:  # fmt: skip
    """Each row times the matrix of its group (`w` is [e, f, d] if `transposed` or quantized); rows of no group
    give 0. With `first` it is a stack that is read `in_place`."""
    if isinstance(w, QuantizedWeight):
        if as_kept(x_td, len(group_sizes_e)):
            return mosaic_gpu_quantized.rows(x_td, w, group_sizes_e, first=first)
        w, transposed = whole(w, x_td.dtype), True
    w_edf = w
    (count, d), f = x_td.shape, w_edf.shape[1 if transposed else 2]
    tiles = tiles or tiles_for(count, len(group_sizes_e), f)
    spans = own_tiles(group_sizes_e, count, tiles.rows)
    x_td = jnp.pad(
        x_td, ((0, -count % 8), (0, 0))
    )  # whole tiles of 8 rows; the rest of a block TMA fills itself
    together = min(TOGETHER, len(spans.group_v))
    spans = [jnp.pad(a, (0, -len(a) % together)) for a in spans]
    stages = min(STAGES, d // DEPTH)
    scratch = {
        "xs": shared(stages, tiles.rows, DEPTH),
        "ws": shared(stages, *((tiles.outputs, DEPTH) if transposed else (DEPTH, tiles.outputs))),
        "ys": plgpu.SMEM((GROUPS, ROWS, ROWS), jnp.bfloat16),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    }
    y_tf = plgpu.kernel(
        functools.partial(_rows_block, tiles=tiles, steps=d // DEPTH, stages=stages, transposed=transposed),
        out_type=jax.ShapeDtypeStruct(
            (x_td.shape[0], f), x_td.dtype, manual_axis_type=jax.typeof(x_td).manual_axis_type
        ),
        grid=(len(spans[0]) // together, f // tiles.outputs, together),
        grid_names=("many", "n", "each"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="grouped_matmul",
    )(*spans[:4], spans[4].astype(jnp.int32), x_td, w_edf)
    return y_tf[:count]


def _rows_block(
    group_v, start_v, first_v, end_v, real_v, x_td, w_edf, y_tf,
    *, xs, ws, ys, ready, free, tiles, steps, stages, transposed,
):  # fmt: skip
    """One block: GROUPS warpgroups multiply, the last one loads."""
    v = jax.lax.axis_index("many") * jax.lax.axis_size("each") + jax.lax.axis_index("each")
    first_output = jax.lax.axis_index("n") * tiles.outputs
    own = jax.lax.axis_index("warpgroup")
    group, start = group_v[v], pl.multiple_of(start_v[v], EIGHT)
    first, end = first_v[v], end_v[v]
    steps = jnp.where((real_v[v] == 1) & (end > first), steps, 0)

    @pl.when(own == GROUPS)
    def _():
        outputs = pl.ds(first_output, tiles.outputs)

        def load(step, stage):
            inputs = pl.ds(step * DEPTH, DEPTH)
            at = w_edf.at[group, outputs, inputs] if transposed else w_edf.at[group, inputs, outputs]
            plgpu.copy_gmem_to_smem(x_td.at[pl.ds(start, tiles.rows), inputs], xs.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(at, ws.at[stage], ready.at[stage])

        load_stages(load, steps, stages, free)

    @pl.when(own < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        # Two warpgroups share the rows of a tile, or its outputs.
        share = tiles.rows == ROWS
        wide = tiles.outputs // GROUPS if share else tiles.outputs
        first_row = 0 if share else pl.multiple_of(own * ROWS, ROWS)
        column = pl.multiple_of(own * wide, wide) if share else 0

        def multiply(acc, stage, _):
            at = pl.ds(column, wide)
            w = ws.at[stage, at].T if transposed else ws.at[stage, :, at]
            plgpu.wgmma(acc, xs.at[stage, pl.ds(first_row, ROWS)], w)

        mine = [jnp.clip(row - first_row, 0, ROWS) for row in (first, end)]
        total = summed((ROWS, wide), multiply, steps, stages, ready, free)
        for at in range(0, wide, ROWS):
            ys[own] = total[:, at : at + ROWS].astype(jnp.bfloat16)
            plgpu.commit_smem()
            outputs = pl.ds(first_output + column + at, ROWS)
            store_rows(
                ys.at[own], lambda rows, outputs=outputs: y_tf.at[rows, outputs], start + first_row, *mine
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.wait_smem_to_gmem(0)


def matrices(
    x_td: Float[Array, "t d"], dy_tf: Float[Array, "t f"], group_sizes_e: Int[Array, "e"]
) -> Float[Array, "e d f"]:
    """xᵀ·dy over the rows of each group, summed in float32; 0 for a group without rows."""
    (count, d), f, groups = x_td.shape, dy_tf.shape[1], len(group_sizes_e)
    high, wide = GROUPS * ROWS, next(n for n in (256, 192, 128) if f % n == 0)
    end_e = jnp.minimum(jnp.cumsum(group_sizes_e.astype(jnp.int32)), count)
    start_e = jnp.concatenate([jnp.zeros_like(end_e[:1]), end_e[:-1]])
    x_td, dy_tf = (jnp.pad(a, ((0, -count % 8), (0, 0))) for a in (x_td, dy_tf))
    scratch = {
        "xs": shared(STAGES, DEPTH, high),
        "dys": shared(STAGES, DEPTH, wide),
        "dws": plgpu.SMEM((GROUPS, ROWS, ROWS), x_td.dtype, transforms=SWIZZLE),
        "ready": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=STAGES),
    }
    return plgpu.kernel(
        functools.partial(_matrices_block, wide=wide),
        out_type=jax.ShapeDtypeStruct(
            (groups, d, f), x_td.dtype, manual_axis_type=jax.typeof(x_td).manual_axis_type
        ),
        grid=(groups, d // high, f // wide),
        grid_names=("group", "d", "f"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="grouped_matmul_matrices",
    )(start_e, end_e, x_td, dy_tf)


def _matrices_block(start_e, end_e, x_td, dy_tf, dw_edf, *, xs, dys, dws, ready, free, wide):
    """One tile of one group's matrix; each warpgroup sums its half of the rows of the tile."""
    group, own = jax.lax.axis_index("group"), jax.lax.axis_index("warpgroup")
    first_d, first_f = jax.lax.axis_index("d") * (GROUPS * ROWS), jax.lax.axis_index("f") * wide
    first, end = start_e[group], end_e[group]
    start = pl.multiple_of(jax.lax.div(first, jnp.int32(EIGHT)) * EIGHT, EIGHT)
    steps = jnp.where(end > first, jax.lax.div(end - start + (DEPTH - 1), jnp.int32(DEPTH)), 0)

    @pl.when(own == GROUPS)
    def _():
        def load(step, stage):
            rows = pl.ds(pl.multiple_of(start + step * DEPTH, EIGHT), DEPTH)
            plgpu.copy_gmem_to_smem(
                x_td.at[rows, pl.ds(first_d, GROUPS * ROWS)], xs.at[stage], ready.at[stage]
            )
            plgpu.copy_gmem_to_smem(dy_tf.at[rows, pl.ds(first_f, wide)], dys.at[stage], ready.at[stage])

        load_stages(load, steps, STAGES, free)

    @pl.when(own < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        column = pl.multiple_of(own * ROWS, ROWS)

        def multiply(acc, stage, step):
            x = xs.at[stage, :, pl.ds(column, ROWS)]
            at = start + step * DEPTH

            @pl.when((at < first) | (at + DEPTH > end))
            def _():
                row = plgpu.broadcasted_iota(jnp.int32, (DEPTH, ROWS), 0, layout=plgpu.Layout.WGMMA) + at
                own_rows = (row >= first) & (row < end)
                x[...] = jnp.where(own_rows, plgpu.load(x, layout=plgpu.Layout.WGMMA), 0).astype(x.dtype)
                plgpu.commit_smem()

            plgpu.wgmma(acc, x.T, dys.at[stage])

        total = summed((ROWS, wide), multiply, steps, STAGES, ready, free)
        for at in range(0, wide, ROWS):
            dws[own] = total[:, at : at + ROWS].astype(dws.dtype)
            plgpu.commit_smem()
            rows, columns = pl.ds(first_d + column, ROWS), pl.ds(first_f + at, ROWS)
            plgpu.copy_smem_to_gmem(dws.at[own], dw_edf.at[group, rows, columns])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.wait_smem_to_gmem(0)
