"""Kernel of the keys' and values' gradients on Hopper. Timeline and terms: `mosaic_gpu`."""

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
    capped,
    in_eights,
    launch,
    log_factor,
    masked,
    product,
    shared,
    stream,
    weights_and_gradients,
    zeros,
)


def keys_gradients(
    options: Options, blocks: Blocks, q_btnh, k_bskh, v_bskw, dout_btnw, lse_bnt, delta_bnt, at: Coordinates
) -> tuple[jax.Array, jax.Array]:
    """Of keys [b,s,k,h] and values [b,s,k,w]; the tile is transposed, a key a row. `lse` and `delta` as for
    `queries_gradient`. The query heads of a kv head are summed in registers, one after another."""
    b, t, n, h = q_btnh.shape
    s, k, w = v_bskw.shape[1:]
    q_btnh, k_bskh, v_bskw, dout_btnw = (in_eights(x) for x in (q_btnh, k_bskh, v_bskw, dout_btnw))
    dtype, tokens, stages, split = q_btnh.dtype, blocks.dkv_query, blocks.stages, blocks.split_dkv
    members = 1 if split else COMPUTE
    tall = -(-s // (members * ROWS)) * members * ROWS
    seen = spans.pairs(at, options, t, s, tokens, ROWS).transposed()
    if options.causal or options.window is not None:
        # Indices are loaded too: computed, the compiler would keep those of every column in registers throughout.
        at = spans.with_indices(at, t, s)
    arrays = {"q": q_btnh, "k": k_bskh, "v": v_bskw, "dout": dout_btnw, "lse": lse_bnt, "delta": delta_bnt}
    inputs = spans.inputs(arrays, spans.spans(seen, members), at, tokens, members * ROWS)
    count, given = inputs.count, inputs.given
    heads = n // k
    widest = min(64, tokens) * 2

    def attention_dkv(
        of, dk, dv, k_s, v_s, q_s, dout_s, lse_s, delta_s, p_s, ids_s, own_ready, ready, free, done
    ):  # fmt: skip
        kv_head, group = lax.axis_index("head"), lax.axis_index("group")
        row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")
        span_row, id_row = inputs.span_row(row), inputs.id_row(row)
        begin, end = (of["span"][span_row, group, members, bound] for bound in (spans.FIRST, spans.LAST))

        steps = heads * (end - begin)

        def after(i):
            """The block of queries after block `i`: behind the last one the next head begins."""
            return jnp.where(i + 1 < end, i + 1, begin)

        def compute(member, sums_keys: bool, sums_values: bool):
            """Rows of `member`; of the sums of a split block the other warpgroup makes the other."""
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            whole, whole_end = (
                of["span"][span_row, group, member, x] for x in (spans.WHOLE, spans.WHOLE_END)
            )
            start = group * (members * ROWS) + member * ROWS
            own = pl.ds(start, ROWS)
            k_own, v_own = (k_s, v_s) if split else (k_s.at[member], v_s.at[member])

            def fetch():
                plgpu.copy_gmem_to_smem(of["k"].at[row, own, kv_head], k_own, own_ready.at[member])
                plgpu.copy_gmem_to_smem(of["v"].at[row, own, kv_head], v_own, own_ready.at[member])

            if sums_keys:  # once a block of keys
                fetch()
            kv_ids = [
                plgpu.load(of["kv_ids"].at[id_row, i, own], layout=ROW, optimized=False) for i in range(count)
            ]
            plgpu.barrier_wait(own_ready.at[member])

            def step(number, carry):
                i, sums = carry
                slot = lax.rem(number, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                spare = None if p_s is None else p_s.at[warpgroup]

                def spread(numbers):
                    return lax.broadcast_in_dim(
                        plgpu.load(numbers.at[slot], layout=COLUMN), (ROWS, tokens), [1]
                    )

                def hide(x):
                    def with_mask(x):
                        q_ids = [plgpu.load(ids_s.at[slot, c], layout=COLUMN) for c in range(count)]
                        sides = Side(i * tokens, 1, q_ids), Side(start, 0, kv_ids)
                        return masked(x, options, *sides, None, given, -jnp.inf)

                    return lax.cond((i < whole) | (i >= whole_end), with_mask, lambda x: x, x)

                logits = (k_own, q_s.at[slot].transpose((1, 0)))
                dweights = (v_own, dout_s.at[slot].transpose((1, 0)))
                if sums_keys:
                    p, ds = weights_and_gradients(
                        options, logits, dweights, spread(lse_s), spread(delta_s), hide, spare
                    )
                    # All of both is rounded before the next products begin, which frees the registers.
                    p, ds = lax.optimization_barrier((p.astype(dtype), ds.astype(dtype)))
                    lefts, rights = ((p, ds), (dout_s, q_s)) if sums_values else ((ds,), (q_s,))
                else:
                    x = hide(capped(product(*logits), options))
                    p = jnp.exp2(x * log_factor(options) - spread(lse_s))
                    lefts, rights = (p.astype(dtype),), (dout_s,)
                plgpu.commit_smem()  # numbers and ids were read before memory is moved over them
                sums = add_products(sums, lefts, tuple(right.at[slot] for right in rights), spare)
                plgpu.barrier_arrive(free.at[slot])
                return after(i), sums

            sums = ((zeros(ROWS, w),) if sums_values else ()) + ((zeros(ROWS, h),) if sums_keys else ())
            _, sums = lax.fori_loop(0, steps, step, (begin, sums))
            if (
                split
            ):  # the places of keys and values are free when neither warpgroup multiplies them any more
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)
            if sums_keys:
                k_own[...] = (sums[-1] * options.scale).astype(dtype)
            if sums_values:
                v_own[...] = sums[0].astype(dtype)
            plgpu.commit_smem()
            if sums_keys:
                plgpu.copy_smem_to_gmem(k_own, dk.at[row, own, kv_head])
            if sums_values:
                plgpu.copy_smem_to_gmem(v_own, dv.at[row, own, kv_head])
            plgpu.wait_smem_to_gmem(0)

        if split:
            pl.when(warpgroup == 0)(lambda: compute(0, sums_keys=False, sums_values=True))
            pl.when(warpgroup == 1)(lambda: compute(0, sums_keys=True, sums_values=False))
        else:
            pl.when(warpgroup < COMPUTE)(lambda: compute(warpgroup, sums_keys=True, sums_values=True))

        @pl.when(warpgroup == COMPUTE)
        def _move_memory():
            plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")

            def fetch(number, slot):
                head = kv_head * heads + lax.div(number, end - begin)
                i = begin + lax.rem(number, end - begin)
                block = pl.ds(i * tokens, tokens)
                for source, place in ((of["q"], q_s), (of["dout"], dout_s)):
                    plgpu.copy_gmem_to_smem(source.at[row, block, head], place.at[slot], ready.at[slot])
                for source, place in ((of["lse"], lse_s), (of["delta"], delta_s)):
                    plgpu.copy_gmem_to_smem(source.at[row, head, block], place.at[slot], ready.at[slot])
                for c in range(count):
                    q_ids = of["q_ids"].at[id_row, c, block]
                    plgpu.copy_gmem_to_smem(q_ids, ids_s.at[slot, c], ready.at[slot])

            stream(jnp.int32(0), steps, stages, free, fetch)

    scratch = {
        "k_s": shared((ROWS, h) if split else (COMPUTE, ROWS, h), dtype, widest),
        "v_s": shared((ROWS, w) if split else (COMPUTE, ROWS, w), dtype, widest),
        "q_s": shared((stages, tokens, h), dtype, widest),
        "dout_s": shared((stages, tokens, w), dtype, widest),
        "lse_s": plgpu.SMEM((stages, tokens), jnp.float32),
        "delta_s": plgpu.SMEM((stages, tokens), jnp.float32),
        "p_s": shared((COMPUTE, ROWS, tokens), dtype) if blocks.through_shared else None,
        "ids_s": plgpu.SMEM((stages, count, tokens), jnp.int32) if count else None,
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=members),
        "ready": plgpu.Barrier(num_arrivals=4 + count, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
        "done": plgpu.Barrier(num_arrivals=COMPUTE) if split else None,
    }
    outputs = (jax.ShapeDtypeStruct((b, tall, k, h), dtype), jax.ShapeDtypeStruct((b, tall, k, w), dtype))
    dk, dv = launch(attention_dkv, inputs.of, outputs, scratch, (k, tall // (members * ROWS), b))
    return dk[:, :s], dv[:, :s]
