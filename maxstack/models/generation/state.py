"""What the device holds of the rows that are written, and the programs that move it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from maxstack.models.generation.params import RowSettings
from maxstack.models.generation.sampling import Chosen, Seen


class State(NamedTuple):
    """The rows of a batch."""

    caches: Any
    lengths_b: Int[Array, "b"]
    """Tokens of each row in the cache."""
    next_b: Int[Array, "b"]
    """The token after them, not yet read."""
    seen: Seen


class Programs(NamedTuple):
    """Compiled functions for models of one shape. A state that is given is used up."""

    empty: Callable[[int, int], Any]
    """(rows, slots) -> caches."""
    grow: Callable[[Any, int], Any]
    """(caches, slots) -> the caches with that many."""
    read: Callable[[list[Array], State, Array, Array, Array, bool], State]
    """(weights, state, tokens_bt, counts_b, documents_b, nothing is cached yet) -> state with these tokens cached.
    `counts_b` of a row's tokens are real; `documents_b` is the length of its whole prompt."""
    step: Callable[[list[Array], State, RowSettings], tuple[Chosen, State]]
    """(weights, state, settings) -> the tokens after `next_b`, and the state in which they are the next."""
    compiled: dict[str, Any]
    """The jitted functions that these call, by name."""


def after(state: State, caches: Any, chosen_b: Int[Array, "b"]) -> State:
    """The state when one token of each row was read and the next chosen."""
    counts = state.seen.counts_bv.at[jnp.arange(chosen_b.shape[0]), chosen_b].add(1)
    return State(caches, state.lengths_b + 1, chosen_b, Seen(state.seen.prompt_bv, counts))


def padded(cache: Any, slots: int, axes: Any, leading: int = 0) -> Any:
    """A layer's cache with empty slots added behind; `leading` axes stand before those that `axes` counts."""

    def pad(leaf: Array, axis: int) -> Array:
        more = slots - leaf.shape[axis + leading]
        return jnp.pad(leaf, [(0, more if i == axis + leading else 0) for i in range(leaf.ndim)])

    return jax.tree.map(pad, cache, axes)
