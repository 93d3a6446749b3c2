"""Mixture of experts without dropped tokens: route, sort tokens by expert, grouped products, put back."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.models.feed_forward import ACTIVATIONS, Activation, Aux, FeedForwardConfig
from maxstack.models.layers import Buffer, require, weight
from maxstack.models.product import product


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Gated experts, of which each token uses a few, beside shared ones that every token uses."""

    size: int
    """Inner width of each expert."""
    experts: int
    """Routed experts."""
    experts_per_token: int
    """Routed experts each token uses."""
    shared_size: int = 0
    """Inner width of the shared expert; 0 for none."""
    activation: Activation = "silu"
    """Gate activation of every expert."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores."""
    normalize: bool = True
    """The chosen experts' weights sum to one."""
    routed_scale: float = 1.0
    """Factor on the routed experts' sum."""
    auxiliary_loss: float = 0.01
    """Weight of the load-balancing loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4); 0 for none."""
    router_z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of router logits (Zoph et al. 2022, arXiv:2202.08906)."""
    bias_rate: float = 0.0
    """Step of the balancing bias per update (Wang et al. 2024, arXiv:2408.15664); 0 for none."""

    def __post_init__(self):
        require("moe", self, 1, "size", "experts")
        require("moe", self, 0, "shared_size", "auxiliary_loss", "router_z_loss", "bias_rate")
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"moe.experts_per_token is {self.experts_per_token}: it must be 1 to moe.experts = {self.experts}"
            )

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "MoE":
        return MoE(self, key, width, residual_scale)


class MoE(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d], with its losses and the load of each expert."""

    def __init__(self, config: MoEConfig, key: jax.Array, width: int, residual_scale: float):
        keys = jax.random.split(key, 5)
        e, f = config.experts, config.size
        self.config = config
        self.router = weight(keys[0], (width, e), ("embed", "expert"), width**-0.5)
        self.balance = Buffer(jnp.zeros((e,), jnp.float32), axes=("expert",))
        self.gate = weight(keys[1], (e, width, f), ("expert", "embed", "mlp"), width**-0.5)
        self.up = weight(keys[2], (e, width, f), ("expert", "embed", "mlp"), width**-0.5)
        self.down = weight(keys[3], (e, f, width), ("expert", "mlp", "embed"), residual_scale * f**-0.5)
        shared = FeedForwardConfig(size=max(config.shared_size, 1), activation=config.activation)
        self.shared = shared.build(keys[4], width, residual_scale) if config.shared_size else None

    def __call__(
        self, x: Float[Array, "b t d"], real_bt: Bool[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        chosen_btk, weights_btk, aux = self.route(x, real_bt)
        experts = (self.gate[...], self.up[...], self.down[...])
        y = run_experts(x, chosen_btk, weights_btk.astype(x.dtype), experts, self.config)
        return (y if self.shared is None else y + self.shared(x)[0]), aux

    def route(
        self, x: Float[Array, "b t d"], real_bt: Bool[Array, "b t"] | None
    ) -> tuple[Int[Array, "b t j"], Float[Array, "b t j"], Aux]:
        """Chosen experts and their weights per token, float32 throughout; the balancing bias only affects choice."""
        c = self.config
        logits = product(x.astype(jnp.float32), self.router[...], ("embed", "expert"))
        scores = jax.nn.softmax(logits, -1) if c.scoring == "softmax" else jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores) + self.balance[...]
        chosen = jax.lax.top_k(biased, c.experts_per_token)[1]
        picked = jax.nn.one_hot(chosen, c.experts, dtype=jnp.float32)
        weights = jnp.einsum("btje,bte->btj", picked, scores)
        if c.normalize:
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
        real = jnp.ones(x.shape[:2], jnp.float32) if real_bt is None else real_bt.astype(jnp.float32)
        return chosen, weights * c.routed_scale, balance_terms(logits, scores, picked, real, c)


def balance_terms(
    logits: Float[Array, "b t e"], scores: Float[Array, "b t e"], picked: Float[Array, "b t j e"],
    real_bt: Float[Array, "b t"], config: MoEConfig,
) -> Aux:  # fmt: skip
    """`moe_loss`, a mean over real tokens, and `expert_load`, the real tokens each expert received.

    Gradient accumulation weights each micro-batch's `moe_loss` by its share of the step's real tokens. For the router's
    z-loss that is the mean over all of them, however they are split. The auxiliary loss is a product of two means, an
    expert's fraction of the choices and its probability; so with accumulation it asks each micro-batch to be balanced,
    not only the whole.
    """
    real = sharding.constrain(real_bt, "batch", "sequence")
    tokens = jnp.maximum(real.sum(), 1.0)
    load = jnp.einsum("btje,bt->e", picked, real, out_sharding=sharding.activation_spec(None))
    probability = scores / jnp.maximum(scores.sum(-1, keepdims=True), 1e-20)
    mean = jnp.einsum("bte,bt->e", probability, real, out_sharding=sharding.activation_spec(None)) / tokens
    fraction = load / (tokens * config.experts_per_token)
    loss = config.auxiliary_loss * config.experts * jnp.sum(jax.lax.stop_gradient(fraction) * mean)
    if config.router_z_loss:
        z = jnp.square(jax.nn.logsumexp(logits, -1))
        loss = loss + config.router_z_loss * jnp.sum(z * real) / tokens
    return {"moe_loss": loss, "expert_load": jax.lax.stop_gradient(load)}


def run_experts(
    x: Float[Array, "b t d"], chosen: Int[Array, "b t j"], weights: Float[Array, "b t j"],
    experts: tuple[Array, ...], config: MoEConfig,
) -> Float[Array, "b t d"]:  # fmt: skip
    """The weighted sum of each token's experts. Under a mesh every device serves its own tokens."""
    if sharding.current_mesh() is None:
        return local_experts(x, chosen, weights, *(w.astype(x.dtype) for w in experts), config=config)
    spec = jax.typeof(x).sharding.spec
    operands = (x, chosen, weights, *experts)

    def run(x: Array, chosen: Array, weights: Array, *cut: Array) -> Array:
        gathered = (
            sharding.gather_local(mine, jax.typeof(w).sharding.spec, spec, x.dtype)
            for mine, w in zip(cut, experts, strict=True)
        )
        y = local_experts(x, chosen, weights, *gathered, config=config)
        return jax.lax.psum(y, "tensor")

    specs = tuple(jax.typeof(a).sharding.spec for a in operands)
    return jax.shard_map(run, in_specs=specs, out_specs=spec)(*operands)


def local_experts(
    x: Array, chosen: Array, weights: Array, gate: Array, up: Array, down: Array, *, config: MoEConfig
) -> Array:  # fmt: skip
    """Tokens sorted by expert, three grouped products, and the way back; each expert's columns may be split."""
    b, t, d = x.shape
    per_token, tokens = config.experts_per_token, b * t
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=config.experts).astype(jnp.int32)
    sorted_x = x.reshape(tokens, d)[order // per_token]
    h = ACTIVATIONS[config.activation](grouped_matmul(sorted_x, gate, sizes)) * grouped_matmul(
        sorted_x, up, sizes
    )
    y = grouped_matmul(h, down, sizes)
    y = jnp.zeros_like(y).at[order].set(y).reshape(tokens, per_token, d)
    return jnp.einsum("tjd,tj->td", y, weights.reshape(tokens, per_token)).reshape(b, t, d)
