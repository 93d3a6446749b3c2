"""Muon: momentum whose matrices are orthogonalised by a Newton–Schulz iteration (Jordan et al. 2024).

optax.contrib.muon is not used: under explicit sharding its `A @ A.T` contracts a sharded dim and fails, and it takes a
stacked leaf's dims by position. Here the logical axes say what is a matrix, and the matrices of a leaf are dealt out
over all devices of the mesh, so that the work is split and no matrix is computed twice.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from maxstack.config import UserError
from maxstack.optim.deal import per_matrix
from maxstack.optim.layout import Axes, MatrixDims, muon_dims

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic a·x + b·x³ + c·x⁵ of Keller Jordan: steepest at 0, ends between about 0.7 and 1.2 instead of at 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """What only Muon reads; its exempt leaves (embeddings, router, vectors) take AdamW with the betas of `optim`."""

    momentum: float = 0.95
    """Share of the old momentum that stays a step [0..1)."""
    nesterov: bool = True
    """Look one step ahead: mix the new gradient in once more."""
    ns_steps: int = 5
    """Newton–Schulz iterations an update."""
    ns_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the iteration; bfloat16 halves its memory and is the faster one on TPU and GPU."""
    update_rms: float = 0.2
    """Root mean square of an update before the learning rate, at full rank: 0.2 is AdamW's, so that one peak_lr suits
    both (arXiv 2502.16982); 0: Jordan's sqrt(max(1, out/in)) instead, which wants its own peak_lr, about 0.02."""
    adam_lr_ratio: float = 1.0
    """Learning rate of the exempt leaves over that of the matrices."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"optim.muon.momentum must be at least 0 and below 1, got {self.momentum}")
        if self.ns_steps < 1:
            raise UserError(f"optim.muon.ns_steps must be at least 1, got {self.ns_steps}")
        for field in ("update_rms", "adam_lr_ratio"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"optim.muon.{field} must not be negative, got {value}")


class MuonState(NamedTuple):
    """Momentum of the matrices, by name."""

    mu: dict[str, jax.Array]


def scale_by_muon(
    config: MuonConfig, axes: Mapping[str, Axes], momentum_dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Gradients of matrices to orthogonalised momentum; every leaf it is given must be a matrix by `axes`."""

    def init(params: Any) -> MuonState:
        return MuonState({name: jnp.zeros_like(leaf, dtype=momentum_dtype) for name, leaf in params.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        beta, mu, directions = config.momentum, {}, {}
        for name, grad in updates.items():
            mu[name] = beta * state.mu[name].astype(jnp.float32) + (1 - beta) * grad
            ahead = beta * mu[name] + (1 - beta) * grad if config.nesterov else mu[name]
            dims = muon_dims(axes[name])
            if dims is None:
                raise ValueError(f"Muon has no matrix in leaf {name} with axes {axes[name]}")
            scale = _update_scale(config.update_rms, *dims.sizes(grad.shape)[1:])
            turned = orthogonalize(ahead, dims, steps=config.ns_steps, dtype=jnp.dtype(config.ns_dtype))
            directions[name] = scale * turned
        return directions, MuonState({name: leaf.astype(momentum_dtype) for name, leaf in mu.items()})

    return optax.GradientTransformation(init, update)


def _update_scale(update_rms: float, fan_in: int, fan_out: int) -> float:
    """An orthogonal [in, out] has root mean square 1 / sqrt(max(in, out))."""
    if update_rms:
        return update_rms * math.sqrt(max(fan_in, fan_out))
    return math.sqrt(max(1.0, fan_out / fan_in))


def newton_schulz(x_io: Float[Array, "i o"], *, steps: int, dtype: jnp.dtype) -> Float[Array, "i o"]:
    """About U Vᵀ of the singular value decomposition U S Vᵀ of `x_io`; zero for zero."""
    tall = x_io.shape[0] > x_io.shape[1]
    # The largest entry first: the squares of a momentum of 1e-20 would underflow to a norm of 0.
    largest = jnp.max(jnp.abs(x_io))
    x = x_io.astype(jnp.float32) / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.square(x)))
    x = (x / jnp.where(norm > 0, norm, 1.0)).astype(dtype)
    x = x.T if tall else x  # the Gram matrix of the shorter side
    a, b, c = NEWTON_SCHULZ

    def iterate(_: jax.Array, x: jax.Array) -> jax.Array:
        gram = x @ x.T
        return (a * x + (b * gram + c * (gram @ gram)) @ x).astype(dtype)

    x = jax.lax.fori_loop(0, steps, iterate, x)
    return (x.T if tall else x).astype(jnp.float32)


def orthogonalize(x: jax.Array, dims: MatrixDims, *, steps: int, dtype: jnp.dtype) -> jax.Array:
    """Newton–Schulz of every matrix in a leaf, one after the other; on a mesh each device takes its share of them."""

    def local(block: jax.Array) -> jax.Array:
        order = (*dims.batch, *dims.inputs, *dims.outputs)
        moved = block.transpose(order)
        flat = moved.reshape(dims.sizes(block.shape))
        done = jax.lax.map(lambda m: newton_schulz(m, steps=steps, dtype=dtype), flat)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return done.reshape(moved.shape).transpose(inverse)

    return per_matrix(local, x, dims)
