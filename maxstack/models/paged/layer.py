"""What a layer does with a cache in pages: new tokens see what is cached and each other, and leave their rows.

Two ways. Where a program may write the pool in place and read it, the layer writes first and reads everything from
the pool. XLA:CPU copies a pool that one program writes and reads, so there the layer only reads: what is cached and
what is new are attended apart and merged, and the rows go back to the caller, who writes them in another program.
Both see new keys and values as the pool keeps them, rounded to its type, so that a token's result does not depend on
the chunk that it came in.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack import sharding
from maxstack.kernels.attention import attention
from maxstack.kernels.paged_attention import (
    KVCache,
    LatentCache,
    append_kv,
    append_latent,
    latent_paged_attention,
    paged_attention,
)
from maxstack.kernels.paged_attention.cache import page_size, quantized, unpacked
from maxstack.models.cached import NOWHERE, Attended, merge


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """A layer's part of a pool: the pages of each sequence, and how much of each is filled."""

    pool: Any
    """KVCache or LatentCache of `kernels.paged_attention`, perhaps with the pages of other layers too."""
    table_bp: Int[Array, "b p"]
    """This layer's pages of each sequence; what is no page of the pool is none."""
    lengths_b: Int[Array, "b"]
    """Tokens that the pages hold."""
    counts_b: Int[Array, "b"]
    """New tokens that are real; what pads the rest of a chunk is not written."""
    writes: bool = dataclasses.field(metadata={"static": True})
    """The layer writes its rows and returns the pool; otherwise it returns the rows."""


def attend(
    q_btnh: Float[Array, "b t n h"], k_btkh: Float[Array, "b t k h"], v_btkw: Float[Array, "b t k w"],
    cache: Paged, positions_bt: Int[Array, "b t"], *, sinks: Float[Array, "n"] | None = None,
    implementation: Any = "auto", **options: Any,
) -> tuple[Float[Array, "b t n w"], Any]:  # fmt: skip
    """Attention of new tokens over pages and each other, and the pool with their rows in it, or the rows (k, v).

    `options` are window, softcap and scale, as `kernels.attention` takes them. On a mesh each device has its own heads.
    """
    if sharding.on_one_device():
        return attend_here(
            q_btnh, k_btkh, v_btkw, cache, positions_bt, sinks=sinks, implementation=implementation, **options
        )
    heads = sharding.activation_spec("batch", "sequence", "heads", "head_dim")
    pool, none = pool_spec(cache.pool), jax.P()

    def local(q, k, v, pool, sinks, table_bp, lengths_b, counts_b, positions_bt):
        own = Paged(pool, table_bp, lengths_b, counts_b, writes=True)
        return attend_here(q, k, v, own, positions_bt, sinks=sinks, implementation=implementation, **options)

    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, pool, sharding.activation_spec("heads"), none, none, none, none),
        out_specs=(heads, pool),
        check_vma=False,  # kernels do not say what their results vary over
    )(
        q_btnh,
        k_btkh,
        v_btkw,
        cache.pool,
        sinks,
        cache.table_bp,
        cache.lengths_b,
        cache.counts_b,
        positions_bt,
    )


def pool_spec(pool: Any) -> Any:
    """Keys and values cut by heads; latents, which all heads read, whole."""
    cut = jax.P() if isinstance(pool, LatentCache) else sharding.activation_spec(None, "kv_heads")
    return jax.tree.map(lambda _: cut, pool)


def cut(pools: Any) -> Any:
    """Pools as layers on a mesh have them."""
    kinds = KVCache | LatentCache

    def one(pool: Any) -> Any:
        return jax.tree.map(jax.reshard, pool, pool_spec(pool))

    return jax.tree.map(one, pools, is_leaf=lambda pool: isinstance(pool, kinds))


def attend_here(
    q_btnh: Float[Array, "b t n h"], k_btkh: Float[Array, "b t k h"], v_btkw: Float[Array, "b t k w"],
    cache: Paged, positions_bt: Int[Array, "b t"], *, sinks: Float[Array, "n"] | None = None,
    implementation: Any = "auto", **options: Any,
) -> tuple[Float[Array, "b t n w"], Any]:  # fmt: skip
    """`attend` on one device."""
    t = q_btnh.shape[1]
    if cache.writes:
        pool = append_kv(cache.pool, k_btkh, v_btkw, cache.table_bp, cache.lengths_b, cache.counts_b)
        y: Any = paged_attention(q_btnh, pool, cache.table_bp, cache.lengths_b + t, sinks=sinks, **options)
        return y, pool
    k, v = (as_stored(new, cache.pool.k_pages.dtype) for new in (k_btkh, v_btkw))
    if t == 1:
        own = one_token(q_btnh, k, v, sinks, options["scale"], options["softcap"])
    else:
        own = attention(q_btnh, k, v, sinks=sinks, return_lse=True, implementation=implementation, **options)
    return merge(own, attend_past(q_btnh, cache, positions_bt, implementation, **options)), (k_btkh, v_btkw)


def attend_past(
    q_btnh: Float[Array, "b t n h"], cache: Paged, positions_bt: Int[Array, "b t"], implementation: Any, *,
    window: int | None, softcap: float | None, scale: float | None,
) -> Attended:  # fmt: skip
    """What queries behind the cached tokens see of those."""
    t, options = q_btnh.shape[1], {"softcap": softcap, "scale": scale}
    if window is not None and t > 1:
        return windowed_past(q_btnh, cache, positions_bt, window, implementation, **options)
    if window == 1:
        return jnp.zeros_like(q_btnh), jnp.full(q_btnh.shape[:3], -jnp.inf, jnp.float32)
    k = cache.pool.k_pages.shape[1]
    # As if the query stood at the last cached position, one before its own.
    y, lse = paged_attention(
        beside_each_other(q_btnh, k), cache.pool, cache.table_bp, cache.lengths_b,
        window=None if window is None else window - 1, return_lse=True, **options,
    )  # fmt: skip
    return apart(y, t, k), apart(lse, t, k)


def beside_each_other(q_btnh: Float[Array, "b t n h"], k: int) -> Float[Array, "b m h"]:
    """All queries of a sequence as heads of one: without a window they see the same cached tokens."""
    b, t, n, h = q_btnh.shape
    return q_btnh.reshape(b, t, k, n // k, h).swapaxes(1, 2).reshape(b, t * n, h)


def apart(x_bm: Array, t: int, k: int) -> Array:
    """[b, t, n, …] of what was computed `beside_each_other`."""
    b, m, *rest = x_bm.shape
    return x_bm.reshape(b, k, t, m // (k * t), *rest).swapaxes(1, 2).reshape(b, t, m // t, *rest)


def windowed_past(
    q_btnh: Float[Array, "b t n h"], cache: Paged, positions_bt: Int[Array, "b t"], window: int,
    implementation: Any, **options: Any,
) -> Attended:  # fmt: skip
    """`attend_past` of a chunk whose queries each see their own window: over a copy of the few pages it reaches."""
    page, entries = page_size(cache.pool), cache.table_bp.shape[1]
    first_b = jnp.maximum(cache.lengths_b - window + 1, 0) // page
    count = min((window - 2) // page + 2, entries)
    logical_bc = first_b[:, None] + jnp.arange(count)
    ids_bc = jnp.take_along_axis(cache.table_bp, jnp.minimum(logical_bc, entries - 1), axis=1)
    there_bc = (ids_bc >= 0) & (ids_bc < cache.pool.k_pages.shape[0]) & (logical_bc < entries)
    at_bs = (logical_bc[..., None] * page + jnp.arange(page)).reshape(ids_bc.shape[0], -1)
    there_bs = jnp.repeat(there_bc, page, axis=1) & (at_bs < cache.lengths_b[:, None])
    k, v = rows_of(cache.pool, jnp.where(there_bc, ids_bc, 0))
    # What no query sees may be anything, nan too, and 0 · nan is nan.
    k, v = (jnp.where(there_bs[..., None, None], x, 0).astype(q_btnh.dtype) for x in (k, v))
    at_bs = jnp.where(there_bs, at_bs, NOWHERE).astype(jnp.int32)
    return attention(
        q_btnh, k, v, positions=(positions_bt, at_bs), window=window, return_lse=True,
        implementation=implementation, **options,
    )  # fmt: skip


def rows_of(
    pool: KVCache, ids_bc: Int[Array, "b c"]
) -> tuple[Float[Array, "b s k h"], Float[Array, "b s k h"]]:
    """Keys and values of some pages, one row a token, in float32."""
    k = unpacked(pool.k_pages[ids_bc], 4).astype(jnp.float32)  # b c k page h
    v = jnp.swapaxes(unpacked(pool.v_pages[ids_bc], 3).astype(jnp.float32), 3, 4)
    if pool.k_scale is not None and pool.v_scale is not None:
        k, v = k * pool.k_scale[ids_bc][..., None], v * pool.v_scale[ids_bc][..., None]
    b, c, heads, page, h = k.shape
    k, v = (x.swapaxes(2, 3).reshape(b, c * page, heads, h) for x in (k, v))
    return k, v


def attend_latent(
    absorbed_btnr: Float[Array, "b t n r"],
    row_btr: Float[Array, "b t r"],
    cache: Paged,
    *,
    rank: int,
    scale: float,
) -> tuple[Float[Array, "b t n c"], LatentCache]:
    """Attention over latents, the new ones written first: weighted latents, and the pool."""
    if sharding.on_one_device():
        return attend_latent_here(absorbed_btnr, row_btr, cache, rank=rank, scale=scale)
    heads, none = sharding.activation_spec("batch", "sequence", "heads", None), jax.P()

    def local(absorbed, row, pool, table_bp, lengths_b, counts_b):
        own = Paged(pool, table_bp, lengths_b, counts_b, writes=True)
        return attend_latent_here(absorbed, row, own, rank=rank, scale=scale)

    pool = pool_spec(cache.pool)
    return jax.shard_map(
        local, in_specs=(heads, none, pool, none, none, none), out_specs=(heads, pool), check_vma=False
    )(absorbed_btnr, row_btr, cache.pool, cache.table_bp, cache.lengths_b, cache.counts_b)


def attend_latent_here(
    absorbed_btnr: Float[Array, "b t n r"], row_btr: Float[Array, "b t r"], cache: Paged, *, rank: int, scale: float
) -> tuple[Float[Array, "b t n c"], LatentCache]:  # fmt: skip
    """`attend_latent` on one device."""
    pool = append_latent(cache.pool, row_btr, cache.table_bp, cache.lengths_b, cache.counts_b)
    lengths = cache.lengths_b + row_btr.shape[1]
    y: Any = latent_paged_attention(
        absorbed_btnr, pool, cache.table_bp, lengths, value_size=rank, scale=scale
    )
    return y, pool


def attend_past_latents(
    absorbed_btnr: Float[Array, "b t n r"], cache: Paged, *, rank: int, scale: float
) -> tuple[Float[Array, "b t n c"], Float[Array, "b t n"]]:
    """What queries behind the cached latents see of them: weighted latents, and the log-sum-exp of the logits."""
    y, lse = latent_paged_attention(
        beside_each_other(absorbed_btnr, 1), cache.pool, cache.table_bp, cache.lengths_b, value_size=rank,
        scale=scale, return_lse=True,
    )  # fmt: skip
    t = absorbed_btnr.shape[1]
    return apart(y, t, 1), apart(lse, t, 1)


def one_token(
    q_b1nh: Float[Array, "b 1 n h"], k_b1kh: Float[Array, "b 1 k h"], v_b1kw: Float[Array, "b 1 k w"],
    sinks_n: Float[Array, "n"] | None, scale: float | None, softcap: float | None,
) -> Attended:  # fmt: skip
    """Attention of each token over itself alone, and a sink: its value, weighted."""
    b, _, n, h = q_b1nh.shape
    k = k_b1kh.shape[2]
    q_b1kgh = q_b1nh.reshape(b, 1, k, n // k, h).astype(jnp.float32)
    logits = jnp.einsum("btkgh,btkh->btkg", q_b1kgh, k_b1kh.astype(jnp.float32)).reshape(b, 1, n)
    logits = logits * (h**-0.5 if scale is None else scale)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    v_b1nw = jnp.repeat(v_b1kw, n // k, axis=2)
    if sinks_n is None:
        return v_b1nw.astype(q_b1nh.dtype), logits
    lse = jnp.logaddexp(logits, sinks_n.astype(jnp.float32))
    return (v_b1nw * jnp.exp(logits - lse)[..., None]).astype(q_b1nh.dtype), lse


def as_stored(x: Float[Array, "*rows h"], kind: jnp.dtype) -> Float[Array, "*rows h"]:
    """Keys, values or latents as they come back from a pool of this type."""
    numbers, scale = quantized(x, kind)
    if scale is None:
        return numbers.astype(x.dtype)
    return (unpacked(numbers, -1).astype(jnp.float32) * scale[..., None]).astype(x.dtype)
