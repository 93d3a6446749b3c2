"""Attention on a TPU, forward: FlashAttention-2 (Dao 2023, arXiv:2307.08691) with keys down and queries across."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.attention.masks import Options
from maxstack.kernels.attention.mosaic_tpu_arrays import Ids, Place, Specs
from maxstack.kernels.attention.mosaic_tpu_tile import LOG2_E, each_chunk, logits, product, visible
from maxstack.kernels.attention.mosaic_tpu_tiling import Scalars


def by_queries(scalars: Scalars, b, head, i, step, ref) -> Place:
    """A step of a grid that walks query blocks and, for each, the key blocks that it sees.

    A step past the last of them has nothing to do, and already fetches the first keys of the next query block.
    """
    row, last = b, scalars.own_blocks - 1
    first, count = (scalars.read(ref, name, row, i) for name in ("first", "count"))
    following = scalars.read(ref, "first", row, jnp.where(i < last, i + 1, 0))
    return Place(
        b, head, jax.lax.div(head, scalars.tiling.parts), i, jnp.where(step < count, first + step, following)
    )


def forward(options: Options, scalars: Scalars, vmem_bytes: int, q, k, v_t, sinks, ids: Ids):
    """(out [.., w, rows] in the dtype of the queries, lse [.., 1, rows] float32) by queries, of q by queries, k and v_t
    by keys (v_t with keys last), sinks [blocks of heads, 1, rows] float32 or None. lse has the sink in it."""
    b, heads, q_blocks, rows, _ = q.shape
    w = v_t.shape[3]
    specs = Specs(scalars, partial(by_queries, scalars))
    sinks_spec = None if sinks is None else pl.BlockSpec((None, 1, rows), lambda b, head, *_: (head, 0, 0))
    out_shapes = [
        jax.ShapeDtypeStruct((b, heads, q_blocks, w, rows), q.dtype),
        jax.ShapeDtypeStruct((b, heads, q_blocks, 1, rows), jnp.float32),
    ]
    return pl.pallas_call(
        partial(_kernel, options, scalars, ids),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, heads, q_blocks, scalars.width),
            in_specs=[specs.q(q.shape), specs.kv(k.shape), specs.kv(v_t.shape), sinks_spec, *specs.ids(ids)],
            out_specs=[specs.q(shape.shape) for shape in out_shapes],
            scratch_shapes=[pltpu.VMEM((size, rows), jnp.float32) for size in (1, 1, w)],
        ),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            **scalars.cost(b * heads * scalars.tiling.heads, q.shape[4] + w, (q, *out_shapes), (k, v_t))
        ),
        name="attention_forward",
    )(scalars.array, q, k, v_t, sinks, ids.q, ids.kv)  # fmt: skip


def _kernel(
    options, scalars, ids, scalars_ref, q_ref, k_ref, v_ref, sinks_ref, q_ids_ref, kv_ids_ref,
    out_ref, lse_ref, top_ref, total_ref, sum_ref,
):  # fmt: skip
    """`top` is the largest logit so far, `total` Σ exp(logit - top), `sum` Σ exp(logit - top)·v."""
    tiling = scalars.tiling
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, count = (scalars.read(scalars_ref, name, b, i) for name in ("first", "count"))

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        if sinks_ref is None:
            top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
            total_ref[...] = jnp.zeros_like(total_ref)
        else:  # a sink is a logit without a value
            top_ref[...] = sinks_ref[...] * LOG2_E
            total_ref[...] = jnp.where(sinks_ref[...] == -jnp.inf, 0.0, 1.0)

    j = first + step

    def chunk(c, masked: bool):
        x, _ = logits(options, k_ref[c], q_ref[...])
        if masked:
            q_ids, kv_ids = ids.of_q(q_ids_ref), ids.of_chunk(kv_ids_ref, c)
            mask = visible(options, tiling, i, j * tiling.chunks + c, q_ids, kv_ids)
            x = jnp.where(mask, x, -jnp.inf)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(x, axis=0, keepdims=True))
        # A query that has seen nothing yet: -inf - -inf would be nan.
        safe = jnp.where(top == -jnp.inf, 0.0, top) if masked else top
        weights = jnp.exp2(x - safe)
        shrink = jnp.exp2(before - safe)
        total_ref[...] = total_ref[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        sum_ref[...] = sum_ref[...] * shrink + product(v_ref[c], weights.astype(v_ref.dtype), 1, 0)
        top_ref[...] = top

    @pl.when(step < count)
    def _():
        each_chunk(scalars, scalars_ref, b, i, j, chunk)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = total_ref[...]
        empty = total == 0.0
        out_ref[...] = (sum_ref[...] / jnp.where(empty, 1.0, total)).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(
            empty, -jnp.inf, top_ref[...] / LOG2_E + jnp.log(jnp.where(empty, 1.0, total))
        )
