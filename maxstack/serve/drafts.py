"""Guesses of what a row says next, from what it has read and said: prompt lookup (Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding), on the device, so that steps go on without the host.

The longest of the last tokens that occurred before, two or three of them, the latest occurrence first: what followed
there is the guess, repeated where it ends, as in a text that goes round in circles.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

LONGEST, SHORTEST = 3, 2
"""Tokens that must have occurred before."""


class Drafting(NamedTuple):
    """What speculation keeps of each row."""

    history_rl: Int[Array, "r l"]
    """Its tokens by position, up to the next one."""
    plan_left_r: Int[Array, "r"]
    """Tokens that it may still bring in the plan under way."""
    guesses_rk: Int[Array, "r k"]
    """Of a draft model, where there is one; as wide as it makes guesses."""


def no_history(rows: int, length: int, guesses: int = 0) -> Drafting:
    """Of rows that have nobody."""
    return Drafting(
        jnp.zeros((rows, length), jnp.int32),
        jnp.zeros((rows,), jnp.int32),
        jnp.zeros((rows, guesses), jnp.int32),
    )


def recalled(drafting: Drafting, row: Int[Array, ""], tokens_l: Int[Array, "l"]) -> Drafting:
    """A row begins with tokens that are known."""
    return drafting._replace(history_rl=drafting.history_rl.at[row].set(tokens_l))


def noted(
    drafting: Drafting | None, rows_b: Int[Array, "b"], at_b: Int[Array, "b"], tokens_bt: Int[Array, "b t"],
    real_bt: Bool[Array, "b t"],
) -> Drafting | None:  # fmt: skip
    """Rows said tokens, at positions from `at_b` on."""
    if drafting is None:
        return None
    length = drafting.history_rl.shape[1]
    places_bt = jnp.where(real_bt, at_b[:, None] + jnp.arange(tokens_bt.shape[1]), length)
    history_rl = drafting.history_rl.at[rows_b[:, None], places_bt].set(tokens_bt, mode="drop")
    return drafting._replace(history_rl=history_rl)


def guessed(
    history_bl: Int[Array, "b l"], lengths_b: Int[Array, "b"], most: int
) -> tuple[Int[Array, "b k"], Bool[Array, "b"]]:
    """The `most` tokens that may follow position `lengths_b`, where the next token stands; and whether there is a
    guess."""
    b, length = history_bl.shape
    places_l = jnp.arange(length)
    alike_bl = jnp.ones((b, length), bool)
    run_bl = jnp.zeros((b, length), jnp.int32)
    for back in range(LONGEST):
        last_b1 = jnp.take_along_axis(history_bl, jnp.maximum(lengths_b - back, 0)[:, None], 1)
        alike_bl &= (jnp.roll(history_bl, back, 1) == last_b1) & (places_l >= back)
        run_bl += alike_bl
    run_bl = jnp.where(places_l < lengths_b[:, None], run_bl, 0)
    found_b = jnp.argmax(run_bl * length + places_l, 1).astype(jnp.int32)  # the longest, then the latest
    run_b = jnp.take_along_axis(run_bl, found_b[:, None], 1)[:, 0]
    circle_b = jnp.maximum(lengths_b - found_b, 1)
    at_bk = found_b[:, None] + 1 + jnp.arange(most) % circle_b[:, None]
    return jnp.take_along_axis(history_bl, jnp.minimum(at_bk, length - 1), 1), run_b >= SHORTEST
