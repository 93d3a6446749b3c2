"""Keys and values in pages: how they lie in memory, how they are made."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxstack.kernels import dispatch

PageType = Literal["bfloat16", "float32", "int8", "int4"]
Table = Int[Array, "b p"] | Int[np.ndarray, "b p"]
Lengths = Int[Array, "b"] | Int[np.ndarray, "b"]
PACKED = jnp.dtype(jnp.uint8)
"""Two numbers of 4 bits a byte."""
LARGEST = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.int4): 7, PACKED: 7}
"""Quantization is symmetric: ±LARGEST, scale = largest magnitude / LARGEST, rounded to nearest even."""


class Pool(NamedTuple):
    """Pages of keys, of values, or of latents, and what is to be written."""

    pages: Array
    """[P, k, page, h], or [P, k, h, page] if turned."""
    scale: Array | None
    """[P, k, page] float32."""
    new_btkh: Array
    turned: bool


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
