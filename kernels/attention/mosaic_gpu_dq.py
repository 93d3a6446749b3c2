"""Kernel of the queries' gradient on Hopper. Timeline and terms: `mosaic_gpu`."""

# One body of a kernel and its scratch: in parts it would be longer.
# ruff: noqa: C901, PLR0915

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from maxstack.kernels.attention import mosaic_gpu_spans as spans
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.attention.mosaic_gpu_tile import (
    COLUMN,
    COMPUTE,
    COMPUTE_REGISTERS,
    MEMORY_REGISTERS,
    ROW,
    ROWS,
    Blocks,
    Side,
    add_products,
    in_eights,
    launch,
    masked,
    shared,
    stream,
    weights_and_gradients,
    zeros,
)


def queries_gradient(
    options: Options, blocks: Blocks, q_btnh, k_bskh, v_bskw, dout_btnw, lse_bnt, delta_bnt, at: Coordinates
) -> jax.Array:
    """[b,t,n,h]. `lse` is in powers of two, 1e30 for a query that saw nothing, and, as `delta`, filled up to whole
    blocks of queries."""
    b, t, n, h = q_btnh.shape
    s, k, w = v_bskw.shape[1:]
    q_btnh, k_bskh, v_bskw, dout_btnw = (in_eights(x) for x in (q_btnh, k_bskh, v_bskw, dout_btnw))
    dtype, keys, stages = q_btnh.dtype, blocks.dq_key, blocks.stages
    tall = -(-t // (COMPUTE * ROWS)) * COMPUTE * ROWS
    span = spans.spans(spans.pairs(at, options, t, s, ROWS, keys), COMPUTE)
    if options.causal or options.window is not None:
        # Indices are loaded too: computed, the compiler would keep those of every column in registers throughout.
        at = spans.with_indices(at, t, s)
    arrays = {"q": q_btnh, "k": k_bskh, "v": v_bskw, "dout": dout_btnw, "lse": lse_bnt, "delta": delta_bnt}
    inputs = spans.inputs(arrays, span, at, COMPUTE * ROWS, keys)
    count, given = inputs.count, inputs.given
    reaches_beyond = s if s % keys else None
    widest = min(64, keys) * 2

    def attention_dq(of, dq, q_s, dout_s, k_s, v_s, ds_s, q_ids_s, ids_s, own_ready, ready, free):
        head, row, warpgroup = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("warpgroup")
        group = tall // (COMPUTE * ROWS) - 1 - lax.axis_index("group")
        kv_head = lax.div(head, jnp.int32(n // k))
        span_row, id_row = inputs.span_row(row), inputs.id_row(row)
        begin, end = (of["span"][span_row, group, COMPUTE, bound] for bound in (spans.FIRST, spans.LAST))

        @pl.when(warpgroup < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first, whole, whole_end, last = (of["span"][span_row, group, warpgroup, x] for x in range(4))
            start = group * (COMPUTE * ROWS) + warpgroup * ROWS
            queries = pl.ds(start, ROWS)
            arrived = own_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(of["q"].at[row, queries, head], q_s.at[warpgroup], arrived)
            plgpu.copy_gmem_to_smem(of["dout"].at[row, queries, head], dout_s.at[warpgroup], arrived)
            lse, delta = (
                plgpu.load(of[name].at[row, head, queries], layout=ROW, optimized=False)
                for name in ("lse", "delta")
            )
            for i in range(
                count
            ):  # they stay in shared memory: only blocks with a mask need them in registers
                plgpu.copy_gmem_to_smem(of["q_ids"].at[id_row, i, queries], q_ids_s.at[warpgroup, i], arrived)
            plgpu.barrier_wait(arrived)

            def step(i, acc):
                slot = lax.rem(i - begin, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])

                def hide(x):
                    def with_mask(x):
                        q_ids = [plgpu.load(q_ids_s.at[warpgroup, c], layout=ROW) for c in range(count)]
                        kv_ids = [plgpu.load(ids_s.at[slot, c], layout=COLUMN) for c in range(count)]
                        if count:
                            plgpu.commit_smem()  # they are read before memory is moved over them
                        sides = Side(start, 0, q_ids), Side(i * keys, 1, kv_ids)
                        return masked(x, options, *sides, reaches_beyond, given, -jnp.inf)

                    return lax.cond((i < whole) | (i >= whole_end), with_mask, lambda x: x, x)

                spare = None if ds_s is None else ds_s.at[warpgroup]
                logits = (q_s.at[warpgroup], k_s.at[slot].transpose((1, 0)))
                dweights = (dout_s.at[warpgroup], v_s.at[slot].transpose((1, 0)))
                lse_tile, delta_tile = (lax.broadcast_in_dim(x, (ROWS, keys), [0]) for x in (lse, delta))
                _, ds = weights_and_gradients(options, logits, dweights, lse_tile, delta_tile, hide, spare)
                (acc,) = add_products((acc,), (ds.astype(dtype),), (k_s.at[slot],), spare)
                plgpu.barrier_arrive(free.at[slot])
                return acc

            def pass_by(i, _):
                slot = lax.rem(i - begin, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                plgpu.barrier_arrive(free.at[slot])

            lax.fori_loop(begin, first, pass_by, None)
            acc = lax.fori_loop(first, last, step, zeros(ROWS, h))
            lax.fori_loop(last, end, pass_by, None)
            q_s.at[warpgroup][...] = (acc * options.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[warpgroup], dq.at[row, queries, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def _move_memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def fetch(i, slot):
                block = pl.ds(i * keys, keys)
                for source, place in ((of["k"], k_s), (of["v"], v_s)):
                    plgpu.copy_gmem_to_smem(source.at[row, block, kv_head], place.at[slot], ready.at[slot])
                for c in range(count):
                    kv_ids = of["kv_ids"].at[id_row, c, block]
                    plgpu.copy_gmem_to_smem(kv_ids, ids_s.at[slot, c], ready.at[slot])

            stream(begin, end, stages, free, fetch)

    scratch = {
        "q_s": shared((COMPUTE, ROWS, h), dtype, widest),
        "dout_s": shared((COMPUTE, ROWS, w), dtype, widest),
        "k_s": shared((stages, keys, h), dtype, widest),
        "v_s": shared((stages, keys, w), dtype, widest),
        "ds_s": shared((COMPUTE, ROWS, keys), dtype) if blocks.through_shared else None,
        "q_ids_s": plgpu.SMEM((COMPUTE, count, ROWS), jnp.int32) if count else None,
        "ids_s": plgpu.SMEM((stages, count, keys), jnp.int32) if count else None,
        "own_ready": plgpu.Barrier(num_arrivals=2 + count, num_barriers=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=2 + count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    }
    outputs = (jax.ShapeDtypeStruct((b, tall, n, h), dtype),)
    (dq,) = launch(attention_dq, inputs.of, outputs, scratch, (n, tall // (COMPUTE * ROWS), b))
    return dq[:, :t]
