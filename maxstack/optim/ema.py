"""Exponential moving average of the weights, kept in float32 beside them."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def ema_update(
    ema: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
    decay: float,
    step: jax.Array | int,
    *,
    warmup: bool = True,
) -> dict[str, jax.Array]:
    """Decay · ema + (1 - decay) · params, leaf by leaf.

    `step` is the number of updates before this one. With `warmup` the decay is at most (1 + step) / (10 + step), so
    that the random start is forgotten early: after 10 updates about 1e-5 of it is left.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"ema decay must be at least 0 and below 1, got {decay}")
    done = jnp.asarray(step, jnp.float32)
    kept = jnp.minimum(decay, (1 + done) / (10 + done)) if warmup else jnp.float32(decay)
    # old + share · (new - old) has no rounding drift where both are equal.
    return {
        name: old.astype(jnp.float32)
        + (1 - kept) * (params[name].astype(jnp.float32) - old.astype(jnp.float32))
        for name, old in ema.items()
    }
