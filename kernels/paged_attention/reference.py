"""Attention over pages, obviously: gather every page, make it float32, one softmax."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.paged_attention.cache import KVCache, LatentCache, unpacked
from maxstack.kernels.paged_attention.plan import Options, finite


def declined(q_btnh, cache: KVCache | LatentCache, value_size: int) -> None:
    """It can serve every call."""


def default_splits(q_btnh, cache, table_pages: int) -> int:
    """One: there is one softmax."""
    return 1


def paged_attention(
    q_btnh: Float[Array, "b t n h"],
    cache: KVCache | LatentCache,
    table_bp: Int[Array, "b p"],
    lengths_b: Int[Array, "b"],
    options: Options,
    value_size: int,
) -> tuple[Float[Array, "s b t n w"], Float[Array, "s b t n"]]:
    """Output and log-sum-exp in float32, as one part whatever `options.splits` says. The table holds pages or -1."""
    b, t, n, h = q_btnh.shape
    k_bksh, v_bksw = _gathered(cache, jnp.maximum(table_bp, 0), value_size)
    k, s = k_bksh.shape[1:3]
    q_positions = lengths_b[:, None] - t + jnp.arange(t)
    distance_bts = q_positions[:, :, None] - jnp.arange(s)
    visible_bts = (distance_bts >= 0) & jnp.repeat(table_bp >= 0, s // table_bp.shape[1], axis=1)[:, None]
    if options.window is not None:
        visible_bts &= distance_bts < options.window

    q = q_btnh.astype(jnp.float32).reshape(b, t, k, n // k, h)
    logits = jnp.einsum("btkgh,bksh->btkgs", q, k_bksh) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    logits = jnp.where(visible_bts[:, :, None, None], logits, -jnp.inf)
    top = finite(jnp.max(logits, axis=-1))
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)
    weights = weights / jnp.where(total > 0, total, 1)[..., None]
    # What no query sees may be anything, nan too, and 0 · nan is nan; so may be what is seen by padding alone.
    some, every = (seen[:, None, :, None] for seen in (visible_bts.any(1), visible_bts.all(1)))
    v = jnp.where(some & (every | jnp.isfinite(v_bksw)), v_bksw, 0)
    out = jnp.einsum("btkgs,bksw->btkgw", weights, v)
    return out.reshape(1, b, t, n, value_size), lse.reshape(1, b, t, n)


def _gathered(cache, table_bp, value_size):
    """Keys [b, k, s, h] and values [b, k, s, w], float32."""
    if isinstance(cache, LatentCache):
        latent = unpacked(cache.pages[table_bp], 2).astype(jnp.float32)  # b p h page
        if cache.scale is not None:
            latent = latent * cache.scale[table_bp][:, :, None]
        rows = jnp.swapaxes(latent, 2, 3).reshape(latent.shape[0], 1, -1, latent.shape[2])
        return rows, rows[..., :value_size]
    k = unpacked(cache.k_pages[table_bp], 4).astype(jnp.float32)  # b p k page h
    v = jnp.swapaxes(unpacked(cache.v_pages[table_bp], 3), 3, 4).astype(jnp.float32)
    if cache.k_scale is not None and cache.v_scale is not None:
        k, v = k * cache.k_scale[table_bp][..., None], v * cache.v_scale[table_bp][..., None]
    b, p, heads, page, h = k.shape
    return tuple(jnp.swapaxes(x, 1, 2).reshape(b, heads, p * page, h) for x in (k, v))
