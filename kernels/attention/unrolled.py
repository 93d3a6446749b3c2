"""Few query blocks: each written out, with all the keys it can see by index in one piece."""

import jax
import jax.numpy as jnp

from maxstack.kernels.attention import tile
from maxstack.kernels.attention.blocks import Blocks, static_range
from maxstack.kernels.attention.masks import Coordinates, Options, visible


def _query_blocks(t: int, s: int, at: Coordinates, options: Options, blocks: Blocks):
    """(queries, keys, mask) of each block, as slices."""
    for t0 in range(0, t, blocks.query):
        t1 = min(t0 + blocks.query, t)
        lo, hi = static_range(t0, t1, s, at, options)
        if lo == hi:
            lo, hi = 0, 1  # one hidden key keeps the shapes of a tile that sees nothing
        queries, keys = slice(t0, t1), slice(lo, hi)
        local = Coordinates(
            None if at.q_segments is None else at.q_segments[:, queries],
            None if at.kv_segments is None else at.kv_segments[:, keys],
            None if at.q_positions is None else at.q_positions[:, queries],
            None if at.kv_positions is None else at.kv_positions[:, keys],
        )
        yield queries, keys, visible(local, options, t1 - t0, hi - lo, t0, lo)


def forward(q, k, v, at: Coordinates, options: Options, blocks: Blocks):
    """As `tile.forward`, for all queries and keys of the pairs."""
    parts = [
        tile.forward(q[:, :, queries], k[:, keys], v[:, keys], mask, options)
        for queries, keys, mask in _query_blocks(q.shape[2], k.shape[1], at, options, blocks)
    ]
    tops, totals, outs = zip(*parts, strict=True)
    return jnp.concatenate(tops, axis=2), jnp.concatenate(totals, axis=2), jnp.concatenate(outs, axis=2)


def backward(q, k, k_t, v, dout, lse, delta, at: Coordinates, options: Options, blocks: Blocks):
    """As `tile.backward`, for all queries and keys of the pairs; gradients in the dtypes of their arrays."""
    dqs = []
    dk, dv = jnp.zeros(k.shape, lse.dtype), jnp.zeros(v.shape, lse.dtype)
    for queries, keys, mask in _query_blocks(q.shape[2], k.shape[1], at, options, blocks):
        dq_part, dk_part, dv_part = tile.backward(
            q[:, :, queries],
            k[:, keys],
            k_t[:, :, keys],
            v[:, keys],
            dout[:, :, queries],
            lse[:, :, queries],
            delta[:, :, queries],
            mask,
            options,
        )
        dqs.append(dq_part.astype(q.dtype))
        dk, dv = _added(dk, dk_part, keys), _added(dv, dv_part, keys)
    return jnp.concatenate(dqs, axis=3), dk.astype(k.dtype), dv.astype(v.dtype)


def _added(whole, part, keys: slice):
    """`whole` with `part` added at `keys`; `.at[:, keys].add` would hoist empty index arrays out of `shard_map`, which
    crash the partitioner (jaxlib 0.11.2)."""
    return jax.lax.dynamic_update_slice_in_dim(whole, whole[:, keys] + part, keys.start or 0, axis=1)
