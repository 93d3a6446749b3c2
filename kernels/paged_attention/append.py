"""New keys and values written into pages."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native, dispatch
from maxstack.kernels.dispatch import Later
from maxstack.kernels.paged_attention.cache import (
    KVCache,
    LatentCache,
    Lengths,
    Pool,
    Table,
    head_size,
    quantized,
)
from maxstack.kernels.sharded import varying, varying_over

BY_PAGES = Later("maxstack.kernels.paged_attention.mosaic_tpu_append")
BY_TOKENS = Later("maxstack.kernels.paged_attention.mosaic_tpu_token")


def append_kv(
    cache: KVCache,
    k_btkh: Float[Array, "b t k h"],
    v_btkh: Float[Array, "b t k h"],
    page_table_bp: Table,
    lengths_b: Lengths,
    counts_b: Lengths | None = None,
) -> KVCache:
    """The cache with the first `counts_b` of `t` new tokens (all, unless given) behind the `lengths_b` it holds.

    Quantizes as it writes. A token whose page is not in the table, or whose table entry is no page of the pool, is
    dropped; two sequences must not write into the same page. Donate the cache (`jax.jit(append_kv,
    donate_argnums=0)`), in a call of its own on the CPU: inside a step that also reads it XLA copies the pool.
    Attention over what was written takes `lengths_b + counts_b`; for a chunk padded on the right it takes
    `lengths_b + t`, and what it gives for padding means nothing.

    Raises ValueError for shapes that disagree, TypeError for dtypes.
    """
    pool, heads, page, _ = cache.k_pages.shape
    size = head_size(cache)
    _check_places("append_kv", page_table_bp, lengths_b, counts_b)
    for name, new in (("k", k_btkh), ("v", v_btkh)):
        if new.shape != (*page_table_bp.shape[:1], *k_btkh.shape[1:2], heads, size):
            raise ValueError(
                f"append_kv: {name} is {new.shape}; the cache takes [b, t, {heads}, {size}] "
                f"with b {page_table_bp.shape[0]}"
            )
    turned = size % 128 != 0
    wholes = [
        Pool(_turned(cache.k_pages, turned), cache.k_scale, k_btkh, turned),
        Pool(cache.v_pages, cache.v_scale, v_btkh, True),
    ]
    if _by_pages(wholes):
        (k, k_scale), (v, v_scale) = _append_pages(wholes, page_table_bp, lengths_b, counts_b)
        return KVCache(_turned(k, turned), v, k_scale, v_scale)
    slots = _slots(k_btkh.shape[:2], page_table_bp, lengths_b, counts_b, pool, page)
    if _by_tokens(wholes):
        (k, k_scale), (v, v_scale) = _append_tokens(wholes, slots)
        return KVCache(_turned(k, turned), v, k_scale, v_scale)
    k, k_scale = quantized(k_btkh, cache.k_pages.dtype)
    v, v_scale = quantized(v_btkh, cache.v_pages.dtype)
    if cache.k_scale is None or cache.v_scale is None:
        k_pages, v_pages = _written(slots, (cache.k_pages, cache.v_pages), (k, v), (2, 3))
        return KVCache(k_pages, v_pages, None, None)
    pools = (cache.k_pages, cache.v_pages, cache.k_scale, cache.v_scale)
    return KVCache(*_written(slots, pools, (k, v, k_scale, v_scale), (2, 3, 2, 2)))


def append_latent(
    cache: LatentCache,
    latent_bth: Float[Array, "b t h"],
    page_table_bp: Table,
    lengths_b: Lengths,
    counts_b: Lengths | None = None,
) -> LatentCache:
    """`append_kv` for latents."""
    pool, _, page = cache.pages.shape
    size = head_size(cache)
    _check_places("append_latent", page_table_bp, lengths_b, counts_b)
    if latent_bth.ndim != 3 or latent_bth.shape[::2] != (page_table_bp.shape[0], size):
        raise ValueError(
            f"append_latent: latents are {latent_bth.shape}; the cache takes [b, t, {size}] "
            f"with b {page_table_bp.shape[0]}"
        )
    scale = None if cache.scale is None else cache.scale[:, None]
    whole = Pool(cache.pages[:, None], scale, latent_bth[:, :, None], True)
    if _by_pages([whole]):
        ((pages, scale),) = _append_pages([whole], page_table_bp, lengths_b, counts_b)
        return LatentCache(pages[:, 0], None if scale is None else scale[:, 0])
    slots = _slots(latent_bth.shape[:2], page_table_bp, lengths_b, counts_b, pool, page)
    if _by_tokens([whole]):
        ((pages, scale),) = _append_tokens([whole], slots)
        return LatentCache(pages[:, 0], None if scale is None else scale[:, 0])
    values, scale = quantized(latent_bth, cache.pages.dtype)
    if cache.scale is None:
        (pages,) = _written(slots, (cache.pages,), (values,), (2,))
        return LatentCache(pages, None)
    return LatentCache(*_written(slots, (cache.pages, cache.scale), (values, scale), (2, 1)))


def _check_places(operation: str, page_table_bp: Table, lengths_b: Lengths, counts_b: Lengths | None) -> None:
    """Where new tokens go: a table [b, pages], a length and a count for each of its rows."""
    if page_table_bp.ndim != 2:
        raise ValueError(f"{operation}: the page table must be [b, pages], not {page_table_bp.shape}")
    for name, array in (("page table", page_table_bp), ("lengths", lengths_b), ("counts", counts_b)):
        if array is None:
            continue
        if array is not page_table_bp and array.shape != page_table_bp.shape[:1]:
            raise ValueError(
                f"{operation}: {name} are {array.shape}; a page table of {page_table_bp.shape[0]} sequences wants "
                f"{page_table_bp.shape[:1]}"
            )
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{operation}: {name} must be integers, not {array.dtype}")


def _by_pages(pools: list[Pool]) -> bool:
    """Long chunks on TPUs."""
    return dispatch.only_on("tpu") is None and BY_PAGES.declined(pools) is None


def _append_pages(pools: list[Pool], page_table_bp: Table, lengths_b: Lengths, counts_b: Lengths | None):
    t = pools[0].new_btkh.shape[1]
    lengths_b = jnp.asarray(lengths_b, jnp.int32)
    counts_b = jnp.full_like(lengths_b, t) if counts_b is None else jnp.asarray(counts_b, jnp.int32)
    return BY_PAGES.append_pages(pools, jnp.asarray(page_table_bp), lengths_b, counts_b)


def _by_tokens(pools: list[Pool]) -> bool:
    """Few tokens on TPUs."""
    return dispatch.only_on("tpu") is None and BY_TOKENS.declined(pools) is None


def _append_tokens(pools: list[Pool], slots):
    """Token after token, of all sequences at once."""
    b, t = pools[0].new_btkh.shape[:2]
    page_bt, place_bt = (x.reshape(b, t) for x in slots)
    for i in range(t):
        now = [pool._replace(new_btkh=pool.new_btkh[:, i : i + 1]) for pool in pools]
        written = BY_TOKENS.append_token(now, page_bt[:, i], place_bt[:, i])
        pools = [
            pool._replace(pages=pages, scale=scale)
            for pool, (pages, scale) in zip(pools, written, strict=True)
        ]
    return [(pool.pages, pool.scale) for pool in pools]


def _turned(pages: Array, turn: bool) -> Array:
    """Keys of 64 components as they lie on a TPU, tokens along the lanes: no operation there."""
    return jnp.swapaxes(pages, 2, 3) if turn else pages


def _slots(shape, page_table_bp, lengths_b, counts_b, pool: int, page: int):
    """(page, place in it) of each new token, flat; a page of `pool` or more for those to drop."""
    b, t = shape
    page_table_bp = jnp.asarray(page_table_bp)
    positions = lengths_b[:, None] + jnp.arange(t)
    logical = positions // page
    entries = jnp.take_along_axis(page_table_bp, jnp.clip(logical, 0, page_table_bp.shape[1] - 1), axis=1)
    keep = (positions >= 0) & (logical < page_table_bp.shape[1]) & (entries >= 0) & (entries < pool)
    if counts_b is not None:
        keep &= jnp.arange(t) < counts_b[:, None]
    return jnp.where(keep, entries, pool).reshape(b * t), (positions % page).reshape(b * t)


def _written(slots, pools, new, axes):
    """`pools` with `new` [b, t, …] at `slots`; `axes` says where each pool counts tokens."""
    page, place = slots
    rows = [new.reshape(-1, *new.shape[2:]).astype(pool.dtype) for pool, new in zip(pools, new, strict=True)]
    if _in_place(pools):
        arrays = (page, place, *pools, *rows)
        written = cpu_native.write_rows(page.astype(jnp.int32), place.astype(jnp.int32), pools, rows, axes)
        return tuple(varying_over(frozenset().union(*map(varying, arrays)), written))

    def put(pool, rows, axis):
        if dispatch.chip().platform == "tpu":
            return _written_one_by_one(pool, rows, page, place, axis)
        at = (page, *(slice(None),) * (axis - 1), place)
        return pool.at[at].set(rows, mode="drop", unique_indices=True)

    return tuple(put(*each) for each in zip(pools, rows, axes, strict=True))


def _in_place(pools) -> bool:
    """Whether the C++ part writes. XLA for the CPU writes in place only where nothing in the program reads the pool."""
    whole_bytes = all(pool.dtype != jnp.int4 for pool in pools)
    return dispatch.chip().platform == "cpu" and whole_bytes and cpu_native.available()


def _written_one_by_one(pool, rows, page, place, axis: int):
    """XLA for TPUs turns the whole pool around for a scatter, and back; updates of slices are made in place."""

    # As the pool lies: with no lane empty. Left to itself XLA picks another order for the loop, and copies.
    order = (0, 1, 3, 2) if pool.ndim == 4 and pool.shape[3] % 128 else tuple(range(pool.ndim))

    def write(i, pool):
        row = jnp.expand_dims(rows[i], (0, axis))
        at = [page[i], *(0,) * (pool.ndim - 1)]
        at[axis] = place[i]
        before = jax.lax.dynamic_slice(pool, at, row.shape)
        pool = jax.lax.dynamic_update_slice(pool, jnp.where(page[i] < pool.shape[0], row, before), at)
        return with_layout_constraint(pool, Layout(major_to_minor=order))

    return jax.lax.fori_loop(0, len(rows), write, pool)
