"""Attention over a cache in pages: the public functions, their checks, the choice of a backend."""

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import Later, choose, elsewhere
from maxstack.kernels.paged_attention import native, plan, reference, xla
from maxstack.kernels.paged_attention.append import append_kv, append_latent
from maxstack.kernels.paged_attention.cache import (
    KVCache,
    LatentCache,
    Lengths,
    PageType,
    Table,
    head_size,
    init_cache,
    init_latent_cache,
    page_size,
)
from maxstack.kernels.paged_attention.plan import Options
from maxstack.kernels.sharded import explicit_mesh

__all__ = [
    "KVCache", "LatentCache", "PageType", "append_kv", "append_latent", "bytes_moved", "init_cache",
    "init_latent_cache", "latent_paged_attention", "paged_attention",
]  # fmt: skip

Implementation = Literal["auto", "xla", "reference", "cpu_native", "mosaic_gpu", "mosaic_tpu"]
# Best first.
BACKENDS: dict[str, Any] = {
    "mosaic_gpu": Later("maxstack.kernels.paged_attention.mosaic_gpu"),
    "mosaic_tpu": Later("maxstack.kernels.paged_attention.mosaic_tpu"),
    "cpu_native": native,
    "xla": xla,
    "reference": reference,
}


def paged_attention(
    q: Float[Array, "b n h"] | Float[Array, "b t n h"],
    cache: KVCache,
    page_table_bp: Table,
    lengths_b: Lengths,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "n"] | None = None,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    debug: bool = False,
) -> Array | tuple[Array, Array]:
    """Softmax attention of the last token, or the last `t` tokens, of each sequence over its pages.

    Position `s` of sequence `b` is in page `page_table_bp[b, s // page]` of the pool. `lengths_b` counts the positions
    in the cache, those of the queries included (`append_kv` wrote them before): query `j` of `t` stands at position
    `lengths_b - t + j`, sees no later key and, with a `window`, only the last `window` positions up to its own.
    `n // k` query heads share a kv head. `scale` is `h**-0.5` unless given; `softcap` c makes logits
    `c·tanh(logits/c)`; `sinks` are one more logit a head that takes weight and gives no value.

    Pages are read as they are: the scale of a key multiplies its logits, that of a value its weight, and no
    dequantized copy exists. `splits` (chosen unless given) parts of each sequence are computed apart and merged by
    their log-sum-exp: the result is that of one part but for the roundings of one weighted sum in float32.

    Returns the output in the shape and dtype of the queries and, with `return_lse`, the log-sum-exp of the logits
    (sink included) in float32, without the last dimension. A query that sees no key (length 0, or a position before
    the first) gets 0 and -inf (or its sink). Not differentiable.

    What no query sees may be anything, NaN too. Of `t` queries the last may be padding, whose keys nobody wrote: a
    value that some of the queries see and others do not counts as 0 where it is not finite, so that these are right.

    Entries of the table that are no page of the pool hide their positions, as do positions past the table; nothing of
    another sequence is seen through them. `debug` looks for them, and for lengths beyond the table, where a position
    below the length needs them, and raises ValueError (inside of `jax.jit` a JaxRuntimeError, when it runs).

    Raises ValueError for shapes that disagree, TypeError for dtypes, Unsupported for a backend that cannot serve the
    call and for arrays on a mesh with explicit axes: call it inside `jax.shard_map`, heads or sequences cut.
    """
    q_btnh = _queries("paged_attention", q, cache, page_table_bp, lengths_b, sinks)
    kv_heads = cache.k_pages.shape[1]
    if q_btnh.shape[2] % kv_heads:
        raise ValueError(
            f"paged_attention: query heads {q_btnh.shape[2]} must be a multiple of kv heads {kv_heads}"
        )
    _check_cache(cache)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = _options("paged_attention", window, softcap, scale, splits)
    out, lse = _run(
        q_btnh, cache, page_table_bp, lengths_b, sinks, options, splits, q.shape[-1], implementation, debug
    )
    out, lse = (out[:, 0], lse[:, 0]) if q.ndim == 3 else (out, lse)
    return (out, lse) if return_lse else out


def latent_paged_attention(
    q: Float[Array, "b n h"] | Float[Array, "b t n h"],
    cache: LatentCache,
    page_table_bp: Table,
    lengths_b: Lengths,
    *,
    value_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "n"] | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    debug: bool = False,
) -> Array | tuple[Array, Array]:
    """`paged_attention` over latents (multi-head latent attention, DeepSeek-V2, arXiv:2405.04434), absorbed form.

    All heads share one key a token, the latent with its rotated part behind it (`h` = latent + RoPE), and its first
    `value_size` components are the value. Queries are already multiplied into the latent's space; the output
    [..., n, value_size] still is to be multiplied out of it. `scale` is that of the unabsorbed heads, so it is given.
    """
    q_btnh = _queries("latent_paged_attention", q, cache, page_table_bp, lengths_b, sinks)
    _check_latents(cache)
    if not 1 <= value_size <= q.shape[-1]:
        raise ValueError(
            f"latent_paged_attention: values are the first {value_size} of {q.shape[-1]} components; "
            f"give a value_size of 1 to {q.shape[-1]}"
        )
    options = _options("latent_paged_attention", window, softcap, scale, splits)
    out, lse = _run(
        q_btnh, cache, page_table_bp, lengths_b, sinks, options, splits, value_size, implementation, debug
    )
    out, lse = (out[:, 0], lse[:, 0]) if q.ndim == 3 else (out, lse)
    return (out, lse) if return_lse else out


def bytes_moved(
    cache: KVCache | LatentCache, lengths: Int[np.ndarray, "b"], q_shape: tuple[int, ...], *,
    window: int | None = None, value_size: int | None = None, q_bytes: int = 2,
) -> int:  # fmt: skip
    """Bytes a call must move at the least: keys, values and scales that some query sees once, queries, outputs.

    Arrays of `cache` may be shapes (`jax.eval_shape`). The table, 4 bytes a page, and partial results are left out.
    """
    tokens = q_shape[1] if len(q_shape) == 4 else 1
    seen = np.asarray(lengths, np.int64)
    if window is not None:
        seen = np.minimum(seen, window + tokens - 1)
    pools = [pool for pool in cache if pool is not None]
    pages_and_tokens = pools[0].shape[0] * page_size(cache)
    bits = sum(pool.size * (4 if pool.dtype == jnp.int4 else 8 * pool.dtype.itemsize) for pool in pools)
    width = q_shape[-1] if value_size is None else value_size
    around = int(np.prod(q_shape[:-1])) * (q_shape[-1] + width) * q_bytes
    return int(seen.sum()) * (bits // 8 // pages_and_tokens) + around


def _run(q_btnh, cache, page_table_bp, lengths_b, sinks, options, splits, value_size, implementation, debug):
    """Output in the dtype of the queries and float32 log-sum-exp, [b, t, n, …]."""
    pool, entries = _pool(cache).shape[0], page_table_bp.shape[1]
    if debug:
        _check_table(page_table_bp, lengths_b, q_btnh.shape[1], options.window, pool, page_size(cache))
    declined = {
        name: elsewhere(name) or backend.declined(q_btnh, cache, value_size)
        for name, backend in BACKENDS.items()
    }
    backend = BACKENDS[choose("paged_attention", implementation, declined, named_only=("reference",))]
    if splits is None:
        splits = backend.default_splits(q_btnh, cache, entries)
    table_bp, lengths_b = plan.usable(page_table_bp, pool), jnp.asarray(lengths_b, jnp.int32)
    options = replace(options, splits=splits, final=splits == 1 and sinks is None)
    out_parts, lse_parts = backend.paged_attention(q_btnh, cache, table_bp, lengths_b, options, value_size)
    out, lse = plan.merged(out_parts, lse_parts, sinks)
    return out.astype(q_btnh.dtype), lse


def _options(operation: str, window, softcap, scale: float, splits) -> Options:
    if window is not None and window < 1:
        raise ValueError(
            f"{operation}: window is {window} positions; it must be at least 1 (the query itself)"
        )
    if splits is not None and splits < 1:
        raise ValueError(f"{operation}: splits is {splits}; it must be at least 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{operation}: softcap is {softcap}; it must be positive, or None for no cap")
    return Options(window=window, softcap=softcap, scale=scale)


def _queries(operation: str, q, cache, page_table_bp, lengths_b, sinks) -> Array:
    """Queries [b, t, n, h]; checks what all forms share."""
    if q.ndim not in (3, 4):
        raise ValueError(f"{operation}: q must be [b, n, h] or [b, t, n, h], not {q.shape}")
    if page_table_bp.ndim != 2 or lengths_b.ndim != 1:
        raise ValueError(
            f"{operation}: the page table must be [b, pages] and lengths [b], "
            f"not {page_table_bp.shape} and {lengths_b.shape}"
        )
    if not q.shape[0] == page_table_bp.shape[0] == lengths_b.shape[0]:
        raise ValueError(
            f"{operation}: {q.shape[0]} sequences of queries, {page_table_bp.shape[0]} of the page table and "
            f"{lengths_b.shape[0]} lengths; they must agree"
        )
    if q.shape[-1] != head_size(cache):
        raise ValueError(
            f"{operation}: queries have {q.shape[-1]} components, cached keys {head_size(cache)}"
        )
    if sinks is not None and sinks.shape != q.shape[-2:-1]:
        raise ValueError(
            f"{operation}: sinks {sinks.shape} must have one number for each of {q.shape[-2]} query heads"
        )
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"{operation}: queries must be bfloat16 or float32, not {q.dtype}")
    for name, array in (("page table", page_table_bp), ("lengths", lengths_b)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{operation}: {name} must be integers, not {array.dtype}")
    arrays = (q, _pool(cache), *(a for a in (page_table_bp, lengths_b) if isinstance(a, jax.Array)))
    if explicit_mesh(*arrays) is not None:
        cut = ", ".join(str(jax.typeof(a)) for a in arrays)
        raise Unsupported(f"{operation}: {cut} lie on a mesh; call it inside jax.shard_map, on local arrays")
    return q if q.ndim == 4 else q[:, None]


def _pool(cache: KVCache | LatentCache) -> Array:
    return cache.pages if isinstance(cache, LatentCache) else cache.k_pages


def _check_cache(cache: KVCache) -> None:
    k, v = cache.k_pages, cache.v_pages
    if k.shape[:2] != v.shape[:2] or k.shape[2] != v.shape[3] or k.dtype != v.dtype:
        raise ValueError(
            f"paged_attention: key pages {k.shape} {k.dtype} and value pages {v.shape} {v.dtype} disagree; "
            "init_cache makes them"
        )
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    _check_pages("paged_attention", k.dtype, k.shape[:3], scales)


def _check_latents(cache: LatentCache) -> None:
    pages = cache.pages
    _check_pages("latent_paged_attention", pages.dtype, pages.shape[::2], {"scale": cache.scale})


def _check_pages(operation: str, dtype, shape: tuple[int, ...], scales: dict[str, Array | None]) -> None:
    """Pages of a type that is known, with scales of `shape` if they hold integers and with none if they do not."""
    integers = dtype in (jnp.int8, jnp.uint8, jnp.int4)
    for name, scale in scales.items():
        if (scale is not None) != integers or (scale is not None and scale.shape != shape):
            raise ValueError(
                f"{operation}: {name} is {None if scale is None else scale.shape}; pages of {dtype} take "
                f"{shape if integers else None}"
            )
    if not integers and dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(
            f"{operation}: pages must be bfloat16, float32, int8 or int4 (uint8 in pairs), not {dtype}"
        )


def _check_table(page_table_bp, lengths_b, t: int, window: int | None, pool: int, page: int) -> None:
    """Raises now for numbers at hand, when the program runs for traced ones."""

    def check(table, lengths):
        table, lengths = np.asarray(table), np.asarray(lengths)
        room = table.shape[1] * page
        for b in np.flatnonzero((lengths > room) | (lengths < 0)):
            raise ValueError(
                f"paged_attention: sequence {b} has length {lengths[b]}; its {table.shape[1]} pages of {page} "
                f"hold 0 to {room}"
            )
        seen_from = np.zeros_like(lengths) if window is None else lengths - t - window + 1
        starts = np.arange(table.shape[1]) * page
        needed = (starts < lengths[:, None]) & (starts + page > seen_from[:, None])
        for b, p in np.argwhere(needed & ((table < 0) | (table >= pool))):
            raise ValueError(
                f"paged_attention: page {p} of sequence {b} (length {lengths[b]}) is entry {table[b, p]}; "
                f"the pool has pages 0 to {pool - 1}"
            )

    if isinstance(page_table_bp, jax.core.Tracer) or isinstance(lengths_b, jax.core.Tracer):
        jax.debug.callback(check, page_table_bp, lengths_b)
    else:
        check(page_table_bp, lengths_b)
