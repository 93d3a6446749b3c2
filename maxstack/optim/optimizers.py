"""Optimizers by name, over flat dicts of weights with logical axes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxstack.config import UserError
from maxstack.optim.adafactor import AdafactorConfig, scale_by_adafactor
from maxstack.optim.layout import Axes, decay_mask, muon_dims
from maxstack.optim.muon import MuonConfig, scale_by_muon
from maxstack.optim.schedules import ScheduleConfig, learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning rate, clipping, weight decay, averaging."""

    name: Literal["adamw", "muon", "adafactor", "lion", "sgd"] = "adamw"
    """adamw | muon (matrices; the rest by AdamW) | adafactor | lion | sgd (with momentum)."""
    peak_lr: float = 3e-4
    """Highest learning rate, reached at the end of the warm-up. Lion wants 3 to 10 times less than AdamW."""
    beta1: float = 0.9
    """Decay of the first moment a step [0..1): AdamW, Lion, and Muon's exempt leaves."""
    beta2: float = 0.95
    """Decay of the second moment a step [0..1), or of Lion's memory (0.99 is usual there)."""
    eps: float = 1e-8
    """Added to the root of the second moment of AdamW."""
    momentum: float = 0.9
    """Share of the old velocity that stays a step [0..1), for SGD; 0 for none."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    weight_decay: float = 0.1
    """Decoupled for all optimizers: each step a weight loses learning rate · this of itself. Norms, biases and routers
    do not decay."""
    decay_embeddings: bool = False
    """Whether the token embedding decays too."""
    clip_norm: float = 1.0
    """Global norm the gradient is scaled down to; 0 for never. The train step clips, with the norm it reports."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which first moments are kept; second moments are always float32."""
    ema_decay: float = 0.0
    """Decay a step [0..1) of an averaged copy of the weights; 0 keeps none."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    muon: MuonConfig = MuonConfig()
    """Settings of muon."""
    adafactor: AdafactorConfig = AdafactorConfig()
    """Settings of adafactor."""

    def __post_init__(self) -> None:
        if self.name not in _DIRECTIONS:
            raise UserError(f"optim.name must be one of {', '.join(_DIRECTIONS)}, got {self.name!r}")
        if not (math.isfinite(self.peak_lr) and self.peak_lr > 0):
            raise UserError(f"optim.peak_lr must be a positive number, got {self.peak_lr}")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(f"optim.eps must be a positive number, got {self.eps}")
        for field in ("beta1", "beta2", "momentum", "ema_decay"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise UserError(f"optim.{field} must be at least 0 and below 1, got {getattr(self, field)}")
        for field in ("weight_decay", "clip_norm"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) >= 0):
                raise UserError(f"optim.{field} must be 0 or a positive number, got {getattr(self, field)}")


class OptimizerState(NamedTuple):
    """Updates applied so far, which is the position in the schedule, and what the optimizer remembers."""

    count: jax.Array
    direction: Any


def build(config: OptimConfig, total_steps: int, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    """The optimizer of a run over weights `dict[str, Array]` whose logical axes are `axes`.

    It does not clip: the step does, with the norm it reports (`clip_by_norm`). Moments are made and updated in
    float32 whatever the type of weights and gradients. `update` needs the weights. Raises UserError for a schedule that
    does not fit `total_steps`, ValueError for weights without axes.
    """
    rate = learning_rate(config.schedule, config.peak_lr, total_steps)
    direction = _DIRECTIONS[config.name](config, axes)
    mask = decay_mask(axes, embeddings=config.decay_embeddings)
    decays = {name: config.weight_decay if decayed else 0.0 for name, decayed in mask.items()}

    def init(params: Any) -> OptimizerState:
        _check_axes(params, axes)
        return OptimizerState(jnp.zeros((), jnp.int32), direction.init(_float32(params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("the optimizer needs the weights: update(grads, state, params)")
        wide = _float32(params)
        result: Any = direction.update(_float32(updates), state.direction, wide)
        directions, remembered = result
        lr = rate(state.count)
        return (
            {name: -lr * _decayed(d, wide[name], decays[name]) for name, d in directions.items()},
            OptimizerState(state.count + 1, remembered),
        )

    return optax.GradientTransformation(init, update)


def updates_applied(opt_state: OptimizerState) -> jax.Array:
    """Updates that this state has seen: the argument of the learning rate of the next one."""
    return opt_state.count


def _decayed(direction: jax.Array, param: jax.Array, decay: float) -> jax.Array:
    return direction + decay * param if decay else direction


def _float32(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: leaf.astype(jnp.float32) for name, leaf in leaves.items()}


def _check_axes(params: Mapping[str, jax.Array], axes: Mapping[str, Axes]) -> None:
    for name, leaf in params.items():
        if name not in axes:
            raise ValueError(
                f"weight {name} has no logical axes; the optimizer was built for {len(axes)} leaves"
            )
        if len(axes[name]) != leaf.ndim:
            raise ValueError(
                f"weight {name} of shape {leaf.shape} has {len(axes[name])} logical axes: {axes[name]}"
            )


def _adamw(config: OptimConfig, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    del axes
    return optax.scale_by_adam(
        config.beta1, config.beta2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
    )


def _lion(config: OptimConfig, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    del axes
    return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=jnp.dtype(config.moment_dtype))


def _sgd(config: OptimConfig, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    del axes
    return optax.trace(config.momentum, config.nesterov, accumulator_dtype=jnp.dtype(config.moment_dtype))


def _adafactor(config: OptimConfig, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    return scale_by_adafactor(config.adafactor, axes, jnp.dtype(config.moment_dtype))


def _muon(config: OptimConfig, axes: Mapping[str, Axes]) -> optax.GradientTransformation:
    exempt = optax.chain(_adamw(config, axes), optax.scale(config.muon.adam_lr_ratio))
    matrices = scale_by_muon(config.muon, axes, jnp.dtype(config.moment_dtype))
    label = lambda params: {name: "adam" if muon_dims(axes[name]) is None else "muon" for name in params}  # noqa: E731
    return optax.partition({"muon": _present(matrices), "adam": exempt}, label)


def _present(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on the leaves that `optax.partition` left it: those of others stand as empty nodes."""
    masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731

    def init(params: Any) -> Any:
        return inner.init({name: leaf for name, leaf in params.items() if not masked(leaf)})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mine = {name: leaf for name, leaf in updates.items() if not masked(leaf)}
        result: Any = inner.update(mine, state, params)
        return {name: result[0].get(name, leaf) for name, leaf in updates.items()}, result[1]

    return optax.GradientTransformation(init, update)


_DIRECTIONS: dict[str, Callable[[OptimConfig, Mapping[str, Axes]], optax.GradientTransformation]] = {
    "adamw": _adamw, "muon": _muon, "adafactor": _adafactor, "lion": _lion, "sgd": _sgd,
}  # fmt: skip
