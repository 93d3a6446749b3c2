"""Hopper, both sides in int8: the tensor cores multiply and sum in int32, exactly.

Both operands have their inputs minor, so that either may be the left one. Up to LEFT_TOKENS tokens that is the weight
(64 outputs a warpgroup, few tokens waste nothing) and the result comes turned around; beyond, it is x, and the result
comes as it is wanted, already scaled. Three warpgroups a block:

    loads   |a0 b0|a1 b1|a2 b2|a3 b3|  wait: a stage is free  |a4 b4| ...
    rows 0  |     |wait|wgmma 0|wait|wgmma 1, give back 0|wait|wgmma 2, give back 1| ...  |scale, write|
    rows 1  |     |wait|wgmma 0|wait|wgmma 1, give back 0|wait|wgmma 2, give back 1| ...  |scale, write|

A stage is 128 inputs. One product is in flight while the next stage is waited for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int8

from maxstack.kernels.hopper_stages import load_stages
from maxstack.kernels.quantized_matmul.mosaic_gpu import (
    BLOCKS,
    GROUPS,
    INPUTS,
    REGISTERS,
    ROWS,
    STAGES,
    splits_for,
)
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

LEFT_TOKENS = 64
"""Up to so many tokens the weight is the left operand."""
FEWEST_COLUMNS, MOST_COLUMNS = 8, 256
"""Of a tile: what one `wgmma` takes."""
TILE_ROWS = ROWS * GROUPS


def declined(x_tk: Array, w: QuantizedWeight) -> str | None:
    """Why the kernel cannot serve a call; None: it can."""
    if w.inputs % INPUTS or w.outputs % TILE_ROWS:
        return f"w is {w.shape}; it takes multiples of {INPUTS} inputs and {TILE_ROWS} outputs"
    return None


def int8_product(
    q_tk: Int8[Array, "t k"], scale_t: Float32[Array, "t"], w: QuantizedWeight, dtype: jnp.dtype
) -> Float[Array, "t n"]:
    """`x w^T` with x in int8 and one scale a token."""
    tokens, scale_n = q_tk.shape[0], w.scale[0]
    if tokens <= LEFT_TOKENS:
        columns = max(FEWEST_COLUMNS, 1 << (tokens - 1).bit_length())
        q_tk = jnp.pad(q_tk, ((0, columns - tokens), (0, 0)))
        scale_t = jnp.pad(scale_t, (0, columns - tokens))
        return run(w.values, q_tk, scale_n, scale_t, columns, dtype)[:, :tokens].T
    short = -tokens % TILE_ROWS
    q_tk, scale_t = jnp.pad(q_tk, ((0, short), (0, 0))), jnp.pad(scale_t, (0, short))
    return run(q_tk, w.values, scale_t, scale_n, columns_for(q_tk.shape[0], w.outputs), dtype)[:tokens]


def columns_for(tokens: int, outputs: int) -> int:
    """Outputs of a tile: the most that divide them and leave a block for every multiprocessor."""
    wide = outputs % MOST_COLUMNS == 0 and tokens // TILE_ROWS * (outputs // MOST_COLUMNS) >= BLOCKS // 2
    return MOST_COLUMNS if wide else MOST_COLUMNS // 2


def run(
    a_mk: Array, b_nk: Array, scale_m: Array, scale_n: Array, columns: int, dtype: jnp.dtype,
    splits: int | None = None,
) -> Array:  # fmt: skip
    """`a b^T`, rows and columns scaled, [m, n] in `dtype`. Splits share the inputs of a tile."""
    (m, inputs), n = a_mk.shape, b_nk.shape[0]
    blocks, steps = m // TILE_ROWS * (n // columns), inputs // INPUTS
    splits = splits or (1 if 2 * blocks > BLOCKS else splits_for(steps, blocks))
    steps //= splits
    stages = min(STAGES, steps)
    bytes_ = (plgpu.TilingTransform((8, INPUTS)), plgpu.SwizzleTransform(INPUTS))
    body = functools.partial(block, columns=columns, steps=steps, stages=stages, scaled=splits == 1)
    y_pmn = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (splits, m, n),
            dtype if splits == 1 else jnp.int32,
            manual_axis_type=jax.typeof(a_mk).manual_axis_type,
        ),
        grid=(m // TILE_ROWS, n // columns, splits),
        grid_names=("m", "n", "p"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name="quantized_matmul_int8",
        scratch_types={
            "a_s": plgpu.SMEM((stages, TILE_ROWS, INPUTS), jnp.int8, transforms=bytes_),
            "b_s": plgpu.SMEM((stages, columns, INPUTS), jnp.int8, transforms=bytes_),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
        },
    )(a_mk, b_nk, scale_m, scale_n)
    if splits == 1:
        return y_pmn[0]
    sums_mn = jnp.sum(y_pmn, 0).astype(jnp.float32)
    return (sums_mn * scale_m[:, None] * scale_n).astype(dtype)


def block(
    a_mk, b_nk, scale_m, scale_n, y_pmn, *, a_s, b_s, ready, free, columns: int, steps: int, stages: int, scaled: bool
):  # fmt: skip
    """One block: GROUPS warpgroups multiply, the last one loads."""
    m, n, p = (jax.lax.axis_index(name) for name in "mnp")
    own = jax.lax.axis_index("warpgroup")

    @pl.when(own == GROUPS)
    def _():
        def load(step, stage):
            inputs = pl.ds((p * steps + step) * INPUTS, INPUTS)
            rows = pl.ds(m * TILE_ROWS, TILE_ROWS)
            plgpu.copy_gmem_to_smem(a_mk.at[rows, inputs], a_s.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(
                b_nk.at[pl.ds(n * columns, columns), inputs], b_s.at[stage], ready.at[stage]
            )

        load_stages(load, steps, stages, free)

    @pl.when(own < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS, action="increase")
        own_rows = pl.ds(own * ROWS, ROWS)

        def sums(acc):
            def multiply(step, _):
                stage = jax.lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[stage])
                plgpu.wgmma(acc, a_s.at[stage, own_rows], b_s.at[stage].T)
                plgpu.wgmma_wait(1)

                # The product before this one is done: what it read may be overwritten.
                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(free.at[jax.lax.rem(step - 1, stages)])

                return ()

            jax.lax.fori_loop(0, steps, multiply, ())
            found = acc[...]  # waits for the last one
            plgpu.barrier_arrive(free.at[(steps - 1) % stages])
            return found

        total = pl.run_scoped(sums, plgpu.ACC((ROWS, columns), jnp.int32))
        rows, cols = pl.ds(m * TILE_ROWS + own * ROWS, ROWS), pl.ds(n * columns, columns)
        if scaled:
            # Once a block, and not through shared memory: no transfer that is worth arranging.
            row_scale = plgpu.load(scale_m.at[rows], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            column_scale = plgpu.load(scale_n.at[cols], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            total = total.astype(jnp.float32) * jax.lax.broadcast_in_dim(row_scale, total.shape, [0])
            total = total * jax.lax.broadcast_in_dim(column_scale, total.shape, [1])
        y_pmn[p, rows, cols] = total.astype(y_pmn.dtype)
