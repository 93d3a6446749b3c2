"""One layer: attention and feed-forward, each with its norms, around the residual stream."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxstack.config import UserError
from maxstack.models.attention import AttentionConfig, Context
from maxstack.models.feed_forward import Aux, FeedForwardConfig
from maxstack.models.layers import Identity, LayerNormConfig, NormConfig, RMSNormConfig
from maxstack.models.mla import MLAConfig
from maxstack.models.moe import MoEConfig
from maxstack.models.rope import RopeConfig, RopeTables

# A pytree that the attention's config makes: KVCache, LatentCache, or one of a user's own.
Cache = Any


@runtime_checkable
class AttentionPart(Protocol):
    """What a block needs of an attention's config: any frozen dataclass with these methods will do."""

    def build(self, key: jax.Array, width: int, residual_scale: float) -> nnx.Module:
        """A module called as `(x, tables, context, cache) -> (y, cache)`; see Attention."""
        ...

    def rope_tables(self) -> tuple[tuple[RopeConfig, int], ...]: ...

    def flops_per_key(self) -> int: ...

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any: ...


@runtime_checkable
class FeedForwardPart(Protocol):
    """What a block needs of a feed-forward's config: any frozen dataclass with this method will do."""

    def build(self, key: jax.Array, width: int, residual_scale: float) -> nnx.Module:
        """A module called as `(x, real_bt) -> (y, aux)`; see FeedForward."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """A transformer layer. Its parts may be configs of your own (docs/extend.md)."""

    attention: AttentionConfig | MLAConfig | AttentionPart
    """How tokens look at each other."""
    feed_forward: FeedForwardConfig | MoEConfig | FeedForwardPart
    """What is done to each token."""
    norm: RMSNormConfig | LayerNormConfig | NormConfig = RMSNormConfig()
    """The kind of norm."""
    pre_norm: bool = True
    """Norm on the way into attention and feed-forward."""
    post_norm: bool = False
    """Norm on the way out of attention and feed-forward."""
    residual_multiplier: float = 1.0
    """Factor on what each part adds to the residual stream, as in Granite."""

    def __post_init__(self):
        if not (self.pre_norm or self.post_norm):
            raise UserError(
                "block: pre_norm and post_norm are both off; a layer without norms does not train"
            )

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "Block":
        return Block(self, key, width, residual_scale)


class Block(nnx.Module):
    """`config` as a layer of the residual stream."""

    def __init__(self, config: BlockConfig, key: jax.Array, width: int, residual_scale: float):
        attention_key, feed_forward_key = jax.random.split(key)

        def norm(present: bool) -> nnx.Module:
            return config.norm.build(width) if present else Identity()

        self.attention_norm, self.attention_post_norm = norm(config.pre_norm), norm(config.post_norm)
        self.feed_forward_norm, self.feed_forward_post_norm = norm(config.pre_norm), norm(config.post_norm)
        # Any: a module's call is not part of its type.
        self.attention: Any = config.attention.build(attention_key, width, residual_scale)
        self.feed_forward: Any = config.feed_forward.build(feed_forward_key, width, residual_scale)
        self.multiplier = config.residual_multiplier

    def __call__(
        self, x: Float[Array, "b t d"], tables: RopeTables, context: Context,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache | None, Aux]:  # fmt: skip
        attended, cache = self.attention(self.attention_norm(x), tables, context, cache)
        attended = self.attention_post_norm(attended)
        x = x + scaled(attended, self.multiplier)
        fed, aux = self.feed_forward(self.feed_forward_norm(x), context.real_bt)
        fed = self.feed_forward_post_norm(fed)
        x = x + scaled(fed, self.multiplier)
        seen = {"attention": attended, "feed_forward": fed, "residual": x}
        return x, cache, aux | taps(context, seen)


def scaled(x: Float[Array, "b t d"], factor: float) -> Float[Array, "b t d"]:
    """x times a factor that is not rounded to x's type first: it would be the same error in every layer."""
    return x if factor == 1.0 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def taps(context: Context, seen: Aux) -> Aux:
    """Of the activations that a block has `seen`, those that were asked for. Raises UserError for one it has not."""
    if unknown := set(context.collect) - seen.keys():
        raise UserError(f"collect: no activation {sorted(unknown)}; a block has {sorted(seen)}")
    return {f"tap.{name}": seen[name] for name in context.collect}
