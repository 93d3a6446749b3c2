"""Attention on a TPU, backward: the weights are made again from the kept log-sum-exp.

One kernel walks key blocks and sums dk and dv over the query blocks that see them, head after head, and dq for all
queries of a kv head on the chip: five products a logit. Where dq is too long for that, a second kernel walks query
blocks, as the forward pass does, and sums dq there: seven products. Each sum has one order, so that gradients repeat
bit for bit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxstack.kernels.attention.masks import Options
from maxstack.kernels.attention.mosaic_tpu_arrays import Ids, Place, Specs
from maxstack.kernels.attention.mosaic_tpu_forward import by_queries
from maxstack.kernels.attention.mosaic_tpu_tile import each_chunk, logits, product, visible
from maxstack.kernels.attention.mosaic_tpu_tiling import Scalars, Tiling


def by_keys(scalars: Scalars, b, kv_head, j, part, step, ref) -> Place:
    """A step of a grid that walks key blocks and, for each, heads and the query blocks that see it.

    A step past the last of them has nothing to do, and already fetches the first queries of what follows.
    """
    parts, last = scalars.tiling.parts, scalars.own_blocks - 1
    first, count = (scalars.read(ref, name, b, j) for name in ("first", "count"))
    next_block = scalars.read(ref, "first", b, jnp.where(j < last, j + 1, 0))
    following = jnp.where(part < parts - 1, first, next_block)
    return Place(b, kv_head * parts + part, kv_head, jnp.where(step < count, first + step, following), j)


def queries_backward(
    options: Options, scalars: Scalars, vmem_bytes: int, q, k, k_t, v, dout, lse_delta, ids: Ids
):
    """dq [.., h, rows] by queries. `k_t` is k with keys last; `lse_delta` [.., 2, rows] holds, by queries, the
    log-sum-exp in base 2 (+inf for a query that saw nothing: its weights are 0) and delta."""
    b, heads, q_blocks, rows, h = q.shape
    specs = Specs(scalars, partial(by_queries, scalars))
    out_shape = jax.ShapeDtypeStruct((b, heads, q_blocks, h, rows), q.dtype)
    by_q, by_kv = (q, dout, lse_delta), (k, k_t, v)
    return pl.pallas_call(
        partial(_queries_kernel, options, scalars, ids),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, heads, q_blocks, scalars.width),
            in_specs=[
                *(specs.q(a.shape) for a in by_q),
                *(specs.kv(a.shape) for a in by_kv),
                *specs.ids(ids),
            ],
            out_specs=specs.q(out_shape.shape),
            scratch_shapes=[pltpu.VMEM((h, rows), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        cost_estimate=pl.CostEstimate(
            **scalars.cost(b * heads * scalars.tiling.heads, 2 * h + v.shape[4], (*by_q, out_shape), by_kv)
        ),
        name="attention_backward_queries",
    )(scalars.array, *by_q, *by_kv, ids.q, ids.kv)


def _queries_kernel(
    options, scalars, ids, scalars_ref, q_ref, dout_ref, lse_delta_ref, k_ref, k_t_ref, v_ref, q_ids_ref, kv_ids_ref,
    dq_ref, sum_ref,
):  # fmt: skip
    b, i, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, count = (scalars.read(scalars_ref, name, b, i) for name in ("first", "count"))

    @pl.when(step == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    j = first + step

    def chunk(c, masked: bool):
        mask = _mask(options, scalars, ids, i, j, c, q_ids_ref, kv_ids_ref) if masked else None
        _, dlogits = _weights(options, q_ref[...], dout_ref[...], lse_delta_ref, k_ref[c], v_ref[c], mask)
        sum_ref[...] += product(k_t_ref[c], dlogits.astype(k_t_ref.dtype), 1, 0)

    @pl.when(step < count)
    def _():
        each_chunk(scalars, scalars_ref, b, i, j, chunk)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dq_ref[...] = (sum_ref[...] * options.scale).astype(dq_ref.dtype)


def keys_backward(
    options: Options, scalars: Scalars, vmem_bytes: int, q, k, k_t, v, dout, lse_delta, ids: Ids
):
    """(dk, dv) by keys, and dq [.., h, rows] by queries; arguments as for `queries_backward`.

    dq is summed on the chip for all queries of a kv head at once, which takes `dq_bytes` there. Without `k_t` it is
    left out, and None.
    """
    tiling, with_dq = scalars.tiling, k_t is not None
    (b, kv_heads), (heads, h), w = k.shape[:2], (q.shape[1], q.shape[4]), v.shape[4]
    specs = Specs(scalars, partial(by_keys, scalars))
    by_q, by_kv = (q, dout, lse_delta), (k, v, k_t) if with_dq else (k, v)
    out_shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (k, v)]
    out_specs = [specs.kv(a.shape) for a in (k, v)]
    sums = [(tiling.chunks, *a.shape[3:]) for a in (k, v)]
    if with_dq:
        sums.append((tiling.parts * tiling.q_blocks, h, tiling.rows))
        out_shapes.append(jax.ShapeDtypeStruct((b, kv_heads, *sums[-1]), q.dtype))
        out_specs.append(pl.BlockSpec((None, None, *sums[-1]), lambda b, kv_head, *_: (b, kv_head, 0, 0, 0)))
    # All key blocks of a head add to dq: cores may share them only without it.
    blocks = "arbitrary" if with_dq else "parallel"
    cost = scalars.cost(
        b * heads * tiling.heads, (3 if with_dq else 2) * h + 2 * w, (*by_kv, *out_shapes), by_q
    )
    found = pl.pallas_call(
        partial(_all_kernel if with_dq else _keys_kernel, options, scalars, ids),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, kv_heads, tiling.kv_blocks, tiling.parts, scalars.width),
            in_specs=[
                *(specs.q(a.shape) for a in by_q),
                *(specs.kv(a.shape) for a in by_kv),
                *specs.ids(ids),
            ],
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        ),
        out_shape=out_shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", blocks, "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(**cost),
        name="attention_backward" if with_dq else "attention_backward_keys",
    )(scalars.array, *by_q, *by_kv, ids.q, ids.kv)
    dq = found[2].reshape(b, heads, tiling.q_blocks, h, tiling.rows) if with_dq else None
    return found[0], found[1], dq


def dq_bytes(tiling: Tiling, h: int, itemsize: int) -> int:
    """On-chip memory of the sum of one kv head's dq, and of what is copied out of it, two at a time."""
    return tiling.parts * tiling.q_blocks * tiling.rows * h * (4 + 2 * itemsize)


def _all_kernel(
    options, scalars, ids, scalars_ref, q_ref, dout_ref, lse_delta_ref, k_ref, v_ref, k_t_ref, q_ids_ref, kv_ids_ref,
    dk_ref, dv_ref, dq_ref, dk_sum_ref, dv_sum_ref, dq_sum_ref,
):  # fmt: skip
    j, part, step = (pl.program_id(axis) for axis in (2, 3, 4))
    last = [pl.num_programs(axis) - 1 for axis in (2, 3, 4)]

    @pl.when((j == 0) & (part == 0) & (step == 0))
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    def add_dq(c, i, dlogits):
        dq_sum_ref[part * scalars.tiling.q_blocks + i] += product(k_t_ref[c], dlogits, 1, 0)

    _keys_kernel(
        options, scalars, ids, scalars_ref, q_ref, dout_ref, lse_delta_ref, k_ref, v_ref, q_ids_ref, kv_ids_ref,
        dk_ref, dv_ref, dk_sum_ref, dv_sum_ref, add_dq,
    )  # fmt: skip

    @pl.when((j == last[0]) & (part == last[1]) & (step == last[2]))
    def _():
        dq_ref[...] = (dq_sum_ref[...] * options.scale).astype(dq_ref.dtype)


def _keys_kernel(
    options, scalars, ids, scalars_ref, q_ref, dout_ref, lse_delta_ref, k_ref, v_ref, q_ids_ref, kv_ids_ref,
    dk_ref, dv_ref, dk_sum_ref, dv_sum_ref, add_dq=None,
):  # fmt: skip
    b, j, part, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
    first, count = (scalars.read(scalars_ref, name, b, j) for name in ("first", "count"))

    @pl.when((part == 0) & (step == 0))
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    i = first + step

    def chunk(c, masked: bool):
        mask = _mask(options, scalars, ids, i, j, c, q_ids_ref, kv_ids_ref) if masked else None
        q, dout = q_ref[...], dout_ref[...]
        weights, dlogits = _weights(options, q, dout, lse_delta_ref, k_ref[c], v_ref[c], mask)
        dlogits = dlogits.astype(q.dtype)
        dv_sum_ref[c] += product(weights.astype(dout.dtype), dout, 1, 0)
        dk_sum_ref[c] += product(dlogits, q, 1, 0)
        if add_dq is not None:
            add_dq(c, i, dlogits)

    @pl.when(step < count)
    def _():
        each_chunk(scalars, scalars_ref, b, i, j, chunk)

    @pl.when((part == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        dk_ref[...] = (dk_sum_ref[...] * options.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)


def _mask(options, scalars, ids, i, j, c, q_ids_ref, kv_ids_ref):
    """Of chunk c of key block j."""
    q_ids, kv_ids = ids.of_q(q_ids_ref), ids.of_chunk(kv_ids_ref, c)
    return visible(options, scalars.tiling, i, j * scalars.tiling.chunks + c, q_ids, kv_ids)


def _weights(options, q, dout, lse_delta_ref, k, v, mask):
    """Weights of a chunk and the gradient of its logits, less the factor `scale`: [chunk, rows] each."""
    x, tanh = logits(options, k, q)
    if mask is not None:
        x = jnp.where(mask, x, -jnp.inf)
    weights = jnp.exp2(x - lse_delta_ref[0:1])
    dlogits = weights * (product(v, dout, 1, 1) - lse_delta_ref[1:2])
    return weights, dlogits if tanh is None else dlogits * (1.0 - tanh * tanh)
