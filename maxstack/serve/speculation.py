"""A decode step that checks guesses: the next token and some that may follow are read at once, and as many are kept as
are what the row says.

What a row says at a position is drawn as without guesses, from its logits and the random number of its seed and that
position. A guess is kept where it is that token. So tokens do not depend on whether there are guesses, for any
sampling, and their distribution is the model's: of a guess `g` with probability p(g), the chance to be kept is p(g), as
in rejection sampling of a draft that is certain of `g` (Leviathan et al. 2023, arXiv:2211.17192, section 2.3).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from maxstack.models.generation.params import RowSettings
from maxstack.models.generation.sampling import Allowed, choose
from maxstack.models.paged.forward import Chunk
from maxstack.models.paged.pools import Pools
from maxstack.serve.drafts import guessed, noted
from maxstack.serve.programs import ENDED, NOT_FINITE, NOTHING, TOKEN, Form, RowState, Steps, Told, told


class Guesses(NamedTuple):
    """What a step reads, and how far each row may go in it."""

    chunk: Chunk
    plan_left_b: Int[Array, "b"]


def guesses_of(state: RowState, steps: Steps, most: int) -> Guesses:
    """The next token of each row and up to `most` guesses: none where the row's tokens depend on those before them
    otherwise than by the model, or where its pages or its plan end."""
    if state.drafting is None or steps.bounds_b is None:
        raise ValueError("a step with guesses needs what rows have said, and how far they may write")
    rows, settings = steps.rows_b, state.settings
    lengths_b, left_b = state.lengths_r[rows], state.left_r[rows]
    plan_left_b = jnp.where(steps.step == 0, steps.counts_b, state.drafting.plan_left_r[rows])
    if state.drafting.guesses_rk.shape[1]:  # there is a draft model
        drafts_bk, found_b = state.drafting.guesses_rk[rows], jnp.ones(rows.shape, bool)
    else:
        drafts_bk, found_b = guessed(state.drafting.history_rl[rows], lengths_b, most)
    plain_b = (settings.repetition_penalty == 1) & (settings.presence_penalty == 0)
    plain_b &= (settings.frequency_penalty == 0) & ~state.bound_r
    wanted_b = jnp.where(found_b & plain_b[rows], most + 1, 1)
    room_b = jnp.minimum(jnp.minimum(left_b, plan_left_b), steps.bounds_b - lengths_b)
    counts_b = jnp.maximum(jnp.minimum(wanted_b, room_b), 0).astype(jnp.int32)
    tokens_bt = jnp.concatenate([state.next_r[rows][:, None], drafts_bk], 1)
    chunk = Chunk(tokens_bt, steps.table_bp, lengths_b, counts_b, lengths_b + 1, steps.adapters_b)
    return Guesses(chunk, plan_left_b)


def guesses_read(
    most: int, form: Form, weights, pools: Pools, state: RowState, steps: Steps
) -> tuple[Told, Any]:
    """What each row says, `most + 1` places a row one after another, and what is to be written."""
    chunk = guesses_of(state, steps, most).chunk
    b, t = chunk.tokens_bt.shape
    x_btd, written = form.advance(weights, pools, chunk)
    logits = form.logits(weights, x_btd).reshape(b * t, -1)
    rows = jnp.repeat(steps.rows_b, t)
    settings: RowSettings = jax.tree.map(lambda leaf: leaf[rows], state.settings)
    places = (chunk.lengths_b[:, None] + 1 + jnp.arange(t)).reshape(-1)
    allowed = Allowed(state.bound_r[rows], state.allowed_rw)
    chosen = choose(logits, settings, state.seen, places, rows, allowed, form.by_row)
    said = told(
        logits, chosen, (jnp.arange(t) < chunk.counts_b[:, None]).reshape(-1), jnp.asarray(settings.ends)
    )
    return said._replace(status_b=kept(said, chunk.tokens_bt).reshape(-1)), written


def kept(said: Told, read_bt: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The status of each place: nothing behind the first that is not what was guessed there, or ends the row."""
    tokens_bt, status_bt = (x.reshape(read_bt.shape) for x in (said.tokens_b, said.status_b))
    right_bt = (tokens_bt[:, :-1] == read_bt[:, 1:]) & (status_bt[:, :-1] == TOKEN)
    first_b1: Bool[Array, "b 1"] = jnp.ones((read_bt.shape[0], 1), bool)
    so_far_bt = jnp.cumprod(jnp.concatenate([first_b1, right_bt], 1), 1)
    return jnp.where(so_far_bt == 1, status_bt, NOTHING)


def guesses_keep(
    most: int, form: Form, pools: Pools, state: RowState, steps: Steps, said: Told, written: Any
) -> tuple[Pools, RowState]:
    """The rows as many tokens further as they said."""
    (chunk, plan_left_b), rows = guesses_of(state, steps, most), steps.rows_b
    tokens_bt, status_bt = (x.reshape(chunk.tokens_bt.shape) for x in (said.tokens_b, said.status_b))
    real_bt = (status_bt == TOKEN) | (status_bt == ENDED)
    gained_b = jnp.sum(real_bt, 1).astype(jnp.int32)
    over_b = jnp.any((status_bt == ENDED) | (status_bt == NOT_FINITE), 1)
    last_b = jnp.take_along_axis(tokens_bt, jnp.maximum(gained_b - 1, 0)[:, None], 1)[:, 0]
    drafting = noted(state.drafting, rows, chunk.lengths_b + 1, tokens_bt, real_bt)
    assert drafting is not None
    left_b = jnp.where(over_b, 0, state.left_r[rows] - gained_b)
    # Penalties look at rows without guesses only: there the first place is all there is.
    first_b = (status_bt[:, 0] == TOKEN).astype(jnp.int32)
    counts_rv = state.seen.counts_bv.at[rows, tokens_bt[:, 0]].add(first_b)
    state = state._replace(
        lengths_r=state.lengths_r.at[rows].add(gained_b),
        next_r=state.next_r.at[rows].set(jnp.where(gained_b > 0, last_b, state.next_r[rows])),
        left_r=state.left_r.at[rows].set(left_b),
        seen=state.seen._replace(counts_bv=counts_rv),
        drafting=drafting._replace(plan_left_r=drafting.plan_left_r.at[rows].set(plan_left_b - gained_b)),
    )
    return (written if form.keep is None else form.keep(pools, written, chunk)), state
