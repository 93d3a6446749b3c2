"""Mixture of experts without dropped tokens: route, sort tokens by expert, grouped products, put back."""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from maxstack import sharding
from maxstack.config import UserError
from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.kernels.quantized_matmul import PanelWeight, QuantizedWeight, panel_matmul
from maxstack.models.expert_stack import OfStack, settled
from maxstack.models.feed_forward import ACTIVATIONS, Activation, Aux, FeedForwardConfig
from maxstack.models.layers import Buffer, Weight, constant, operand, require, weight
from maxstack.models.packed import PackedMatrix, PackedPanels
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
    shared_gate: bool = False
    """What the shared expert gives is multiplied by the sigmoid of a learned map of the token to one number."""
    activation: Activation = "silu"
    """Gate activation of every expert."""
    bias: bool = False
    """Learned offsets in the routed experts."""
    clamp: float | None = None
    """Routed experts: before the activation the gate is cut above this, up on both sides (GPT-OSS); None cuts none."""
    up_offset: float = 0.0
    """Routed experts: added to up before it is multiplied with the gate (GPT-OSS: 1)."""
    router_bias: bool = False
    """Learned offset on the router's logits."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores."""
    groups: int = 1
    """Experts lie in this many groups of equal size, and a token uses those of a few groups."""
    groups_per_token: int = 1
    """Groups each token may use (device-limited routing, arXiv:2405.04434, section 2.2.2)."""
    group_best: int = 1
    """A group's score is the sum of its best experts' scores, this many (DeepSeek-V2: 1, V3: 2)."""
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
    training_only: ClassVar[tuple[str, ...]] = ("auxiliary_loss", "router_z_loss", "bias_rate")
    """Fields that change how the layer is trained and nothing of what it computes."""

    def __post_init__(self):
        require("moe", self, 1, "size", "experts", "groups", "groups_per_token", "group_best")
        require("moe", self, 0, "shared_size", "auxiliary_loss", "router_z_loss", "bias_rate")
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"moe.experts_per_token is {self.experts_per_token}: it must be 1 to moe.experts = {self.experts}"
            )

        if self.clamp is not None and self.clamp <= 0:
            raise UserError(f"moe.clamp is {self.clamp}: it must be above 0, or None")
        if self.shared_gate and not self.shared_size:
            raise UserError(
                "moe.shared_gate needs a shared expert: give moe.shared_size, or leave the gate out"
            )
        self.check_groups()

    def check_groups(self) -> None:
        """Raise UserError for groups that do not divide the experts, or are too few for a token's."""
        if self.experts % self.groups:
            raise UserError(f"moe.experts {self.experts} must be a multiple of moe.groups {self.groups}")
        size = self.experts // self.groups
        if self.groups_per_token > self.groups or self.groups_per_token * size < self.experts_per_token:
            raise UserError(
                f"moe.groups_per_token is {self.groups_per_token}: of {self.groups} groups of {size} experts at least "
                f"{-(-self.experts_per_token // size)} are needed for {self.experts_per_token} experts a token"
            )
        if self.group_best > size:
            raise UserError(f"moe.group_best is {self.group_best}, but a group has {size} experts")

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "MoE":
        return MoE(self, key, width, residual_scale)


class Experts(NamedTuple):
    """The arrays of the routed experts that products with tokens sorted by expert need. In few bits a matrix lies the
    other way around, [outputs, inputs]."""

    gate_edf: Float[Array, "e d f"] | QuantizedWeight | PanelWeight | OfStack
    up_edf: Float[Array, "e d f"] | QuantizedWeight | PanelWeight | OfStack
    down_efd: Float[Array, "e f d"] | QuantizedWeight | PanelWeight | OfStack
    gate_b_ef: Float[Array, "e f"] | None = None
    up_b_ef: Float[Array, "e f"] | None = None


class MoE(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d], with its losses and the load of each expert."""

    matrices: ClassVar[dict[str, tuple[str, str]]] = {
        "gate": ("embed", "mlp"), "up": ("embed", "mlp"), "down": ("mlp", "embed"),
    }  # fmt: skip
    """Names of the routed experts' weights, which may be a PackedMatrix each, and the axes of inputs and outputs."""

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
        gate_key = jax.random.fold_in(key, 1)
        self.shared_gate = weight(gate_key, (width,), ("embed",), width**-0.5) if config.shared_gate else None
        self.router_b = constant(0.0, (e,), ("expert",)) if config.router_bias else None

        def offsets(size: int, axis: str) -> Weight | None:
            return constant(0.0, (e, size), ("expert", axis)) if config.bias else None

        self.gate_b, self.up_b, self.down_b = offsets(f, "mlp"), offsets(f, "mlp"), offsets(width, "embed")

    def __call__(
        self, x: Float[Array, "b t d"], real_bt: Bool[Array, "b t"] | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        chosen_btj, weights_btj, aux = self.route(x, real_bt)
        weights_btj = weights_btj.astype(x.dtype)
        offsets = [b[...] for b in (self.gate_b, self.up_b) if b is not None]
        gate, up, down = (self.matrix(name) for name in self.matrices)
        experts = Experts(gate, up, down, *offsets)
        y = run_experts(x, chosen_btj, weights_btj, experts, self.config)
        if self.down_b is not None:  # the chosen experts' last offsets: one product with the weights of all
            picked = jax.nn.one_hot(chosen_btj, self.config.experts, dtype=x.dtype)
            used_bte = jnp.einsum("btje,btj->bte", picked, weights_btj)
            y = y + product(used_bte, self.down_b[...], ("expert", "embed"))
        return (y if self.shared is None else y + self.shared_part(x)), aux

    def matrix(self, name: str) -> Array | QuantizedWeight | PanelWeight | OfStack:
        """The routed experts' weights `name`, as they are kept."""
        w = getattr(self, name)
        if isinstance(w, OfStack):
            return w
        return w.weight if isinstance(w, PackedMatrix | PackedPanels) else w[...]

    def shared_part(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """What the shared expert adds."""
        assert self.shared is not None
        y = self.shared(x)[0]
        if self.shared_gate is None:
            return y
        gate = product(x, self.shared_gate[...][:, None], ("embed", "whole"))
        return y * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y.dtype)

    def route(
        self, x: Float[Array, "b t d"], real_bt: Bool[Array, "b t"] | None
    ) -> tuple[Int[Array, "b t j"], Float[Array, "b t j"], Aux]:
        """Chosen experts and their weights per token, float32 throughout; the balancing bias only affects choice."""
        c = self.config
        logits = product(x.astype(jnp.float32), self.router[...], ("embed", "expert"))
        if self.router_b is not None:
            logits = logits + operand(self.router_b, jnp.dtype(jnp.float32))
        scores = jax.nn.softmax(logits, -1) if c.scoring == "softmax" else jax.nn.sigmoid(logits)
        biased = jax.lax.stop_gradient(scores) + self.balance[...]
        chosen = jax.lax.top_k(in_best_groups(biased, c), c.experts_per_token)[1]
        picked = jax.nn.one_hot(chosen, c.experts, dtype=jnp.float32)
        weights = jnp.einsum("btje,bte->btj", picked, scores)
        if c.normalize:
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-20)
        real = jnp.ones(x.shape[:2], jnp.float32) if real_bt is None else real_bt.astype(jnp.float32)
        return chosen, weights * c.routed_scale, balance_terms(logits, scores, picked, real, c)


def in_best_groups(scores_bte: Float[Array, "b t e"], config: MoEConfig) -> Float[Array, "b t e"]:
    """The scores, -inf for experts outside of each token's best groups."""
    if config.groups == 1:
        return scores_bte
    grouped = scores_bte.reshape(*scores_bte.shape[:2], config.groups, -1)
    of_group = jax.lax.top_k(grouped, config.group_best)[0].sum(-1)
    best = jax.lax.top_k(of_group, config.groups_per_token)[1]
    kept = jax.nn.one_hot(best, config.groups, dtype=jnp.bool_).any(-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(scores_bte.shape)


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
    experts: Experts, config: MoEConfig,
) -> Float[Array, "b t d"]:  # fmt: skip
    """The weighted sum of each token's experts, without their last offset. Under a mesh every device serves its own
    tokens."""

    def kind(w: Array) -> jnp.dtype:  # offsets are added in float32, and so are their gradients
        return x.dtype if w.ndim == 3 else jnp.dtype(jnp.float32)

    def as_it_is(w: Any) -> bool:
        return isinstance(w, QuantizedWeight | PanelWeight | OfStack)

    experts = Experts(*(settled(w, x) for w in experts))
    mesh = sharding.current_mesh()
    if mesh is None:
        cast = jax.tree.map(lambda w: w if as_it_is(w) else w.astype(kind(w)), experts, is_leaf=as_it_is)
        return local_experts(x, chosen, weights, cast, config=config)
    spec = jax.typeof(x).sharding.spec
    operands = (x, chosen, weights, experts)

    def gather(mine: Any, w: Any) -> Any:
        if isinstance(w, QuantizedWeight):
            return gather_packed(mine, w, spec)
        if isinstance(w, OfStack):  # of which nothing is gathered
            return mine._replace(stack=gather(mine.stack, w.stack)) if w.packed else mine
        return sharding.gather_local(mine, jax.typeof(w).sharding.spec, spec, kind(w))

    among_zeros = lies_whole(experts.down_efd, mesh.shape["tensor"])

    def run(x: Array, chosen: Array, weights: Array, cut: Experts) -> Array:
        gathered = jax.tree.map(gather, cut, experts, is_leaf=as_it_is)
        y = local_experts(x, chosen, weights, gathered, config=config, among_zeros=among_zeros)
        return jax.lax.psum(y, "tensor")

    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, operands)
    return jax.shard_map(run, in_specs=specs, out_specs=spec)(*operands)


def gather_packed(mine: QuantizedWeight, w: QuantizedWeight, tokens: jax.P) -> QuantizedWeight:
    """Inside `jax.shard_map`: as `sharding.gather_local`, in few bits. It is frozen: no gradient comes back."""

    def gather(mine: Array, w: Array) -> Array:
        return sharding.gather_frozen(mine, jax.typeof(w).sharding.spec, tokens)

    held = jax.tree.map(gather, mine, w)
    inputs = w.inputs * held.values.shape[-1] // w.values.shape[-1]
    return dataclasses.replace(held, inputs=inputs, group=inputs if w.group == w.inputs else w.group)


def lies_whole(down: Any, devices: int) -> bool:
    """Whether each of several devices has all of an inner width in few bits: a scale is for weights of several."""
    kept = down.stack if isinstance(down, OfStack) else down
    if devices == 1 or not isinstance(kept, QuantizedWeight):
        return False
    return jax.typeof(kept.values).sharding.spec[-1] is None


def own_part_among_zeros(hidden_rf: Array, inputs: int) -> Array:
    """Inside `jax.shard_map`: the inner width of one device among `inputs`, and 0 in those of the others, so that sums
    over the devices of its products with a whole matrix are those of all."""
    mine = jax.lax.axis_index("tensor")
    parts = range(inputs // hidden_rf.shape[-1])
    return jnp.concatenate([jnp.where(mine == part, hidden_rf, 0) for part in parts], axis=-1)


def local_experts(
    x: Array, chosen: Array, weights: Array, experts: Experts, *, config: MoEConfig, among_zeros: bool = False
) -> Array:
    """Tokens sorted by expert, three grouped products, and the way back; each expert's columns may be split, for a last
    matrix that is split alike or (`among_zeros`) whole."""
    b, t, d = x.shape
    per_token, tokens = config.experts_per_token, b * t
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=config.experts).astype(jnp.int32)
    sorted_x, of = x.reshape(tokens, d)[order // per_token], flat[order]

    def times(x: Array, w: Array | QuantizedWeight | PanelWeight | OfStack) -> Array:
        if isinstance(w, OfStack):
            return w.times(x, sizes)
        if isinstance(w, PanelWeight):
            return panel_matmul(x, w, sizes).astype(x.dtype)
        return grouped_matmul(x, w, sizes)

    def inner(w_edf: Array | QuantizedWeight | PanelWeight | OfStack, b_ef: Array | None) -> Array:
        y = times(sorted_x, w_edf)
        return y if b_ef is None else y + b_ef[of]

    gate, up = inner(experts.gate_edf, experts.gate_b_ef), inner(experts.up_edf, experts.up_b_ef)
    hidden, down = gated(gate, up, config).astype(x.dtype), experts.down_efd
    if among_zeros:
        kept: Any = down.stack if isinstance(down, OfStack) else down
        hidden = own_part_among_zeros(hidden, kept.inputs)
    y = times(hidden, down)
    y = jnp.zeros_like(y).at[order].set(y).reshape(tokens, per_token, d)
    return jnp.einsum("tjd,tj->td", y, weights.reshape(tokens, per_token)).reshape(b, t, d)


def gated(gate: Array, up: Array, config: MoEConfig) -> Array:
    """What an expert's last product reads."""
    if config.clamp is not None:
        gate, up = jnp.minimum(gate, config.clamp), jnp.clip(up, -config.clamp, config.clamp)
    return ACTIVATIONS[config.activation](gate) * (up + config.up_offset if config.up_offset else up)
