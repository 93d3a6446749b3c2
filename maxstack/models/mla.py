"""Multi-head latent attention: keys and values are rebuilt from one small latent per token (arXiv:2405.04434)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels.attention import attention
from maxstack.models.attention import Context, write_rows
from maxstack.models.layers import Identity, Linear, RMSNormConfig, require
from maxstack.models.rope import RopeConfig, RopeTables, rotate


class LatentCache(NamedTuple):
    """The latent and the rotated key part of one layer, slot = position."""

    latent_bsr: Float[Array, "b s r"]
    rope_bsh: Float[Array, "b s h"]


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
    scale: float | None = None
    """Factor on the logits; None is 1 / sqrt(nope_size + rope_size)."""

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
        return LatentCache(
            jnp.zeros((batch, length, self.kv_rank), dtype), jnp.zeros((batch, length, self.rope_size), dtype)
        )


class LatentAttention(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d]."""

    def __init__(self, config: MLAConfig, key: jax.Array, width: int, residual_scale: float):
        keys = jax.random.split(key, 7)
        c, n = config, config.heads
        self.config = config
        q_in, q_axis = (c.q_rank, "q_lora") if c.q_rank else (width, "embed")
        self.q_down = Linear(keys[0], (width, q_in), ("embed", "q_lora")) if c.q_rank else Identity()
        self.q_norm = c.norm.build(q_in) if c.q_rank else Identity()
        self.q_up = Linear(keys[1], (q_in, n, c.nope_size + c.rope_size), (q_axis, "heads", "head_dim"))
        self.kv_down = Linear(keys[2], (width, c.kv_rank), ("embed", "kv_lora"))
        self.kv_norm = c.norm.build(c.kv_rank)
        self.k_rope = Linear(keys[3], (width, c.rope_size), ("embed", "head_dim"))
        self.k_up = Linear(keys[4], (c.kv_rank, n, c.nope_size), ("kv_lora", "heads", "head_dim"))
        self.v_up = Linear(keys[5], (c.kv_rank, n, c.v_size), ("kv_lora", "heads", "head_dim"))
        self.o = Linear(
            keys[6], (n, c.v_size, width), ("heads", "head_dim", "embed"), contract=2, scale=residual_scale
        )

    def __call__(
        self, x: Float[Array, "b t d"], tables: RopeTables, context: Context,
        cache: LatentCache | None = None,
    ) -> tuple[Float[Array, "b t d"], LatentCache | None]:  # fmt: skip
        c, table = self.config, tables[self.config.rope, self.config.rope_size]
        q = self.q_up(self.q_norm(self.q_down(x)))
        q = jnp.concatenate([q[..., : c.nope_size], rotate(q[..., c.nope_size :], table)], -1)
        latent = self.kv_norm(self.kv_down(x))
        k_rope = rotate(self.k_rope(x)[:, :, None, :], table)[:, :, 0]
        positions, segments = None, context.segment_ids_bt
        if cache is not None:
            at = context.positions_bt
            cache = LatentCache(
                write_rows(cache.latent_bsr, latent, at), write_rows(cache.rope_bsh, k_rope, at)
            )
            latent, k_rope = cache.latent_bsr.astype(x.dtype), cache.rope_bsh.astype(x.dtype)
            slots = jnp.broadcast_to(jnp.arange(latent.shape[1]), latent.shape[:2])
            positions, segments = (at, slots), None
        k = self.k_up(latent)
        shared = jnp.broadcast_to(
            k_rope[:, :, None], (*k.shape[:3], c.rope_size), out_sharding=jax.typeof(k).sharding
        )
        k = jnp.concatenate([k, shared], -1)
        y = attention(
            q, k, self.v_up(latent), segment_ids=segments, positions=positions, scale=c.scale,
            implementation=context.implementation,
        )  # fmt: skip
        return self.o(y), cache
