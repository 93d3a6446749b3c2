"""Forward kernel of attention on Hopper. Timeline and terms: `mosaic_gpu`."""

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
    LOG2E,
    LOW,
    MEMORY_REGISTERS,
    ROW,
    ROWS,
    Blocks,
    Side,
    across,
    add_products,
    capped,
    in_eights,
    launch,
    log_factor,
    masked,
    row_of,
    shared,
    zeros,
)


def forward(options: Options, blocks: Blocks, q_btnh, k_bskh, v_bskw, sinks_n, at: Coordinates):
    """(output [b,t,n,w] in the dtype of the queries, log-sum-exp [b,n,T] in float32); T is t up to whole blocks."""
    b, t, n, h = q_btnh.shape
    s, k, w = v_bskw.shape[1:]
    q_btnh, k_bskh, v_bskw = (in_eights(x) for x in (q_btnh, k_bskh, v_bskw))
    dtype, keys, stages = q_btnh.dtype, blocks.forward_key, blocks.stages
    tall = -(-t // (COMPUTE * ROWS)) * COMPUTE * ROWS
    # The part of the queries that is as large as the values gives its place to the output in the end.
    sizes = [w, h - w] if h > w else [w]
    parts = [pl.ds(w * i, size) for i, size in enumerate(sizes)]
    reaches_beyond = s if s % keys else None
    span = spans.spans(spans.pairs(at, options, t, s, ROWS, keys), COMPUTE)
    arrays = {"q": q_btnh, "k": k_bskh, "v": v_bskw}
    if sinks_n is not None:
        arrays["sinks"] = sinks_n.astype(jnp.float32)
    inputs = spans.inputs(arrays, span, at, COMPUTE * ROWS, keys)
    count, given = inputs.count, inputs.given

    def attention_forward(
        of, out, lse, q_parts, k_s, v_s, lse_s, p_s, ids_s, q_ready, k_ready, v_ready, k_free, v_free, turn
    ):
        head, row, warpgroup = lax.axis_index("head"), lax.axis_index("row"), lax.axis_index("warpgroup")
        # The programs that start last should be short: under a causal mask late queries see most keys.
        group = tall // (COMPUTE * ROWS) - 1 - lax.axis_index("group")
        kv_head = lax.div(head, jnp.int32(n // k))
        span_row, id_row = inputs.span_row(row), inputs.id_row(row)
        begin, end = (of["span"][span_row, group, COMPUTE, bound] for bound in (spans.FIRST, spans.LAST))

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            first, whole, whole_end, last = (of["span"][span_row, group, warpgroup, x] for x in range(4))
            start = group * (COMPUTE * ROWS) + warpgroup * ROWS
            queries = pl.ds(start, ROWS)
            for part, place in zip(parts, q_parts, strict=True):
                source = of["q"].at[row, queries, head, part]
                plgpu.copy_gmem_to_smem(source, place.at[warpgroup], q_ready.at[warpgroup])
            q_ids = [
                plgpu.load(of["q_ids"].at[id_row, i, queries], layout=ROW, optimized=False)
                for i in range(count)
            ]
            if sinks_n is None:
                top, total = row_of(LOW), row_of(0.0)
            else:  # a sink is a first logit without a value
                sink = of["sinks"][head] * LOG2E
                top = row_of(jnp.maximum(sink, LOW))
                total = jnp.exp2(row_of(sink) - top)
            plgpu.barrier_wait(q_ready.at[warpgroup])

            def step(i, carry):
                acc, top, total = carry
                slot = lax.rem(i - begin, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply(held):
                    for part, place in zip(parts, q_parts, strict=True):
                        plgpu.wgmma(held, place.at[warpgroup], k_s.at[slot, :, part].transpose((1, 0)))
                    take_turns()
                    return held[...]

                x = pl.run_scoped(multiply, plgpu.ACC((ROWS, keys), jnp.float32))
                if not count:
                    plgpu.barrier_arrive(k_free.at[slot])
                x, factor = capped(x, options), log_factor(options)

                def with_mask(x):
                    kv_ids = [plgpu.load(ids_s.at[slot, c], layout=COLUMN) for c in range(count)]
                    if count:
                        plgpu.commit_smem()  # they are read before memory is moved over them
                    sides = Side(start, 0, q_ids), Side(i * keys, 1, kv_ids)
                    return masked(x, options, *sides, reaches_beyond, given, -jnp.inf)

                x = lax.cond((i < whole) | (i >= whole_end), with_mask, lambda x: x, x)
                if count:
                    plgpu.barrier_arrive(k_free.at[slot])
                new_top = jnp.maximum(top, x.max(axis=1) * factor)
                shrink = jnp.exp2(top - new_top)
                p = jnp.exp2(x * factor - across(new_top, x))
                total = total * shrink + p.sum(axis=1)
                acc = acc * across(shrink, acc)
                p = p.astype(dtype)
                # Without this the compiler may move the softmax behind the barrier, into the other's turn.
                acc, total, new_top, p = lax.optimization_barrier((acc, total, new_top, p))
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)
                spare = None if p_s is None else p_s.at[warpgroup]
                (acc,) = add_products((acc,), (p,), (v_s.at[slot],), spare)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new_top, total

            def pass_by(i, _):
                """The other warpgroup needs this block; each barrier must still be passed once a step."""
                slot = lax.rem(i - begin, jnp.int32(stages))
                plgpu.barrier_wait(k_ready.at[slot])
                take_turns()
                plgpu.barrier_arrive(k_free.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])
                take_turns()
                plgpu.barrier_arrive(v_free.at[slot])

            pl.when(warpgroup == 1)(take_turns)
            lax.fori_loop(begin, first, pass_by, None)
            acc, top, total = lax.fori_loop(first, last, step, (zeros(ROWS, w), top, total))
            lax.fori_loop(last, end, pass_by, None)
            pl.when(warpgroup == 0)(take_turns)

            seen = total > 0
            inverse = jnp.where(seen, 1 / jnp.where(seen, total, 1.0), 0.0)
            lse_s.at[warpgroup][...] = jnp.where(
                seen, (top + jnp.log2(jnp.where(seen, total, 1.0))) * (1 / LOG2E), -jnp.inf
            )
            # The queries have been multiplied for the last time: their place takes the output.
            place = q_parts[0].at[warpgroup]
            place[...] = (acc * across(inverse, acc)).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, out.at[row, queries, head])
            plgpu.copy_smem_to_gmem(lse_s.at[warpgroup], lse.at[row, head, queries])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == COMPUTE)
        def _move_memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def load(i, _):
                slot = lax.rem(i - begin, jnp.int32(stages))
                block = pl.ds(i * keys, keys)
                reused = i - begin >= stages
                pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(of["k"].at[row, block, kv_head], k_s.at[slot], k_ready.at[slot])
                for c in range(count):
                    kv_ids = of["kv_ids"].at[id_row, c, block]
                    plgpu.copy_gmem_to_smem(kv_ids, ids_s.at[slot, c], k_ready.at[slot])
                pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                plgpu.copy_gmem_to_smem(of["v"].at[row, block, kv_head], v_s.at[slot], v_ready.at[slot])

            def drain(i, _):
                slot = lax.rem(i - begin, jnp.int32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            lax.fori_loop(begin, end, load, None)
            lax.fori_loop(jnp.maximum(end - stages, begin), end, drain, None)

    scratch = {
        "q_parts": [shared((COMPUTE, ROWS, size), dtype) for size in sizes],
        "k_s": shared((stages, keys, h), dtype),
        "v_s": shared((stages, keys, w), dtype),
        "lse_s": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "p_s": shared((COMPUTE, ROWS, keys), dtype) if blocks.through_shared else None,
        "ids_s": plgpu.SMEM((stages, count, keys), jnp.int32) if count else None,
        "q_ready": plgpu.Barrier(num_arrivals=len(parts), num_barriers=COMPUTE),
        "k_ready": plgpu.Barrier(num_arrivals=1 + count, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
    }
    outputs = (
        jax.ShapeDtypeStruct((b, tall, n, w), dtype),
        jax.ShapeDtypeStruct((b, n, tall), jnp.float32),
    )
    out, lse = launch(attention_forward, inputs.of, outputs, scratch, (n, tall // (COMPUTE * ROWS), b))
    return out[:, :t], lse
