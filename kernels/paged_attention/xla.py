"""Attention over pages as XLA compiles it: blocks of pages with a running softmax, in bounded memory.

A row is one split of one sequence. On the CPU rows go one after another, each over its own pages only, so that every
byte of the cache that counts is read once; elsewhere all rows go together, and the longest sets the number of steps.
One step reads some pages of a row, makes them float32 (bfloat16 on other platforms, where that is exact or they are
bfloat16 already), and multiplies with the keys on the left: XLA's products for the CPU run 2× faster so than with the
few query rows on the left.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import dispatch, tiles
from maxstack.kernels.paged_attention.cache import KVCache, LatentCache, page_size, unpacked
from maxstack.kernels.paged_attention.plan import Options, by_kv_head, by_query, finite, page_ranges

BLOCK_TOKENS = 1024
"""Tokens of a row in one step on the CPU: its float32 block stays in a cache, and a step is worth its overhead."""
BLOCK_BYTES = 64 << 20
"""Of the blocks of all rows together elsewhere."""


def declined(q_btnh, cache: KVCache | LatentCache, value_size: int) -> None:
    """It can serve every call."""


def default_splits(q_btnh, cache, table_pages: int) -> int:
    """One: a loop gains nothing from parts."""
    return 1


def paged_attention(
    q_btnh: Float[Array, "b t n h"],
    cache: KVCache | LatentCache,
    table_bp: Int[Array, "b p"],
    lengths_b: Int[Array, "b"],
    options: Options,
    value_size: int,
) -> tuple[Float[Array, "s b t n w"], Float[Array, "s b t n"]]:
    """Output and log-sum-exp of each split, float32. The table holds pages or -1."""
    b, t, _, h = q_btnh.shape
    kv_heads = 1 if isinstance(cache, LatentCache) else cache.k_pages.shape[1]
    starts_bs, ends_bs = page_ranges(lengths_b, t, options, page_size(cache), table_bp.shape[1])
    q_bkmh = by_kv_head(q_btnh, kv_heads)

    tokens = _block_tokens(q_bkmh, cache)

    def split(s):
        rows = (q_bkmh, table_bp, lengths_b, starts_bs[:, s], ends_bs[:, s])
        if dispatch.chip().platform != "cpu":
            return _attend(cache, rows, t, options, value_size, BLOCK_BYTES // (4 * b * kv_heads * h))
        one = jax.lax.map(
            lambda row: _attend(cache, _each(row, lambda a: a[None]), t, options, value_size, tokens),
            rows,
        )
        return _each(one, lambda a: a[:, 0])

    out, lse = (jnp.stack(parts) for parts in zip(*map(split, range(options.splits)), strict=True))
    return by_query(out, t), by_query(lse, t)


def _block_tokens(q_bkmh, cache: KVCache | LatentCache) -> int:
    """Tokens of a step on the CPU: what the tables have, else BLOCK_TOKENS."""
    pages = cache.pages if isinstance(cache, LatentCache) else cache.k_pages
    shape = {"k": q_bkmh.shape[1], "m": q_bkmh.shape[2], "h": q_bkmh.shape[3], "p": page_size(cache)}
    axes, rule = {"tokens": (256, 512, 1024, 2048, 4096)}, {"tokens": BLOCK_TOKENS}
    name, fault = "paged_attention.xla", lambda sizes: None
    return tiles.chosen(name, pages.dtype, shape, rule, axes=axes, fault=fault)["tokens"]


def _each(arrays, change):
    return jax.tree.map(change, arrays)


def _attend(cache, rows, t: int, options: Options, value_size: int, block_tokens: int):
    """(out [r, k, m, w], lse [r, k, m]) of rows that step together."""
    q_rkmh, table_rp, lengths_r, starts_r, ends_r = rows
    r, k, m, _ = q_rkmh.shape
    page, entries = page_size(cache), table_rp.shape[1]
    pages = max(1, min(block_tokens // page, entries))  # of a step
    dtype = _product_dtype(q_rkmh, cache)
    q_rkmh = (q_rkmh.astype(jnp.float32) * options.scale).astype(dtype)
    # Query rows are (query, head of the group); the last query stands at length - 1.
    q_positions_rm = lengths_r[:, None] - t + jnp.arange(m) // (m // t)

    def step(i, state):
        top_rkm, total_rkm, out_rkwm = state
        logical_rc = starts_r[:, None] + i * pages + jnp.arange(pages)
        ids_rc = jnp.take_along_axis(table_rp, jnp.minimum(logical_rc, entries - 1), axis=1)
        used_rc = (logical_rc < ends_r[:, None]) & (ids_rc >= 0)
        keys, values, k_scale, v_scale = _block(cache, jnp.maximum(ids_rc, 0), value_size, dtype)

        positions_rcp = logical_rc[..., None] * page + jnp.arange(page)
        distance_rcpm = q_positions_rm[:, None, None] - positions_rcp[..., None]
        visible = (distance_rcpm >= 0) & used_rc[:, :, None, None]
        if options.window is not None:
            visible &= distance_rcpm < options.window
        visible = visible[:, :, None]

        q_rckmh = jnp.broadcast_to(q_rkmh[:, None], (r, pages, *q_rkmh.shape[1:]))
        logits = jnp.einsum("rckph,rckmh->rckpm", keys, q_rckmh, preferred_element_type=jnp.float32)
        if k_scale is not None:
            logits = logits * k_scale[..., None]
        if options.softcap is not None:
            logits = options.softcap * jnp.tanh(logits / options.softcap)
        logits = jnp.where(visible, logits, -jnp.inf)
        new_top = jnp.maximum(top_rkm, jnp.max(logits, axis=(1, 3)))
        weights = jnp.exp(logits - finite(new_top)[:, None, :, None])
        keep = jnp.exp(top_rkm - finite(new_top))
        total_rkm = total_rkm * keep + weights.sum((1, 3))
        if v_scale is not None:
            weights = jnp.where(visible, weights * v_scale[..., None], 0)
        values = jnp.where(_usable(visible, values), values, 0)
        part = jnp.einsum(
            "rckwp,rckpm->rckwm", values, weights.astype(dtype), preferred_element_type=jnp.float32
        )
        return new_top, total_rkm, out_rkwm * keep[:, :, None] + part.sum(1)

    steps = jnp.max(-(-(ends_r - starts_r) // pages), initial=0)
    nothing = _varying_like(
        (
            jnp.full((r, k, m), -jnp.inf, jnp.float32),
            jnp.zeros((r, k, m), jnp.float32),
            jnp.zeros((r, k, value_size, m), jnp.float32),
        ),
        (cache, rows),
    )
    top, total, out = jax.lax.fori_loop(0, steps, step, nothing)
    safe = jnp.where(total > 0, total, 1)
    lse = jnp.where(total > 0, finite(top) + jnp.log(safe), -jnp.inf)
    return jnp.swapaxes(out / safe[:, :, None], 2, 3), lse


def _varying_like(state, like):
    """Inside `jax.shard_map` a loop's state differs between devices from the start, as what it is made from does."""
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in jax.tree.leaves(like)))
    return jax.tree.map(lambda array: jax.lax.pcast(array, tuple(sorted(axes)), to="varying"), state)


def _usable(visible_rckpm, values_rckwp):
    """What no query sees may be anything, nan too, and 0 · nan is nan. So may be what only some see, since the others
    may be padding: there what is not finite is left out."""
    some, every = (of(visible_rckpm, axis=-1)[..., None, :] for of in (jnp.any, jnp.all))
    return some & (every | jnp.isfinite(values_rckwp))


def _product_dtype(q, cache):
    """Of the two products: int8 and int4 are exact in bfloat16 too; XLA's bfloat16 products for the CPU are slow."""
    pages = cache.pages if isinstance(cache, LatentCache) else cache.k_pages
    narrow = q.dtype == jnp.bfloat16 and pages.dtype != jnp.float32
    return jnp.bfloat16 if narrow and dispatch.chip().platform != "cpu" else jnp.float32


def _block(cache, ids_rc, value_size: int, dtype):
    """Keys [r, c, k, page, h], values [r, c, k, w, page], and their scales [r, c, k, page] or None."""

    def of(pool: Array) -> Array:
        if ids_rc.shape[0] > 1:
            return pool[ids_rc]
        # Whole pages are copied as slices; a gather goes number by number on the CPU.
        return jnp.stack([jax.lax.dynamic_index_in_dim(pool, i, keepdims=False) for i in ids_rc[0]])[None]

    if isinstance(cache, LatentCache):
        latent = unpacked(of(cache.pages), 2).astype(dtype)[:, :, None]
        scale = None if cache.scale is None else of(cache.scale)[:, :, None]
        return jnp.swapaxes(latent, 3, 4), latent[:, :, :, :value_size], scale, scale
    keys, values = unpacked(of(cache.k_pages), 4), unpacked(of(cache.v_pages), 3)
    k_scale, v_scale = (None if scale is None else of(scale) for scale in (cache.k_scale, cache.v_scale))
    return keys.astype(dtype), values.astype(dtype), k_scale, v_scale
