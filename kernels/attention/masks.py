"""Which key a query sees: the one place where causal, window, segments and positions are put together."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is known when the program is compiled."""

    causal: bool
    """A query sees no key of a later position."""
    window: int | None
    """A query sees this many positions, itself included; None is all."""
    softcap: float | None
    """Logits become `softcap · tanh(logits / softcap)`."""
    scale: float
    """Logits are `scale · q·k`."""


class Coordinates(NamedTuple):
    """Where the rows of queries and keys stand; None means indices (positions) or one document (segments)."""

    q_segments: Int[Array, "b t"] | None
    kv_segments: Int[Array, "b s"] | None
    q_positions: Int[Array, "b t"] | None
    kv_positions: Int[Array, "b s"] | None


def visible(at: Coordinates, options: Options, t: int, s: int, t0=0, s0=0) -> Bool[Array, "#b t s"] | None:
    """Mask of `t` queries from index `t0` on by `s` keys from index `s0` on; `at` holds these rows alone.

    None when every query sees every key.
    """
    parts = []
    if options.causal or options.window is not None:
        q_positions = (t0 + jnp.arange(t))[None] if at.q_positions is None else at.q_positions
        kv_positions = (s0 + jnp.arange(s))[None] if at.kv_positions is None else at.kv_positions
        distance = q_positions[:, :, None] - kv_positions[:, None, :]
        if options.causal:
            parts.append(distance >= 0)
        if options.window is not None:
            parts.append(distance < options.window)
    if at.q_segments is not None and at.kv_segments is not None:
        same = at.q_segments[:, :, None] == at.kv_segments[:, None, :]
        parts.append(same & (at.kv_segments > 0)[:, None, :])
    if not parts:
        return None
    mask = parts[0]
    for part in parts[1:]:
        mask = mask & part
    return mask
