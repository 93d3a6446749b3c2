"""Whether two programs compute the same, beyond rounding."""

from typing import Any

import jax
import jax.numpy as jnp

CLOSE = {2: 2.0**-5, 4: 2.0**-12, 8: 2.0**-40}
"""Largest difference of two results by the bytes of their numbers, as a share of the largest number: sums in another
order, and weights rounded on the way, differ by a few times the rounding."""


def apart(results: Any, wanted: Any) -> str | None:
    """Where results differ by more than rounding; None: nowhere."""
    for result, meant in zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True):
        same, difference, largest = map(float, _compared(result, meant))
        if not same:
            return "not finite in other places"
        close = CLOSE.get(jnp.dtype(meant.dtype).itemsize, 0.0) * largest
        if difference > close:
            return f"by {difference:.2g} of {largest:.2g}"
    return None


@jax.jit
def _compared(result: jax.Array, meant: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    finite = jnp.isfinite(meant)
    same = jnp.all(
        jnp.where(finite, jnp.isfinite(result), (result == meant) | (jnp.isnan(result) & jnp.isnan(meant)))
    )
    wide = jnp.promote_types(meant.dtype, jnp.float32)
    result, meant = (jnp.where(finite, x.astype(wide), 0) for x in (result, meant))
    return same, jnp.max(jnp.abs(result - meant), initial=0), jnp.max(jnp.abs(meant), initial=0)
