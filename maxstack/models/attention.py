"""Grouped-query attention: query, key and value maps, optional norms, rotation, the kernel, the way out."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxstack.config import UserError
from maxstack.kernels import paged_attention as pages
from maxstack.kernels.attention import Implementation, attention
from maxstack.models.cached import KVCache, attend
from maxstack.models.layers import Identity, Linear, RMSNormConfig, constant, require
from maxstack.models.paged.layer import Paged
from maxstack.models.paged.layer import attend as attend_pages
from maxstack.models.rope import RopeConfig, RopeTables, rotate


class Context(NamedTuple):
    """What every layer knows of its tokens: where each stands, and in which document."""

    positions_bt: Int[Array, "b t"]
    segment_ids_bt: Int[Array, "b t"] | None
    implementation: Implementation = "auto"
    collect: tuple[str, ...] = ()
    native: bool = False
    """One token against a cache is left to `kernels.cpu_native`."""

    @property
    def real_bt(self) -> Bool[Array, "b t"] | None:
        """Which tokens are no padding; None where all count."""
        return None if self.segment_ids_bt is None else self.segment_ids_bt > 0


def write_rows(cache_bs: Array, rows_bt: Array, positions_bt: Int[Array, "b t"]) -> Array:
    """The cache with `rows` written at `positions` of each batch row; positions past the end are dropped."""
    batch = jnp.arange(cache_bs.shape[0])[:, None]
    return cache_bs.at[batch, positions_bt].set(rows_bt.astype(cache_bs.dtype), mode="drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; divides heads."""
    head_size: int
    """Dimensions of each head."""
    rope: RopeConfig | None = RopeConfig()
    """Rotary embedding; None leaves positions out."""
    qk_norm: RMSNormConfig | None = None
    """Norm of each query and key head before rotation."""
    qk_norm_over_heads: bool = False
    """The q/k norm runs over all heads together, as in OLMo 2."""
    qkv_bias: bool = False
    """Learned offsets on query, key and value."""
    output_bias: bool = False
    """Learned offset on the output."""
    window: int | None = None
    """A query sees itself and the window - 1 tokens before it (tokens); None sees all."""
    softcap: float | None = None
    """Logits l become softcap * tanh(l / softcap)."""
    scale: float | None = None
    """Factor on the logits; None is 1 / sqrt(head_size)."""
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and carries no value, as in GPT-OSS."""
    returns_rows: ClassVar[bool] = True
    """With a cache the layer returns the new tokens' rows of it, not the cache with them in."""

    def __post_init__(self):
        require("attention", self, 1, "heads", "kv_heads", "head_size")
        if self.heads % self.kv_heads:
            raise UserError(f"query heads {self.heads} must be a multiple of kv heads {self.kv_heads}")
        if self.window is not None and self.window < 1:
            raise UserError(f"attention window is {self.window} tokens: it must be at least 1, or None")
        if self.softcap is not None and self.softcap <= 0:
            raise UserError(f"attention softcap is {self.softcap}: it must be above 0, or None")
        if self.rope is not None:
            self.rope.rotated(self.head_size)

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "Attention":
        return Attention(self, key, width, residual_scale)

    def rope_tables(self) -> tuple[tuple[RopeConfig, int], ...]:
        """The rotary configs that this layer reads, each with its head size."""
        return () if self.rope is None else ((self.rope, self.head_size),)

    def flops_per_key(self) -> int:
        """Forward FLOPs of one query token against one key, all heads: scores and values."""
        return 4 * self.heads * self.head_size

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
        shape = (batch, self.kv_heads, length, self.head_size)
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def init_pages(self, count: int, page: int, dtype: pages.PageType) -> pages.KVCache:
        """A pool of `count` pages with `page` tokens each."""
        return pages.init_cache(count, self.kv_heads, self.head_size, page, dtype)


class Attention(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d]."""

    def __init__(self, config: AttentionConfig, key: jax.Array, width: int, residual_scale: float):
        keys = jax.random.split(key, 4)
        n, k, h = config.heads, config.kv_heads, config.head_size
        self.config = config
        self.q = Linear(keys[0], (width, n, h), ("embed", "heads", "head_dim"), bias=config.qkv_bias)
        self.k = Linear(keys[1], (width, k, h), ("embed", "kv_heads", "head_dim"), bias=config.qkv_bias)
        self.v = Linear(keys[2], (width, k, h), ("embed", "kv_heads", "head_dim"), bias=config.qkv_bias)
        out_axes = ("heads", "head_dim", "embed")
        self.o = Linear(
            keys[3], (n, h, width), out_axes, contract=2, bias=config.output_bias, scale=residual_scale
        )
        self.q_norm, self.k_norm = head_norm(config, n), head_norm(config, k)
        self.sinks = constant(0.0, (n,), ("heads",)) if config.sinks else None

    def __call__(
        self, x: Float[Array, "b t d"], tables: RopeTables, context: Context,
        cache: KVCache | Paged | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:  # fmt: skip
        c = self.config
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        if c.rope is not None:
            table = tables[c.rope, c.head_size]
            q, k = rotate(q, table), rotate(k, table)
        options = {
            "window": c.window, "softcap": c.softcap, "scale": c.scale, "implementation": context.implementation,
            "sinks": None if self.sinks is None else self.sinks[...],
        }  # fmt: skip
        if cache is None:
            y = attention(q, k, v, segment_ids=context.segment_ids_bt, **options)
        elif isinstance(cache, Paged):
            y, cache = attend_pages(q, k, v, cache, context.positions_bt, **options)
        else:
            y, cache = attend(q, k, v, cache, context.positions_bt, native=context.native, **options)
        return self.o(y), cache


class AllHeadsNorm(nnx.Module):
    """One norm over all heads of a token together."""

    def __init__(self, config: RMSNormConfig, heads: int, head_size: int):
        self.norm = config.build(heads * head_size)

    def __call__(self, x_btnh: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
        return self.norm(x_btnh.reshape(*x_btnh.shape[:2], -1)).reshape(x_btnh.shape)


def head_norm(config: AttentionConfig, heads: int) -> nnx.Module:
    """The norm of query or key heads that `config` asks for."""
    if config.qk_norm is None:
        return Identity()
    if config.qk_norm_over_heads:
        return AllHeadsNorm(config.qk_norm, heads, config.head_size)
    return config.qk_norm.build(config.head_size)
