"""Attention of new tokens against a cache that is only read: what is cached and what is new are merged at the end.

A layer gets its cache and returns the new tokens' rows; whoever holds the cache writes them. On XLA:CPU a cache that is
written and read in one program is copied whole, several times a step (look for `copy(` of its shape in the compiled
text); elsewhere both forms are the same.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native
from maxstack.kernels.attention import attention

# Of an empty slot: later than any query, so that causality hides it.
NOWHERE = 2**30


class KVCache(NamedTuple):
    """Keys and values of one layer, slot = position. What lies past a row's length is never visible.

    Heads stand before slots: products over [slots, head size] are contiguous for each head.
    """

    k_bksh: Float[Array, "b k s h"]
    v_bksw: Float[Array, "b k s w"]


Attended = tuple[Float[Array, "b t n w"], Float[Array, "b t n"]]


def attend(
    q_btnh: Float[Array, "b t n h"], k_btkh: Float[Array, "b t k h"], v_btkw: Float[Array, "b t k w"],
    cache: KVCache, positions_bt: Int[Array, "b t"], *, sinks: Float[Array, "n"] | None = None,
    native: bool = False, **options: Any,
) -> tuple[Float[Array, "b t n w"], KVCache]:  # fmt: skip
    """What the new tokens see of the cache and of each other, and their rows for the cache.

    A row's cache is filled up to its first position here. `options` are those of `kernels.attention`: window, softcap,
    scale, implementation.
    """
    rows = KVCache(*(jnp.swapaxes(new, 1, 2).astype(cache.k_bksh.dtype) for new in (k_btkh, v_btkw)))
    if q_btnh.shape[1] == 1:
        one = native_one_token if native and q_btnh.dtype == cache.k_bksh.dtype == jnp.float32 else one_token
        return one(q_btnh, rows, cache, positions_bt[:, 0], sinks, **options), rows
    own = attention(q_btnh, k_btkh, v_btkw, sinks=sinks, return_lse=True, **options)
    return merge(own, attend_past(q_btnh, cache, positions_bt, **options)), rows


def attend_past(
    q_btnh: Float[Array, "b t n h"], cache: KVCache, positions_bt: Int[Array, "b t"], **options: Any
) -> Attended:
    """What queries see of the cache alone, and the log-sum-exp of their logits."""
    slots = cache.k_bksh.shape[2]
    if slots == 0:
        shape = (*q_btnh.shape[:3], cache.v_bksw.shape[-1])
        return jnp.zeros(shape, q_btnh.dtype), jnp.full(shape[:3], -jnp.inf, jnp.float32)
    slot = jnp.arange(slots, dtype=jnp.int32)
    at_bs = jnp.where(slot < positions_bt[:, :1], slot, NOWHERE)
    k, v = (jnp.swapaxes(leaf, 1, 2).astype(q_btnh.dtype) for leaf in cache)
    return attention(q_btnh, k, v, positions=(positions_bt, at_bs), return_lse=True, **options)


def merge(a: Attended, b: Attended) -> Float[Array, "b t n w"]:
    """Softmax attention over the keys of both. A query that sees nothing in one of them takes the other."""
    lse = jnp.logaddexp(a[1], b[1])

    def share(y: Array, part: Array) -> Array:
        return y.astype(jnp.float32) * jnp.where(part == -jnp.inf, 0.0, jnp.exp(part - lse))[..., None]

    return (share(*a) + share(*b)).astype(a[0].dtype)


def one_token(
    q_b1nh: Float[Array, "b 1 n h"], rows: KVCache, cache: KVCache, lengths_b: Int[Array, "b"],
    sinks_n: Float[Array, "n"] | None, *, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, implementation: str = "auto",
) -> Float[Array, "b 1 n w"]:  # fmt: skip
    """`attend` for one new token a row: a product with all keys, in float32 between, no blocks."""
    b, _, n, h = q_b1nh.shape
    k, slots = cache.k_bksh.shape[1:3]
    q_bkgh = q_b1nh.reshape(b, k, n // k, h)
    scale = h**-0.5 if scale is None else scale

    def logits(keys: Array) -> Array:
        found = jnp.einsum(
            "bkgh,bksh->bkgs", q_bkgh, keys.astype(q_bkgh.dtype), preferred_element_type=jnp.float32
        )
        found = found * scale
        return found if softcap is None else softcap * jnp.tanh(found / softcap)

    slot = jnp.arange(slots, dtype=jnp.int32)
    seen_bs = slot < lengths_b[:, None]
    if window is not None:
        seen_bs &= lengths_b[:, None] - slot < window
    past = jnp.where(seen_bs[:, None, None], logits(cache.k_bksh), -jnp.inf)
    own = logits(rows.k_bksh)
    top = jnp.maximum(jnp.max(past, -1, keepdims=True, initial=-jnp.inf), own)
    sinks = None if sinks_n is None else sinks_n.astype(jnp.float32).reshape(1, k, n // k, 1)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    weights, own = jnp.exp(past - top), jnp.exp(own - top)
    total = weights.sum(-1, keepdims=True) + own
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    weights = weights.astype(q_bkgh.dtype)
    y = jnp.einsum(
        "bkgs,bksw->bkgw", weights, cache.v_bksw.astype(weights.dtype), preferred_element_type=jnp.float32
    )
    y = (y + own * rows.v_bksw.astype(jnp.float32)) / total
    return y.astype(q_bkgh.dtype).reshape(b, 1, n, -1)


def native_one_token(
    q_b1nh: Float[Array, "b 1 n h"], rows: KVCache, cache: KVCache, lengths_b: Int[Array, "b"],
    sinks_n: Float[Array, "n"] | None, *, window: int | None = None, softcap: float | None = None,
    scale: float | None = None, implementation: str = "auto",
) -> Float[Array, "b 1 n w"]:  # fmt: skip
    """`one_token`, in C++."""
    b, _, n, h = q_b1nh.shape
    k = cache.k_bksh.shape[1]
    y = cpu_native.cached_attention(
        q_b1nh.reshape(b, k, n // k, h), rows.k_bksh, rows.v_bksw, cache.k_bksh, cache.v_bksw, lengths_b,
        None if sinks_n is None else sinks_n.astype(jnp.float32).reshape(k, n // k),
        scale=h**-0.5 if scale is None else scale, softcap=softcap, window=window,
    )  # fmt: skip
    return y.reshape(b, 1, n, -1)


def write(
    cache_bs: Array, rows_bt: Array, positions_bt: Int[Array, "b t"], axis: int, layer: Array | None = None
) -> Array:
    """The cache with new rows at their positions on `axis`; positions past the end are dropped.

    With `layer` the cache is that of all layers, stacked in front, and the rows are of that one.
    """
    index: list[Any] = [slice(None)] * rows_bt.ndim
    index[0], index[axis] = jnp.arange(rows_bt.shape[0])[:, None], positions_bt
    values = jnp.moveaxis(rows_bt, axis, 1).astype(cache_bs.dtype)
    return cache_bs.at[tuple(index) if layer is None else (layer, *index)].set(values, mode="drop")


def slot_axes(init_cache: Any) -> Any:
    """The axis of the slots in each leaf of a layer's cache, given its config's `init_cache`."""
    one, two = (jax.eval_shape(lambda n=n: init_cache(1, n, jnp.dtype(jnp.float32))) for n in (1, 2))
    return jax.tree.map(
        lambda a, b: next(i for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if x != y),
        one,
        two,
    )
