"""Keys and values in pages: how they lie in memory, how they are made and written."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native, dispatch
from maxstack.kernels.sharded import varying, varying_over

PageType = Literal["bfloat16", "float32", "int8", "int4"]
Table = Int[Array, "b p"] | Int[np.ndarray, "b p"]
Lengths = Int[Array, "b"] | Int[np.ndarray, "b"]
PACKED = jnp.dtype(jnp.uint8)
"""Two numbers of 4 bits a byte."""
LARGEST = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.int4): 7, PACKED: 7}
"""Quantization is symmetric: ±LARGEST, scale = largest magnitude / LARGEST, rounded to nearest even."""


class KVCache(NamedTuple):
    """A pool of pages shared by all sequences. `P` pages, `k` kv heads, `page` tokens a page, `h` components.

    Values lie transposed and scales along the page, so that one layout serves the matrix units of Hopper and of TPUs.

    Numbers of 4 bits are two a byte everywhere, in one of two forms. For GPUs and TPUs they are `jnp.int4` (`nbytes`
    counts one byte each; the device takes half), which the kernels' compilers read as it is. XLA for the CPU would
    unpack the whole pool at every use of that; there they are uint8: component `i` of `h` in the low half and
    component `i + h/2` in the high half of one byte, so that unpacking gives two contiguous halves.
    """

    k_pages: Array
    """[P, k, page, h]: bfloat16, float32, int8 or int4; [P, k, page, h/2] uint8."""
    v_pages: Array
    """[P, k, h, page], of the same type; [P, k, h/2, page] uint8."""
    k_scale: Array | None
    """[P, k, page] float32, one a token and head; None when pages are not quantized."""
    v_scale: Array | None
    """[P, k, page] float32."""


class LatentCache(NamedTuple):
    """Pages of multi-head latent attention: one latent a token for all heads, whose first components are the values."""

    pages: Array
    """[P, h, page]: `h` is latent size + RoPE size; transposed, as values are in `KVCache`; uint8 [P, h/2, page]."""
    scale: Array | None
    """[P, page] float32; None when pages are not quantized."""


def init_cache(
    pages: int, kv_heads: int, head_size: int, page: int = 128, dtype: PageType = "bfloat16"
) -> KVCache:
    """Empty pages (zeros). One page of one head takes `2·page·head_size` numbers, and `8·page` bytes of scales.

    The kernels want pages of 128 tokens. "int4" takes the form of the chip at hand, or compiled for.
    """
    kind, pack = _page_type(dtype, head_size)
    _check_sizes(pages=pages, kv_heads=kv_heads, head_size=head_size, page=page)

    def scale():
        return jnp.zeros((pages, kv_heads, page), jnp.float32) if kind in LARGEST else None

    return KVCache(
        k_pages=jnp.zeros((pages, kv_heads, page, head_size // pack), kind),
        v_pages=jnp.zeros((pages, kv_heads, head_size // pack, page), kind),
        k_scale=scale(),
        v_scale=scale(),
    )


def init_latent_cache(pages: int, size: int, page: int = 128, dtype: PageType = "bfloat16") -> LatentCache:
    """Empty pages (zeros) of latents with `size` components, RoPE's included."""
    kind, pack = _page_type(dtype, size)
    _check_sizes(pages=pages, size=size, page=page)
    scale = jnp.zeros((pages, page), jnp.float32) if kind in LARGEST else None
    return LatentCache(jnp.zeros((pages, size // pack, page), kind), scale)


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
    for name, new in (("k", k_btkh), ("v", v_btkh)):
        if new.shape != (*page_table_bp.shape[:1], *k_btkh.shape[1:2], heads, size):
            raise ValueError(
                f"append_kv: {name} is {new.shape}; the cache takes [b, t, {heads}, {size}] "
                f"with b {page_table_bp.shape[0]}"
            )
    slots = _slots(k_btkh.shape[:2], page_table_bp, lengths_b, counts_b, pool, page)
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
    if latent_bth.shape[::2] != (page_table_bp.shape[0], size):
        raise ValueError(
            f"append_latent: latents are {latent_bth.shape}; the cache takes [b, t, {size}] "
            f"with b {page_table_bp.shape[0]}"
        )
    slots = _slots(latent_bth.shape[:2], page_table_bp, lengths_b, counts_b, pool, page)
    values, scale = quantized(latent_bth, cache.pages.dtype)
    if cache.scale is None:
        (pages,) = _written(slots, (cache.pages,), (values,), (2,))
        return LatentCache(pages, None)
    return LatentCache(*_written(slots, (cache.pages, cache.scale), (values, scale), (2, 1)))


def quantized(x: Float[Array, "*rows h"], dtype) -> tuple[Array, Array | None]:
    """Numbers for pages of `dtype` and, for integers, the float32 scale of each row: `x ≈ numbers · scale`."""
    if (largest := LARGEST.get(jnp.dtype(dtype))) is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None]
    numbers = jnp.clip(jnp.round(x * inverse), -largest, largest)
    if dtype != PACKED:
        return numbers.astype(dtype), scale
    low, high = jnp.split(numbers.astype(jnp.int8).view(jnp.uint8), 2, axis=-1)
    return (low & 15) | (high << 4), scale


def unpacked(pages: Array, axis: int) -> Array:
    """Numbers of pages: of two halves of bytes along `axis` int8, others as they are."""
    if pages.dtype != PACKED:
        return pages
    # Shifts of signed bytes carry the sign.
    low, high = (pages << 4).view(jnp.int8) >> 4, pages.view(jnp.int8) >> 4
    return jnp.concatenate([low, high], axis=axis)


def page_size(cache: KVCache | LatentCache) -> int:
    """Tokens of a page."""
    return (cache.pages if isinstance(cache, LatentCache) else cache.v_pages).shape[-1]


def head_size(cache: KVCache | LatentCache) -> int:
    """Components of a key."""
    pool = cache.pages if isinstance(cache, LatentCache) else cache.v_pages
    return pool.shape[-2] * (2 if pool.dtype == PACKED else 1)


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


def _page_type(dtype: str, size: int) -> tuple[jnp.dtype, int]:
    """(type, numbers an element)."""
    if dtype not in ("bfloat16", "float32", "int8", "int4"):
        raise TypeError(f"init_cache: pages of {dtype!r} are not known; known: bfloat16, float32, int8, int4")
    if dtype != "int4" or dispatch.chip().platform != "cpu":
        return jnp.dtype(dtype), 1
    if size % 2:
        raise ValueError(
            f"init_cache: int4 pages pack two components a byte; their number, {size}, must be even"
        )
    return PACKED, 2


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"init_cache: {name} is {size}; it must be at least 1")
