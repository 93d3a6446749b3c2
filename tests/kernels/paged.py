"""Caches in pages made in numpy, and attention over them in float64: nothing here calls what is tested."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.kernels.paged_attention import KVCache, LatentCache

PAGE_TYPES = ("float32", "bfloat16", "int8", "int4", "packed int4")


class Paged(NamedTuple):
    """Sequences of keys and values as attention sees them (float64, after rounding), and their cache."""

    k: np.ndarray  # [b, s, k, h]
    v: np.ndarray
    cache: KVCache
    table: np.ndarray  # [b, p]
    lengths: np.ndarray  # [b]


def rounded(x, kind):
    """(numbers as the pages hold them, scale a row or None, what they stand for in float64)."""
    if kind in ("float32", "bfloat16"):
        numbers = x.astype(jnp.dtype(kind))
        return numbers, None, numbers.astype(np.float64)
    largest = 127 if kind == "int8" else 7
    scale = (np.abs(x).max(-1) / largest).astype(np.float32)
    numbers = np.rint(x / np.where(scale > 0, scale, 1)[..., None]).clip(-largest, largest).astype(np.int8)
    return numbers, scale, numbers * scale[..., None].astype(np.float64)


def packed(numbers, axis):
    low, high = np.split(numbers.view(np.uint8), 2, axis)
    return (low & 15) | (high << 4)


def held(numbers, kind, axis):
    """An array of pages, as jax holds it; `axis` counts components."""
    if kind == "packed int4":
        return jnp.asarray(packed(numbers, axis))
    return jnp.asarray(numbers).astype(jnp.int4) if kind == "int4" else jnp.asarray(numbers)


def paged(lengths, *, heads=2, size=8, page=8, entries=4, spare=3, kind="float32", seed=0) -> Paged:
    """Random sequences in pages that lie anywhere. What belongs to no sequence is nan, or the largest number."""
    random = np.random.default_rng(seed)
    b, lengths = len(lengths), np.asarray(lengths, np.int32)
    pool = b * entries + spare
    table = random.permutation(pool)[: b * entries].reshape(b, entries).astype(np.int32)
    pools, seen = [], []
    for axis in (3, 2):
        rows, scale, exact = rounded(random.normal(size=(b, entries * page, heads, size)), kind)
        pages = np.full((pool, heads, page, size), np.nan if scale is None else 7, rows.dtype)
        scales = None if scale is None else np.full((pool, heads, page), np.nan, np.float32)
        for i, s in itertools.product(range(b), range(entries * page)):
            if s < lengths[i]:
                pages[table[i, s // page], :, s % page] = rows[i, s]
                if scales is not None:
                    scales[table[i, s // page], :, s % page] = scale[i, s]
        pages = pages if axis == 3 else np.ascontiguousarray(np.swapaxes(pages, 2, 3))
        pools += [held(pages, kind, axis), None if scales is None else jnp.asarray(scales)]
        seen.append(exact)
    k_pages, k_scale, v_pages, v_scale = pools
    return Paged(seen[0], seen[1], KVCache(k_pages, v_pages, k_scale, v_scale), table, lengths)


def moved(made: Paged, seed: int = 3) -> Paged:
    """The same sequences in other pages."""
    to = np.random.default_rng(seed).permutation(len(made.cache.k_pages))
    cache = jax.tree.map(lambda pool: jnp.zeros_like(pool).at[to].set(pool), made.cache)
    return made._replace(cache=cache, table=to[made.table].astype(np.int32))


def stale(made: Paged, value: float) -> Paged:
    """The same sequences in pages whose other slots hold `value`: what an earlier owner may have left."""
    fill = lambda pool: jnp.where(jnp.isnan(pool), jnp.asarray(value, pool.dtype), pool)  # noqa: E731
    k, v, *scales = made.cache
    return made._replace(cache=KVCache(fill(k), fill(v), *scales))


def latent_cache(made: Paged, kind: str) -> LatentCache:
    """The keys of a cache with one head, as latents."""
    pages = np.swapaxes(np.asarray(made.cache.k_pages)[:, 0], 1, 2)
    return LatentCache(
        jnp.asarray(pages), None if made.cache.k_scale is None else made.cache.k_scale[:, 0]
    )  # fmt: skip


def brute_force(q, k, v, lengths, *, window=None, softcap=None, sinks=None, scale=None, hidden=()):
    """Output and log-sum-exp, one query and head at a time; `hidden` has (sequence, position) pairs to leave out."""
    b, t, n, h = q.shape
    out, lse = np.zeros((b, t, n, v.shape[-1])), np.full((b, t, n), -np.inf)
    for i, j, head in itertools.product(range(b), range(t), range(n)):
        at, kv_head = lengths[i] - t + j, head // (n // k.shape[2])
        first = 0 if window is None else max(0, at - window + 1)
        seen = [s for s in range(first, min(at + 1, k.shape[1])) if (i, s) not in hidden]
        logits = k[i, seen, kv_head] @ q[i, j, head] * (h**-0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        terms = [*logits, *([] if sinks is None else [sinks[head]])]
        if terms:
            lse[i, j, head] = np.logaddexp.reduce(terms)
            out[i, j, head] = np.exp(logits - lse[i, j, head]) @ v[i, seen, kv_head]
    return out, lse


def queries(b, t, n, h, dtype="float32", seed=1) -> Any:
    """Random queries of size 1, rounded to `dtype`."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, t, n, h)), jnp.dtype(dtype))
