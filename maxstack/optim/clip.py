"""Gradient norm and clipping, apart, so that the step reports the norm from before the clip.

`build` does not clip: the train step calls `global_norm`, decides on skipping by it, and clips by the same number.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def global_norm(grads: Mapping[str, jax.Array]) -> Float[Array, ""]:
    """Root of the sum of squares over all leaves, in float32; NaN or inf if any entry is."""
    squares = [jnp.sum(jnp.square(grads[name].astype(jnp.float32))) for name in sorted(grads)]
    return jnp.sqrt(sum(squares, start=jnp.float32(0.0)))


def clip_by_norm(
    grads: Mapping[str, jax.Array], norm: Float[Array, ""], limit: int | float
) -> dict[str, jax.Array]:
    """Gradients scaled down to global norm `limit` where `norm` exceeds it; unchanged bits where it does not.

    A limit of 0 or less means no clipping.
    """
    if limit <= 0:
        return dict(grads)
    scale = limit / jnp.maximum(norm, limit)
    return {name: leaf * scale.astype(leaf.dtype) for name, leaf in grads.items()}
