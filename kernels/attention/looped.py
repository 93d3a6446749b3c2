"""Many query blocks: loops over them and over the key blocks each can see; program size does not grow with length."""

import jax
import jax.numpy as jnp

from maxstack.kernels.attention import tile
from maxstack.kernels.attention.blocks import Blocks, visible_blocks
from maxstack.kernels.attention.masks import Coordinates, Options, visible


def _padded(a, axis: int, block: int, value=0):
    """Lengthened to a multiple of `block`."""
    pad = [(0, 0)] * a.ndim
    pad[axis] = (0, -a.shape[axis] % block)
    return jnp.pad(a, pad, constant_values=value)


def _at_block(a, axis: int, index, block: int):
    return jax.lax.dynamic_slice_in_dim(a, index * block, block, axis)


def _key_ranges(at: Coordinates, options: Options, t: int, s: int, blocks: Blocks):
    """First visible key block of each query block, and the one after the last."""
    see = visible_blocks(at, options, t, s, blocks)
    first, last = jnp.argmax(see, axis=1), see.shape[1] - jnp.argmax(see[:, ::-1], axis=1)
    return first, jnp.where(see.any(1), last, first)


def _mask(padded: Coordinates, i, j, s: int, options: Options, blocks: Blocks):
    """Visibility of query block i by key block j; padded keys are hidden, padded queries harmless."""
    local = Coordinates(
        None if padded.q_segments is None else _at_block(padded.q_segments, 1, i, blocks.query),
        None if padded.kv_segments is None else _at_block(padded.kv_segments, 1, j, blocks.key),
        None if padded.q_positions is None else _at_block(padded.q_positions, 1, i, blocks.query),
        None if padded.kv_positions is None else _at_block(padded.kv_positions, 1, j, blocks.key),
    )
    mask = visible(local, options, blocks.query, blocks.key, i * blocks.query, j * blocks.key)
    if s % blocks.key == 0:
        return mask
    real = (j * blocks.key + jnp.arange(blocks.key) < s)[None, None]
    return jnp.broadcast_to(real, (1, blocks.query, blocks.key)) if mask is None else mask & real


def _padded_at(at: Coordinates, blocks: Blocks) -> Coordinates:
    sizes = (blocks.query, blocks.key, blocks.query, blocks.key)
    return Coordinates(
        *(None if c is None else _padded(c, 1, block) for c, block in zip(at, sizes, strict=True))
    )


def forward(q, k, v, at: Coordinates, options: Options, blocks: Blocks):
    """As `tile.forward`, for all queries and keys of the pairs."""
    (r, g, t, _), s, w = q.shape, k.shape[1], v.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    first, last = _key_ranges(at, options, t, s, blocks)
    q, k, v = _padded(q, 2, blocks.query), _padded(k, 1, blocks.key), _padded(v, 1, blocks.key)
    at = _padded_at(at, blocks)

    def one_query_block(i):
        q_i = _at_block(q, 2, i, blocks.query)

        def one_key_block(j, carry):
            top, total, out = carry
            k_j, v_j = _at_block(k, 1, j, blocks.key), _at_block(v, 1, j, blocks.key)
            top_j, total_j, out_j = tile.forward(q_i, k_j, v_j, _mask(at, i, j, s, options, blocks), options)
            new = jnp.maximum(top, top_j)
            old_scale, scale_j = (jnp.exp(part - tile.finite(new)) for part in (top, top_j))
            return (
                new,
                total * old_scale + total_j * scale_j,
                out * old_scale[..., None] + out_j * scale_j[..., None],
            )

        shape = (r, g, blocks.query)
        start = (jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, w), wide))
        return jax.lax.fori_loop(first[i], last[i], one_key_block, start)

    parts = jax.lax.map(one_query_block, jnp.arange(first.size))
    return tuple(jnp.moveaxis(a, 0, 2).reshape(r, g, -1, *a.shape[4:])[:, :, :t] for a in parts)


def backward(q, k, k_t, v, dout, lse, delta, at: Coordinates, options: Options, blocks: Blocks):
    """As `tile.backward`, for all queries and keys of the pairs; gradients in the dtypes of their arrays."""
    (r, g, t, h), s = q.shape, k.shape[1]
    first, last = _key_ranges(at, options, t, s, blocks)
    # A padded query has weights exp(-inf) = 0.
    per_query = [
        _padded(a, 2, blocks.query, value) for a, value in ((q, 0), (dout, 0), (lse, jnp.inf), (delta, 0))
    ]
    k, k_t, v = _padded(k, 1, blocks.key), _padded(k_t, 2, blocks.key), _padded(v, 1, blocks.key)
    at = _padded_at(at, blocks)

    def one_query_block(carry, i):
        q_i, dout_i, lse_i, delta_i = (_at_block(a, 2, i, blocks.query) for a in per_query)

        def one_key_block(j, carry):
            dq, dk, dv = carry
            k_j, k_t_j, v_j = (_at_block(a, axis, j, blocks.key) for a, axis in ((k, 1), (k_t, 2), (v, 1)))
            mask = _mask(at, i, j, s, options, blocks)
            dq_j, *dkv_j = tile.backward(q_i, k_j, k_t_j, v_j, dout_i, lse_i, delta_i, mask, options)
            dk, dv = (
                jax.lax.dynamic_update_slice_in_dim(
                    a, _at_block(a, 1, j, blocks.key) + a_j, j * blocks.key, 1
                )
                for a, a_j in zip((dk, dv), dkv_j, strict=True)
            )
            return dq + dq_j, dk, dv

        dq = jnp.zeros((r, h, g, blocks.query), lse.dtype)
        dq, *carry = jax.lax.fori_loop(first[i], last[i], one_key_block, (dq, *carry))
        return tuple(carry), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, lse.dtype), jnp.zeros(v.shape, lse.dtype))
    (dk, dv), dq = jax.lax.scan(one_query_block, start, jnp.arange(first.size))
    dq = jnp.moveaxis(dq, 0, 3).reshape(r, h, g, -1)[..., :t]
    return dq, dk[:, :s].astype(k.dtype), dv[:, :s].astype(v.dtype)
