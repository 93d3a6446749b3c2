"""Multi-head latent attention: keys and values are rebuilt from one small latent per token (arXiv:2405.04434)."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels import paged_attention as pages
from maxstack.kernels.attention import attention
from maxstack.models.attention import Context
from maxstack.models.cached import KVCache, attend, attend_past, merge
from maxstack.models.layers import Identity, Linear, RMSNormConfig, require
from maxstack.models.paged.layer import Paged, as_stored, attend_latent, attend_past_latents, one_token
from maxstack.models.rope import RopeConfig, RopeTables, rotate


class LatentCache(NamedTuple):
    """The latent of one layer and behind it the rotated key part, slot = position."""

    latent_bsr: Float[Array, "b s r"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention, as in DeepSeek-V2 and V3."""

    heads: int
    """Heads."""
    kv_rank: int
    """Size of the latent that keys and values are rebuilt from."""
    q_rank: int | None = None
    """Size of the query latent; None maps queries directly."""
    nope_size: int = 128
    """Dimensions of each query/key head without position."""
    rope_size: int = 64
    """Dimensions of each query/key head with position; the key's are shared by all heads."""
    v_size: int = 128
    """Dimensions of each value head."""
    rope: RopeConfig = RopeConfig()
    """Rotary embedding of the part with position."""
    norm: RMSNormConfig = RMSNormConfig()
    """Norm of the latents."""
    bias: bool = False
    """Learned offsets on the maps to the latents and to the rotated key part, and on the output."""
    scale: float | None = None
    """Factor on the logits; None is 1 / sqrt(nope_size + rope_size)."""
    returns_rows: ClassVar[bool] = True
    """With a cache the layer returns the new tokens' rows of it, not the cache with them in."""

    def __post_init__(self):
        require("attention", self, 1, "heads", "kv_rank", "nope_size", "rope_size", "v_size")
        if self.q_rank is not None:
            require("attention", self, 1, "q_rank")
        self.rope.rotated(self.rope_size)

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "LatentAttention":
        return LatentAttention(self, key, width, residual_scale)

    def rope_tables(self) -> tuple[tuple[RopeConfig, int], ...]:
        """The rotary configs that this layer reads, each with its head size."""
        return ((self.rope, self.rope_size),)

    def flops_per_key(self) -> int:
        """Forward FLOPs of one query token against one key, all heads: scores and values."""
        return 2 * self.heads * (self.nope_size + self.rope_size + self.v_size)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> LatentCache:
        return LatentCache(jnp.zeros((batch, length, self.kv_rank + self.rope_size), dtype))

    def init_pages(self, count: int, page: int, dtype: pages.PageType) -> pages.LatentCache:
        """A pool of `count` pages with `page` tokens each."""
        return pages.init_latent_cache(count, self.kv_rank + self.rope_size, page, dtype)


class LatentAttention(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d]."""

    used_whole: ClassVar[tuple[str, ...]] = ("k_up", "v_up")
    """Their matrices go into other products with a cache: they are not packed in few bits."""

    def __init__(self, config: MLAConfig, key: jax.Array, width: int, residual_scale: float):
        keys = jax.random.split(key, 7)
        c, n = config, config.heads
        self.config = config
        q_in, q_axis = (c.q_rank, "q_lora") if c.q_rank else (width, "embed")
        self.q_down = (
            Linear(keys[0], (width, q_in), ("embed", "q_lora"), bias=c.bias) if c.q_rank else Identity()
        )
        self.q_norm = c.norm.build(q_in) if c.q_rank else Identity()
        self.q_up = Linear(keys[1], (q_in, n, c.nope_size + c.rope_size), (q_axis, "heads", "head_dim"))
        self.kv_down = Linear(keys[2], (width, c.kv_rank), ("embed", "kv_lora"), bias=c.bias)
        self.kv_norm = c.norm.build(c.kv_rank)
        self.k_rope = Linear(keys[3], (width, c.rope_size), ("embed", "head_dim"), bias=c.bias)
        self.k_up = Linear(keys[4], (c.kv_rank, n, c.nope_size), ("kv_lora", "heads", "head_dim"))
        self.v_up = Linear(keys[5], (c.kv_rank, n, c.v_size), ("kv_lora", "heads", "head_dim"))
        self.o = Linear(
            keys[6], (n, c.v_size, width), ("heads", "head_dim", "embed"), contract=2, bias=c.bias,
            scale=residual_scale,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "b t d"], tables: RopeTables, context: Context,
        cache: LatentCache | Paged | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:  # fmt: skip
        c, table = self.config, tables[self.config.rope, self.config.rope_size]
        q = self.q_up(self.q_norm(self.q_down(x)))
        q = jnp.concatenate([q[..., : c.nope_size], rotate(q[..., c.nope_size :], table)], -1)
        latent = self.kv_norm(self.kv_down(x))
        k_rope = rotate(self.k_rope(x)[:, :, None, :], table)[:, :, 0]
        if cache is not None:
            if isinstance(cache, Paged):
                y, cache = self.with_pages(q, latent, k_rope, cache, context)
            else:
                y, cache = self.with_cache(q, latent, k_rope, cache, context)
            return self.o(y), cache
        k, v = self.expand(latent, k_rope)
        y = attention(
            q, k, v, segment_ids=context.segment_ids_bt, scale=c.scale, implementation=context.implementation
        )
        return self.o(y), None

    def expand(
        self, latent: Float[Array, "b t r"], k_rope: Float[Array, "b t p"]
    ) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n w"]]:
        """Keys and values of every head."""
        k = self.k_up(latent)
        shared = jnp.broadcast_to(
            k_rope[:, :, None], (*k.shape[:3], k_rope.shape[-1]), out_sharding=jax.typeof(k).sharding
        )
        return jnp.concatenate([k, shared], -1), self.v_up(latent)

    def with_cache(
        self, q: Float[Array, "b t n h"], latent: Float[Array, "b t r"], k_rope: Float[Array, "b t p"],
        cache: LatentCache, context: Context,
    ) -> tuple[Float[Array, "b t n w"], LatentCache]:  # fmt: skip
        """Against the cache the maps to keys and values move to the queries and the output (section 2.1.2 of the
        paper): the latent is one kv head that all heads share, and no key is rebuilt. The new tokens of a chunk see
        each other through keys and values of their own, which takes fewer products."""
        options = {"scale": self.scale, "implementation": context.implementation}
        absorbed = self.absorbed(q)
        row, shared = jnp.concatenate([latent, k_rope], -1), cache.latent_bsr[:, None]
        if q.shape[1] == 1:
            new, cached = row[:, :, None], KVCache(shared, shared)
            y, _ = attend(absorbed, new, new, cached, context.positions_bt, native=context.native, **options)
            return self.to_values(y), LatentCache(row)
        k, v = self.expand(latent, k_rope)
        own = attention(q, k, v, return_lse=True, **options)
        y, lse = attend_past(absorbed, KVCache(shared, shared), context.positions_bt, **options)
        return merge(own, (self.to_values(y), lse)), LatentCache(row)

    def with_pages(
        self, q: Float[Array, "b t n h"], latent: Float[Array, "b t r"], k_rope: Float[Array, "b t p"],
        cache: Paged, context: Context,
    ) -> tuple[Float[Array, "b t n w"], Any]:  # fmt: skip
        """`with_cache` for latents in pages; returns the pool or the rows, see `paged.layer`."""
        options = {"rank": self.config.kv_rank, "scale": self.scale}
        absorbed, row = self.absorbed(q), jnp.concatenate([latent, k_rope], -1)
        if cache.writes:
            y, pool = attend_latent(absorbed, row, cache, **options)
            return self.to_values(y), pool
        kept = as_stored(row, cache.pool.pages.dtype)
        latent, k_rope = kept[..., : latent.shape[-1]], kept[..., latent.shape[-1] :]
        y, lse = attend_past_latents(absorbed, cache, **options)
        if q.shape[1] == 1:
            own = one_token(absorbed, kept[:, :, None], latent[:, :, None], None, self.scale, None)
            return self.to_values(merge(own, (y, lse))), row
        k, v = self.expand(latent, k_rope)
        own = attention(q, k, v, return_lse=True, scale=self.scale, implementation=context.implementation)
        return merge(own, (self.to_values(y), lse)), row

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        c = self.config
        return (c.nope_size + c.rope_size) ** -0.5 if c.scale is None else c.scale

    def absorbed(self, q: Float[Array, "b t n h"]) -> Float[Array, "b t n r"]:
        """Queries that meet latents and their rotated parts, not keys."""
        nope = self.config.nope_size
        met = jnp.einsum("btnh,rnh->btnr", q[..., :nope], self.k_up.matrix(q.dtype))
        return jnp.concatenate([met, q[..., nope:]], -1)

    def to_values(self, y: Float[Array, "b t n r"]) -> Float[Array, "b t n w"]:
        """Weighted latents (and rotated parts, left out here) as weighted values."""
        return jnp.einsum("btnr,rnw->btnw", y[..., : self.config.kv_rank], self.v_up.matrix(y.dtype))
