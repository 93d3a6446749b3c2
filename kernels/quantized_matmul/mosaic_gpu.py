"""Hopper: weights stay in few bits up to the registers of the tensor cores.

The product is turned around, `y^T = w x^T`: weights are the operand that `wgmma` takes from registers, 64 outputs a
warpgroup, so that few tokens waste nothing. Three warpgroups a block, and what each does over time:

    loads      |w0 x0 s0|w1 x1 s1|w2 x2 s2|w3 x3 s3|  wait: a stage is free  |w4 x4 s4| ...
    outputs 0  |        |wait|values -> bf16|wgmma|scale, add|values -> bf16|wgmma|scale, add| ...
    outputs 1  |        |wait|values -> bf16|wgmma|scale, add|values -> bf16|wgmma|scale, add| ...

A stage is 128 inputs of 128 outputs. Weights are widened where they lie, without moving between threads; for that x
has its inputs in another order (`hopper_widen`). Each group's sum is scaled after its product, in float32: no weight is
rounded again. What a stage held is in registers before it is given back, so that the barrier alone orders its reading
and the next loading. Where there are too few blocks for the chip, several share the inputs of a tile and their sums are
added after. With few tokens two blocks share a multiprocessor, so that memory has eight stages to fetch and is not
waited for where a block begins.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from maxstack.kernels import tiles
from maxstack.kernels.hopper_stages import load_stages
from maxstack.kernels.hopper_widen import ordered, widened
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

ROWS, GROUPS = 64, 2
"""Outputs of a warpgroup, and warpgroups that multiply."""
INPUTS = 128
"""Of a stage."""
STAGES = 4
FEWEST_TOKENS, MOST_TOKENS = 8, 64
"""Of a tile."""
WORTH_TOKENS = 512
"""Beyond, a matrix in bfloat16 made once and multiplied by XLA's own product is the better form."""
BLOCKS = 2 * 132
"""As many as keep an H100 or H200 busy: two for each multiprocessor."""
REGISTERS = 232
LEAN_TOKENS = 16
"""Up to so many in a tile sums take few registers, and several blocks share a multiprocessor: one begins and ends while
another computes."""


def declined(x_tk: Array, w: QuantizedWeight) -> str | None:
    """Why the kernel cannot serve a call; None: it can."""
    if w.values.dtype == jnp.uint8:
        return "int4 lies two in a byte: keep the weight as int4, `stored(w, 'int4')`"
    if x_tk.dtype != jnp.bfloat16:
        return f"x is {x_tk.dtype}; it takes bfloat16"
    if w.inputs % INPUTS or w.outputs % (ROWS * GROUPS):
        return f"w is {w.shape}; it takes multiples of {INPUTS} inputs and {ROWS * GROUPS} outputs"
    if w.group != w.inputs and w.group not in (32, INPUTS):
        return f"groups of {w.group}; it takes 32, {INPUTS} or all inputs"
    return None


def worth(tokens: int) -> str | None:
    """Why another form is likely better, though the kernel can serve the call."""
    return (
        None
        if tokens <= WORTH_TOKENS
        else f"{tokens} tokens: beyond {WORTH_TOKENS} a matrix made once is better"
    )


def splits_for(steps: int, blocks: int) -> int:
    """In how many parts the inputs are cut: the fewest that fill the chip, each of the same number of steps."""
    wanted = min(steps, -(-BLOCKS // blocks))
    return next(parts for parts in range(wanted, steps + 1) if steps % parts == 0)


def quantized_matmul(
    x_tk: Float[Array, "t k"], w: QuantizedWeight, *, splits: int | None = None, through_memory: bool = False
) -> Float[Array, "t n"]:
    """`x w^T` in float32. `through_memory` takes the weights to `wgmma` by way of shared memory, for the interpreter,
    which knows no operands in registers; nothing else differs."""
    tokens = x_tk.shape[0]
    size = min(MOST_TOKENS, max(FEWEST_TOKENS, 1 << (tokens - 1).bit_length()))
    x_tk = jnp.pad(x_tk, ((0, -tokens % size), (0, 0)))
    blocks = x_tk.shape[0] // size * (w.outputs // (ROWS * GROUPS))
    splits = splits or _usual_splits(x_tk.shape[0], w, blocks)
    y_pnt = run(ordered(x_tk, w.bits), w, size, splits, through_memory)
    y_tn = jnp.sum(y_pnt, 0)[:, :tokens].T
    if w.group == w.inputs:
        return y_tn * w.scale
    if w.zero is None:
        return y_tn
    sums_tg = x_tk[:tokens].astype(jnp.float32).reshape(tokens, -1, w.group).sum(-1)
    offset_gn = w.scale.astype(jnp.float32) * w.zero.astype(jnp.float32)
    return y_tn - jnp.dot(sums_tg, offset_gn, precision=jax.lax.Precision.HIGHEST)


def _usual_splits(tokens: int, w: QuantizedWeight, blocks: int) -> int:
    """What the tables have, else `splits_for`."""
    steps = w.inputs // INPUTS
    shape = {"t": tokens, "n": w.outputs, "k": w.inputs, "g": w.group}
    axes = {"splits": tuple(parts for parts in (1, 2, 3, 4, 6, 8, 12, 16) if steps % parts == 0)}

    def fault(sizes: tiles.Sizes) -> str | None:
        uneven = steps % sizes["splits"]
        return f"{steps} steps of inputs do not part into {sizes['splits']}" if uneven else None

    name, rule = f"quantized_matmul.mosaic_gpu.int{w.bits}", {"splits": splits_for(steps, blocks)}
    return tiles.chosen(name, "bfloat16", shape, rule, axes=axes, fault=fault)["splits"]


def run(x_tk: Array, w: QuantizedWeight, size: int, splits: int, through_memory: bool) -> Array:
    """Sums [part, n, t] over each part of the inputs, which x has in the order of the widened weights. Of a stack of
    weights the layer's is read where it lies."""
    steps = w.inputs // INPUTS // splits
    stacked = w.layer is not None
    values_lnk = w.values if stacked else w.values[None]
    layer = jnp.reshape(jnp.asarray(w.layer if stacked else 0, jnp.int32), (1,))
    stages = min(STAGES, steps)
    grouped = w.group != w.inputs
    each = INPUTS // w.group if grouped else 1
    scales = w.scale.reshape(-1, each, w.outputs) if grouped else jnp.zeros((1, 1, 8), jnp.bfloat16)
    body = functools.partial(block, size=size, steps=steps, stages=stages, each=each, grouped=grouped)
    swizzle = INPUTS * w.bits // 8
    w_transforms = (plgpu.TilingTransform((8, swizzle * 8 // w.bits)), plgpu.SwizzleTransform(swizzle))
    # A product takes whole swizzled rows: those of a group of 32 have 64 bytes.
    row = min(64, INPUTS // each)
    bf16 = (plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(2 * row))
    scratch = {
        "ws": plgpu.SMEM((stages, GROUPS * ROWS, INPUTS), w.values.dtype, transforms=w_transforms),
        "xs": plgpu.SMEM((stages, size, INPUTS), jnp.bfloat16, transforms=bf16),
        "ss": plgpu.SMEM((stages, each, GROUPS * ROWS), scales.dtype),
        "ready": plgpu.Barrier(num_arrivals=3 if grouped else 2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    }
    if through_memory:
        scratch["wide"] = plgpu.SMEM((GROUPS, ROWS, INPUTS), jnp.bfloat16, transforms=bf16)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (splits, w.outputs, x_tk.shape[0]),
            jnp.float32,
            manual_axis_type=jax.typeof(x_tk).manual_axis_type,
        ),
        grid=(w.outputs // (GROUPS * ROWS), x_tk.shape[0] // size, splits),
        grid_names=("n", "t", "p"),
        num_threads=GROUPS + 1,
        thread_name="warpgroup",
        kernel_name="quantized_matmul",
        scratch_types=scratch,
    )(layer, x_tk, values_lnk, scales)


def block(
    layer, x_tk, w_lnk, s_kgn, y_pnt, *, ws, xs, ss, ready, free, wide: Any = None, size, steps, stages, each, grouped
):  # fmt: skip
    """One block: GROUPS warpgroups multiply, the last one loads."""
    n, t, p = (jax.lax.axis_index(name) for name in "ntp")
    own = jax.lax.axis_index("warpgroup")
    first, lend = p * steps, size > LEAN_TOKENS

    @pl.when(own == GROUPS)
    def _():
        mine = layer[0]

        def load(step, stage):
            at, outputs = (first + step) * INPUTS, pl.ds(n * GROUPS * ROWS, GROUPS * ROWS)
            plgpu.copy_gmem_to_smem(w_lnk.at[mine, outputs, pl.ds(at, INPUTS)], ws.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(
                x_tk.at[pl.ds(t * size, size), pl.ds(at, INPUTS)], xs.at[stage], ready.at[stage]
            )
            if grouped:
                plgpu.copy_gmem_to_smem(s_kgn.at[first + step, :, outputs], ss.at[stage], ready.at[stage])

        load_stages(load, steps, stages, free, lend=lend)

    @pl.when(own < GROUPS)
    def _():
        if lend:
            plgpu.set_max_registers(REGISTERS, action="increase")
        rows = pl.ds(own * ROWS, ROWS)
        total = plgpu.layout_cast(jnp.zeros((ROWS, size), jnp.float32), plgpu.Layout.WGMMA)

        def multiply(step, total):
            stage = jax.lax.rem(step, stages)
            plgpu.barrier_wait(ready.at[stage])
            scales = [scale_of(ss.at[stage, g, rows]) for g in range(each)] if grouped else []
            values = widened(ws.at[stage, rows], by_hand=wide is None)
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
        y_pnt[p, pl.ds(n * GROUPS * ROWS + own * ROWS, ROWS), pl.ds(t * size, size)] = total


def scale_of(ref) -> Array:
    """A scale for each output, where its sums lie."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)).astype(jnp.float32)
