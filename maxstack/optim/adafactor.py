"""Adafactor: second moments kept as a row and a column for each matrix (Shazeer and Stern 2018, arXiv:1804.04235).

optax.adafactor factors the two largest dims of a leaf and clips over the whole of it, so stacked layers would share
statistics and a deep model be trained otherwise than its layers apart. Here each matrix, found by its logical axes, has
its own: stacking changes nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxstack.config import UserError
from maxstack.optim.layout import BATCH_AXES, Axes, matrix_dims

TINY_SQUARE = 1e-30
"""Added to squared gradients (ε1 of the paper)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorConfig:
    """What only Adafactor reads."""

    decay_exponent: float = 0.8
    """The second moment keeps 1 - step^-exponent of itself: a mean over all steps at first, ever longer after."""
    clip_threshold: float = 1.0
    """Root mean square of one matrix's update above which it is scaled down; 0 for never."""
    relative: bool = False
    """Scale each update by the root mean square of its weight (then peak_lr is about 1e-2)."""
    momentum: float = 0.0
    """Share of the old update that stays a step [0..1); 0 keeps no first moment, which is what saves the memory."""

    def __post_init__(self) -> None:
        if not 0.0 < self.decay_exponent <= 1.0:
            raise UserError(
                f"optim.adafactor.decay_exponent must be above 0 and at most 1, got {self.decay_exponent}"
            )
        if not (math.isfinite(self.clip_threshold) and self.clip_threshold >= 0):
            raise UserError(f"optim.adafactor.clip_threshold must not be negative, got {self.clip_threshold}")
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"optim.adafactor.momentum must be at least 0 and below 1, got {self.momentum}")


class AdafactorState(NamedTuple):
    """Second moments by name: `row` and `col` for matrices, `full` for vectors; `mu` is empty without momentum."""

    count: jax.Array
    row: dict[str, jax.Array]
    col: dict[str, jax.Array]
    full: dict[str, jax.Array]
    mu: dict[str, jax.Array]


def moment_dims(axes: Axes) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The dims that stay in the row and in the column moment of a matrix; None for a vector."""
    dims = matrix_dims(axes)
    if dims is None:
        return None
    return tuple(sorted((*dims.batch, *dims.inputs))), tuple(sorted((*dims.batch, *dims.outputs)))


def scale_by_adafactor(
    config: AdafactorConfig, axes: Mapping[str, Axes], momentum_dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Gradients over the root of their factored second moment, clipped by matrix."""

    def init(params: Any) -> AdafactorState:
        row, col, full = {}, {}, {}
        for name, leaf in params.items():
            kept = moment_dims(axes[name])
            if kept is None:
                full[name] = jnp.zeros_like(leaf)
            else:
                # Sums of zeros, not `zeros`: they inherit how the kept dims are sharded.
                row[name], col[name] = (_mean_to(jnp.zeros_like(leaf), dims) for dims in kept)
        mu = (
            {k: jnp.zeros_like(v, dtype=momentum_dtype) for k, v in params.items()} if config.momentum else {}
        )
        return AdafactorState(jnp.zeros((), jnp.int32), row, col, full, mu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.count + 1
        decay = 1.0 - count.astype(jnp.float32) ** -config.decay_exponent
        row, col, full, directions = {}, {}, {}, {}
        for name, grad in updates.items():
            square = jnp.square(grad) + TINY_SQUARE
            kept = moment_dims(axes[name])
            if kept is None:
                full[name] = decay * state.full[name] + (1 - decay) * square
                direction = grad * jax.lax.rsqrt(full[name])
            else:
                row[name], col[name] = (
                    _like(
                        decay * old[name] + (1 - decay) * _like(_mean_to(square, dims), old[name]), old[name]
                    )
                    for old, dims in zip((state.row, state.col), kept, strict=True)
                )
                direction = grad * _inverse_root(row[name], col[name], grad, axes[name])
            directions[name] = _bounded(
                config, direction, None if params is None else params[name], axes[name]
            )
        directions, mu = _with_momentum(config.momentum, directions, state.mu, momentum_dtype)
        return directions, AdafactorState(count, row, col, full, mu)

    return optax.GradientTransformation(init, update)


def _inverse_root(row: jax.Array, col: jax.Array, like: jax.Array, axes: Axes) -> jax.Array:
    """1 / sqrt(row ⊗ col / mean(row)), in the dims of the leaf."""
    row_dims, col_dims = moment_dims(axes) or ((), ())
    row_full, col_full = _spread(row, row_dims, like), _spread(col, col_dims, like)
    over = tuple(i for i in row_dims if axes[i] not in BATCH_AXES)
    relative = row_full / jnp.mean(row_full, axis=over, keepdims=True)
    # Two roots instead of the root of a product: of squares near 1e-30 the product would underflow.
    return _like(jax.lax.rsqrt(relative), like) * _like(jax.lax.rsqrt(col_full), like)


def _bounded(config: AdafactorConfig, update: jax.Array, param: jax.Array | None, axes: Axes) -> jax.Array:
    over = tuple(i for i, name in enumerate(axes) if name not in BATCH_AXES)
    if config.clip_threshold:
        update = update / jnp.maximum(1.0, _rms(update, over) / config.clip_threshold)
    if config.relative:
        if param is None:
            raise ValueError("optim.adafactor.relative needs the weights in update(grads, state, params)")
        update = update * jnp.maximum(_rms(param.astype(jnp.float32), over), 1e-3)
    return update


def _with_momentum(momentum: float, updates: dict, mu: dict, dtype: jnp.dtype) -> tuple[dict, dict]:
    if not momentum:
        return updates, mu
    wide = {name: momentum * mu[name].astype(jnp.float32) + (1 - momentum) * u for name, u in updates.items()}
    return wide, {name: leaf.astype(dtype) for name, leaf in wide.items()}


def _rms(x: jax.Array, over: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=over, keepdims=True))


def _mean_to(x: jax.Array, kept: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=tuple(i for i in range(x.ndim) if i not in kept))


def _spread(moment: jax.Array, dims: tuple[int, ...], like: jax.Array) -> jax.Array:
    """A moment with a dim of size 1 wherever it was averaged."""
    return jnp.expand_dims(moment, tuple(i for i in range(like.ndim) if i not in dims))


def _like(x: jax.Array, example: jax.Array) -> jax.Array:
    """`x` sharded as `example`, on dims that both have in full."""
    sharding = jax.typeof(example).sharding
    if sharding.mesh.empty or not sharding.mesh.are_all_axes_explicit:
        return x
    spec = [
        entry if n == m else None for entry, n, m in zip(sharding.spec, x.shape, example.shape, strict=True)
    ]
    return jax.reshard(x, jax.NamedSharding(sharding.mesh, jax.P(*spec)))
