"""Hopper, weights of 8 or 4 bits: the product of `quantized_matmul`, with the matrix of a group and its rows.

`y^T = w x^T`: weights are the operand that `wgmma` takes from registers, 64 outputs a warpgroup; the rows are its
columns, so that groups of few rows waste little. The timeline is that of `quantized_matmul.mosaic_gpu`; tiles of rows
begin where groups do, and sums go to shared memory turned around, from where the group's rows of a tile are stored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul.mosaic_gpu_tile import store_rows
from maxstack.kernels.grouped_matmul.visits import EIGHT, own_tiles
from maxstack.kernels.hopper_stages import load_stages
from maxstack.kernels.hopper_widen import ordered, widened
from maxstack.kernels.quantized_matmul.mosaic_gpu import (
    GROUPS,
    INPUTS,
    LEAN_TOKENS,
    REGISTERS,
    ROWS,
    STAGES,
    scale_of,
)
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

FEWEST_ROWS, MOST_ROWS = 16, 64
"""Of a tile."""
WORTH_ROWS = 256
"""Groups of more rows than this (the mean) multiply a matrix in bfloat16 that is made once."""


def rows(
    x_td: Float[Array, "t d"], w: QuantizedWeight, group_sizes_e: Int[Array, "e"],
    *, first: Int[Array, ""] | None = None, through_memory: bool = False,
) -> Float[Array, "t f"]:  # fmt: skip
    """Each row times the matrix of its group; rows of no group give 0. With `first` there are more matrices, and it is
    the number of group 0's. `through_memory` takes the weights to `wgmma`
    by way of shared memory, for the interpreter, which knows no operands in registers; nothing else differs."""
    count, groups = x_td.shape[0], len(group_sizes_e)
    mean = -(-count // groups)
    # A group may begin up to seven rows behind its tile.
    size = min(MOST_ROWS, max(FEWEST_ROWS, 1 << (mean + EIGHT - 2).bit_length()))
    spans = own_tiles(group_sizes_e, count, size)
    if first is not None:
        spans = spans._replace(group_v=spans.group_v + first)
    x_td = ordered(jnp.pad(x_td, ((0, -count % 8), (0, 0))), w.bits)
    steps = w.inputs // INPUTS
    stages = min(STAGES, steps)
    grouped = w.group != w.inputs
    each = INPUTS // w.group if grouped else 1
    scales = w.scale.reshape(w.shape[0], -1, each, w.outputs)
    body = functools.partial(_block, size=size, steps=steps, stages=stages, each=each, grouped=grouped)
    swizzle = INPUTS * w.bits // 8
    w_transforms = (plgpu.TilingTransform((8, swizzle * 8 // w.bits)), plgpu.SwizzleTransform(swizzle))
    # A product takes whole swizzled rows: those of a group of 32 have 64 bytes.
    row = min(64, INPUTS // each)
    bf16 = (plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(2 * row))
    scratch: dict[str, Any] = {
        "ws": plgpu.SMEM((stages, GROUPS * ROWS, INPUTS), w.values.dtype, transforms=w_transforms),
        "xs": plgpu.SMEM((stages, size, INPUTS), jnp.bfloat16, transforms=bf16),
        "ss": plgpu.SMEM((stages, each, GROUPS * ROWS), scales.dtype) if grouped else None,
        "ys": plgpu.SMEM((GROUPS, size, ROWS), x_td.dtype),
        "ready": plgpu.Barrier(num_arrivals=3 if grouped else 2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    }
    if through_memory:
        scratch["wide"] = plgpu.SMEM((GROUPS, ROWS, INPUTS), jnp.bfloat16, transforms=bf16)
    y_tf = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (x_td.shape[0], w.outputs), x_td.dtype, manual_axis_type=jax.typeof(x_td).manual_axis_type
        ),
        grid=(w.outputs // (GROUPS * ROWS), len(spans.group_v)),
        grid_names=("n", "v"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        kernel_name="grouped_matmul_quantized",
    )(*spans[:4], spans.real_v.astype(jnp.int32), x_td, w.values, scales)
    return y_tf[:count]


def _block(
    group_v, start_v, first_v, end_v, real_v, x_td, w_efd, s_ekgf, y_tf,
    *, ws, xs, ss, ys, ready, free, wide: Any = None, size, steps, stages, each, grouped,
):  # fmt: skip
    """One block: GROUPS warpgroups multiply, the last one loads."""
    n, v, own = (jax.lax.axis_index(name) for name in ("n", "v", "warpgroup"))
    group, start, first, end = group_v[v], pl.multiple_of(start_v[v], EIGHT), first_v[v], end_v[v]
    steps = jnp.where((real_v[v] == 1) & (end > first), steps, 0)

    @pl.when(own == GROUPS)
    def _():
        outputs = pl.ds(n * GROUPS * ROWS, GROUPS * ROWS)

        def load(step, stage):
            inputs = pl.ds(step * INPUTS, INPUTS)
            plgpu.copy_gmem_to_smem(w_efd.at[group, outputs, inputs], ws.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(x_td.at[pl.ds(start, size), inputs], xs.at[stage], ready.at[stage])
            if grouped:
                plgpu.copy_gmem_to_smem(s_ekgf.at[group, step, :, outputs], ss.at[stage], ready.at[stage])

        load_stages(load, steps, stages, free, lend=size > LEAN_TOKENS)

    @pl.when(own < GROUPS)
    def _():
        if size > LEAN_TOKENS:
            plgpu.set_max_registers(REGISTERS, action="increase")
        mine = pl.ds(pl.multiple_of(own * ROWS, ROWS), ROWS)
        total = plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA)

        def multiply(step, total):
            stage = jax.lax.rem(step, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])
            scales = [scale_of(ss.at[stage, g, mine]) for g in range(each)] if grouped else []
            values = widened(ws.at[stage, mine], by_hand=wide is None)
            if wide is not None:
                wide[own] = values
                plgpu.commit_smem()
            for g in range(each):
                inputs = slice(g * (INPUTS // each), (g + 1) * (INPUTS // each))
                part = values[:, inputs] if wide is None else wide.at[own, :, inputs]

                def sums(acc, part=part, inputs=inputs):
                    plgpu.wgmma(acc, part, xs.at[stage, :, inputs].T)
                    return acc[...]

                part = pl.run_scoped(sums, plgpu.ACC((ROWS, size), jnp.float32))
                if grouped:
                    part = part * jax.lax.broadcast_in_dim(scales[g], part.shape, [0])
                total = total + part
            plgpu.barrier_arrive(free.at[stage])
            return total

        total = jax.lax.fori_loop(0, steps, multiply, total)
        outputs = pl.ds(n * GROUPS * ROWS + own * ROWS, ROWS)
        if not grouped:
            scale = plgpu.load(
                s_ekgf.at[group, 0, 0, outputs], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            total = total * jax.lax.broadcast_in_dim(scale, total.shape, [0])
        turned = ys.at[own].T
        turned[...] = total.astype(ys.dtype)
        plgpu.commit_smem()
        store_rows(ys.at[own], lambda at: y_tf.at[at, outputs], start, first, end)
        plgpu.wait_smem_to_gmem(0)
