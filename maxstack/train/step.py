"""One training step: gradients over micro-batches, the check of their norm, the update.

The loss is averaged over the real tokens of the global batch, so neither accumulation nor padding nor the number of
devices changes it. Nothing here waits for the host.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from maxstack import sharding
from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.models import Transformer, tree
from maxstack.optim import OptimConfig, clip_by_norm, ema_update, global_norm, learning_rate
from maxstack.train.losses import LossSums, Objective, real_tokens, share_of_step
from maxstack.train.state import Arrays, Health, Layout, TrainState

Metrics = dict[str, jax.Array]
# Steps whose gradient norm makes up the running mean before a spike is believed.
SPIKE_WARMUP = 50
NORM_DECAY = 0.98
# XLA (jax 0.11.2) would call a kernel twice a layer: once to write its output into the stack that the backward pass
# reads, and once for whatever else reads it.
FOR_GPUS = {"xla_gpu_enable_dynamic_slice_fusion": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """When an update is not applied, and when the run stops for it."""

    spike_factor: float = 10.0
    """A gradient norm above this multiple of its running mean is a spike, and the update is skipped; 0 for never."""
    skip_limit: int = 10
    """Skipped updates in a row after which the run stops (steps)."""

    def __post_init__(self):
        if not (math.isfinite(self.spike_factor) and self.spike_factor >= 0):
            raise UserError(
                f"safety.spike_factor is {self.spike_factor}: it must be finite and not negative, 0 for never"
            )
        if self.skip_limit < 1:
            raise UserError(f"safety.skip_limit is {self.skip_limit}: it must be at least 1")


def train_step(
    plan: Layout, objective: Objective, optim: OptimConfig, safety: SafetyConfig, z_loss: float, steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The function `(state, batch [micro, b, t]) -> (state, metrics)`; compile it with `compiled`."""
    rate = learning_rate(optim.schedule, optim.peak_lr, steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums, tokens = gradients(plan, objective, state, batch, z_loss)
        norm = global_norm(grads)
        loss = sums.nll + sums.z + sums.per_batch
        health = judge(state.health, loss, norm, safety.spike_factor)
        good = health.skipped == state.health.skipped
        grads = clip_by_norm(grads, norm, optim.clip_norm)
        params, opt_state, ema, buffers = jax.lax.cond(
            good,
            lambda: (*update(plan, optim, state, grads), rebalanced(plan, state.buffers, sums.expert_load)),
            lambda: (state.params, state.opt_state, state.ema, state.buffers),
        )
        metrics = {
            "loss": loss, "nll": sums.nll, "z_loss": jnp.asarray(sums.z), "tokens": tokens,
            "gradient_norm": norm, "learning_rate": rate(state.health.accepted),
            "skipped_steps": health.skipped, "skipped_in_a_row": health.skipped_in_a_row,
        } | ({"moe_loss": jnp.asarray(sums.per_batch)} if sums.expert_load else {})  # fmt: skip
        return TrainState(state.step + 1, params, buffers, opt_state, ema, state.key, health), metrics

    return step


def gradients(
    plan: Layout, objective: Objective, state: TrainState, batch: Batch, z_loss: float
) -> tuple[Arrays, LossSums, jax.Array]:
    """Gradients of the mean loss over all micro-batches (float32), that loss, and the tokens that count."""
    tokens = jnp.maximum(batch.weights.sum(), 1.0)
    real = jnp.maximum(real_tokens(batch), 1.0)
    targets = plan.weights("gradients")

    def loss(params: Arrays, micro: Batch) -> tuple[jax.Array, LossSums]:
        model: Transformer = tree.rebuild(plan.model, {**params, **state.buffers})
        sums = share_of_step(objective(model, micro, z_loss), micro, tokens, real)
        return sums.nll + sums.z + sums.per_batch, sums

    def one(micro: Batch) -> tuple[Arrays, LossSums]:
        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(state.params, micro)
        return {name: jax.reshard(grads[name], targets[name].spec) for name in grads}, sums

    if batch.tokens.shape[0] == 1:
        grads, sums = one(jax.tree.map(lambda leaf: leaf[0], batch))
        return grads, sums, tokens

    def add(total: Arrays, micro: Batch) -> tuple[Arrays, LossSums]:
        grads, sums = one(micro)
        return jax.tree.map(jnp.add, total, grads), sums

    shapes = plan.shapes
    zeros = {name: jax.reshard(jnp.zeros(shapes[name].shape), targets[name].spec) for name in shapes}
    grads, each = jax.lax.scan(add, zeros, batch)
    return grads, jax.tree.map(lambda leaf: leaf.sum(0), each), tokens


def update(
    plan: Layout, optim: OptimConfig, state: TrainState, grads: Arrays
) -> tuple[Arrays, object, Arrays]:
    """New weights, optimizer state and average. Each device updates the part whose state it holds."""
    held, home = plan.weights("optimizer"), plan.weights("parameters")
    params = {name: jax.reshard(leaf, held[name].spec) for name, leaf in state.params.items()}
    grads = {name: jax.reshard(leaf, held[name].spec) for name, leaf in grads.items()}
    updates, opt_state = plan.optimizer.update(grads, state.opt_state, params)
    params = dict(cast(Arrays, optax.apply_updates(params, updates)))
    ema = ema_update(state.ema, params, optim.ema_decay, state.health.accepted) if state.ema else state.ema
    return {name: jax.reshard(leaf, home[name].spec) for name, leaf in params.items()}, opt_state, ema


def judge(health: Health, loss: jax.Array, norm: jax.Array, spike_factor: float) -> Health:
    """Accept or skip the step: a loss or norm that is not finite, or a norm far above its running mean, is skipped."""
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spike_factor > 0:
        good &= (health.accepted < SPIKE_WARMUP) | (norm <= spike_factor * health.norm_mean)
    decay = jnp.minimum(NORM_DECAY, health.accepted / (health.accepted + 1.0))
    mean = decay * health.norm_mean + (1.0 - decay) * norm
    one = good.astype(jnp.int32)
    return Health(
        norm_mean=jnp.where(good, mean, health.norm_mean), accepted=health.accepted + one,
        skipped=health.skipped + 1 - one, skipped_in_a_row=jnp.where(good, 0, health.skipped_in_a_row + 1),
    )  # fmt: skip


def rebalanced(plan: Layout, buffers: Arrays, load: dict[str, jax.Array]) -> Arrays:
    """Balancing biases moved towards even load, a fixed step each (Wang et al. 2024, arXiv:2408.15664, algorithm 1).

    A feed-forward of a user's own may report its load too; only one with a `bias_rate` and a buffer `balance` is moved.
    """
    buffers = dict(buffers)
    for name, load_le in load.items():
        stack, layer = name.split(".")
        config: Any = plan.model.config.stacks[int(stack)].pattern[int(layer)].feed_forward
        bias, rate = f"stacks.{stack}.layers.{layer}.feed_forward.balance", getattr(config, "bias_rate", 0.0)
        if rate and bias in buffers:
            buffers[bias] += rate * jnp.sign(load_le.mean(-1, keepdims=True) - load_le)
    return buffers


def compiled(plan: Layout, step: Callable, batch: Any, state: TrainState) -> jax.stages.Compiled:
    """`step` compiled ahead of time for these shapes; the state it is given is given up."""
    with jax.set_mesh(plan.devices):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(plan.shardings(), plan.replicated))
        on_gpu = next(iter(plan.devices.devices.flat)).platform in ("gpu", "cuda")
        return jitted.lower(state, batch).compile(compiler_options=FOR_GPUS if on_gpu else None)


def abstract_batch(plan: Layout, micro_batches: int, rows: int, seq_len: int) -> Batch:
    """Shapes of a step's batch."""
    where = sharding.batch_sharding(plan.devices, leading=1)
    shape = (micro_batches, rows, seq_len)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    return Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where))
