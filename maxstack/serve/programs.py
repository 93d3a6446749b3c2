"""What the device computes for the server: one decode step of some rows, one chunk of some prompts.

Every row of the server has its place in `RowState`; programs take the numbers of the rows that they are for, so that a
few compiled shapes serve any rows. Places past the last row stand for nobody: `rows_b` is padded with them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from maxstack.models.generation.params import MOST_LOGPROBS, RowSettings
from maxstack.models.generation.sampling import NATIVE, PLAIN, Allowed, Chosen, Seen, choose
from maxstack.models.paged.forward import Chunk
from maxstack.models.paged.pools import Pools
from maxstack.serve.drafts import Drafting, no_history, noted
from maxstack.serve.embedding import Pooled, pool

LOGPROB_BLOCK = 16
"""Prompt tokens whose logits are there at once."""

# What a row did in a step.
NOTHING, TOKEN, ENDED, NOT_FINITE = range(4)


class RowState(NamedTuple):
    """What the device knows of each row, and of one more that stands for nobody."""

    lengths_r: Int[Array, "r"]
    """Tokens in the cache."""
    next_r: Int[Array, "r"]
    """The token after them, not yet read."""
    left_r: Int[Array, "r"]
    """Tokens that the row may still produce; 0 once it has ended."""
    settings: RowSettings
    seen: Seen
    """Kept for all rows, right only for those with penalties."""
    bound_r: Bool[Array, "r"]
    """Whether the row may only say some tokens."""
    allowed_rw: UInt32[Array, "r w"]
    """Which, one bit a token; right only for rows that are bound."""
    drafting: Drafting | None = None
    """Where guesses are made: what rows have said."""


class Steps(NamedTuple):
    """A decode step, as the host describes it."""

    rows_b: Int[Array, "b"]
    table_bp: Int[Array, "b p"]
    counts_b: Int[Array, "b"]
    """Steps of this plan that the row takes part in."""
    step: Int[Array, ""]
    """Which of them this is."""
    adapters_b: Int[Array, "b"] | None = None
    """Each row's adapter, as in `Chunk`."""
    bounds_b: Int[Array, "b"] | None = None
    """With guesses: positions that the row's pages cover. `counts_b` are tokens then, not steps."""
    known_b: Int[Array, "b"] | None = None
    """In invariant mode: what the row says again whatever it would draw; -1 for nothing."""


class Prompts(NamedTuple):
    """A chunk of some prompts, as the host describes it."""

    rows_b: Int[Array, "b"]
    chunk: Chunk
    last_b: Bool[Array, "b"]
    """The chunk ends the prompt: a token is sampled."""
    left_b: Int[Array, "b"]
    """Tokens that the row may produce from here on."""
    settings: RowSettings
    bound_b: Bool[Array, "b"]
    following_bt: Int[Array, "b t"]
    """The token after each of the chunk's, for the prompt's log-probabilities; -1 where nobody asks."""
    pooled_b: Bool[Array, "b"]
    """Whose hidden states are wanted, for an embedding."""
    packed_c: Int[Array, "c"] | None = None
    """Places of the grid [b, t] that are computed, one behind the other; its size for none. None: all of them."""
    known_b: Int[Array, "b"] | None = None
    """As in `Steps`."""


class Told(NamedTuple):
    """What a program has to say of its rows."""

    tokens_b: Int[Array, "b"]
    status_b: Int[Array, "b"]
    logprobs_b: Float[Array, "b"]
    top_ids_bm: Int[Array, "b m"]
    top_logprobs_bm: Float[Array, "b m"]


class Read(NamedTuple):
    """Log-probabilities of a prompt's tokens: of what follows each token, and of the likeliest."""

    logprobs_bt: Float[Array, "b t"]
    top_ids_btm: Int[Array, "b t m"]
    top_logprobs_btm: Float[Array, "b t m"]


Weights = Any
"""A list of arrays; where there is room for adapters, a pair of it and the room."""


class Form(NamedTuple):
    """How a model runs on a platform."""

    advance: Callable[[Weights, Pools, Chunk], tuple[Array, Any]]
    """(weights, pools, chunk) -> residual stream, and what `keep` takes: or, without one, the pools."""
    logits: Callable[[Weights, Array], Array]
    """(weights, residual stream) -> float32 logits."""
    hidden: Callable[[Weights, Array], Array]
    """(weights, residual stream) -> what the output projection reads."""
    keep: Callable[[Pools, Any, Chunk], Pools] | None
    stacked: bool = True
    """Weights of layers, and the room for adapters beside them, have an axis for repeats in front."""
    by_row: bool = False
    """Logits do not depend, to the last bit, on the company that a token is computed in: neither shall draws."""


def empty_rows(
    rows: int, vocab_size: int, settings: RowSettings, history: int = 0, guesses: int = 0
) -> RowState:
    """Nobody in any row. `settings` are those of one row, as neutral as they can be, and of nobody's. `history` is the
    length of a row, where guesses are made from it, `guesses` those of a draft model."""
    zeros = jnp.zeros((rows,), jnp.int32)
    return RowState(
        lengths_r=zeros,
        next_r=zeros,
        left_r=zeros,
        settings=jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf), rows, axis=0), settings),
        seen=Seen(jnp.zeros((rows, vocab_size), bool), jnp.zeros((rows, vocab_size), jnp.int32)),
        bound_r=jnp.zeros((rows,), bool),
        allowed_rw=jnp.zeros((rows, words_for(vocab_size)), jnp.uint32),
        drafting=no_history(rows, history, guesses) if history else None,
    )


def chunk_of(state: RowState, steps: Steps) -> Chunk:
    """A decode step as a chunk of one token a row; none of rows that have ended."""
    lengths_b = state.lengths_r[steps.rows_b]
    active_b = (state.left_r[steps.rows_b] > 0) & (steps.step < steps.counts_b)
    tokens_b1 = state.next_r[steps.rows_b][:, None]
    return Chunk(
        tokens_b1, steps.table_bp, lengths_b, active_b.astype(jnp.int32), lengths_b + 1, steps.adapters_b
    )


def decode_read(form: Form, weights, pools: Pools, state: RowState, steps: Steps) -> tuple[Told, Any]:
    """One token of each row, and what is to be written."""
    chunk = chunk_of(state, steps)
    x_b1d, written = form.advance(weights, pools, chunk)
    settings = jax.tree.map(lambda leaf: leaf[steps.rows_b], state.settings)
    logits_bv = form.logits(weights, x_b1d)[:, 0]
    allowed = Allowed(state.bound_r[steps.rows_b], state.allowed_rw)
    chosen = choose(logits_bv, settings, state.seen, chunk.lengths_b + 1, steps.rows_b, allowed, form.by_row)
    chosen = again(chosen, steps.known_b)
    return told(logits_bv, chosen, chunk.counts_b > 0, settings.ends), written


def decode_keep(
    form: Form, pools: Pools, state: RowState, steps: Steps, said: Told, written: Any
) -> tuple[Pools, RowState]:
    """The rows one token further."""
    chunk, rows = chunk_of(state, steps), steps.rows_b
    left_b = jnp.where(said.status_b == TOKEN, state.left_r[rows] - 1, 0)
    # A row that sat this step out keeps what it has.
    left_b = jnp.where(said.status_b == NOTHING, state.left_r[rows], left_b)
    state = state._replace(
        lengths_r=state.lengths_r.at[rows].add(chunk.counts_b),
        next_r=state.next_r.at[rows].set(
            jnp.where(said.status_b == NOTHING, state.next_r[rows], said.tokens_b)
        ),
        left_r=state.left_r.at[rows].set(left_b),
        seen=counted(state.seen, rows, said),
        drafting=noted_one(state.drafting, rows, chunk.lengths_b + 1, said),
    )
    return (written if form.keep is None else form.keep(pools, written, chunk)), state


def prompts_read(
    form: Form, weights, pools: Pools, state: RowState, prompts: Prompts
) -> tuple[tuple[Told, Read, Pooled], Any]:
    """A token of each row whose prompt ends here, the log-probabilities and hidden states that were asked for, what is
    to be written."""
    chunk = prompts.chunk
    if prompts.packed_c is None:
        x_btd, written = form.advance(weights, pools, chunk)
        read = prompt_logprobs(form, weights, x_btd, prompts.following_bt)
    else:
        x_c1d, written = form.advance(weights, pools, side_by_side(chunk, prompts.packed_c))
        x_btd = unpacked(x_c1d[:, 0], prompts.packed_c, chunk.tokens_bt.shape)
        # Nobody's places have nobody's token behind them.
        following_c = jnp.append(prompts.following_bt.reshape(-1), -1)[prompts.packed_c]
        found = prompt_logprobs(form, weights, x_c1d[None, :, 0], following_c[None])
        read = Read(*(unpacked(leaf[0], prompts.packed_c, chunk.tokens_bt.shape) for leaf in found))
    at_b = jnp.maximum(chunk.counts_b - 1, 0)
    last_b1d = jnp.take_along_axis(x_btd, at_b[:, None, None], axis=1)
    logits_bv = form.logits(weights, last_b1d)[:, 0]
    positions_b = chunk.lengths_b + chunk.counts_b
    allowed = Allowed(prompts.bound_b, state.allowed_rw)
    chosen = choose(
        logits_bv, prompts.settings, state.seen, positions_b, prompts.rows_b, allowed, form.by_row
    )
    chosen = again(chosen, prompts.known_b)
    said = told(logits_bv, chosen, prompts.last_b, jnp.asarray(prompts.settings.ends))
    return (said, read, pool(form, weights, x_btd, chunk.counts_b, prompts.pooled_b)), written


def prompts_keep(
    form: Form, pools: Pools, state: RowState, prompts: Prompts, said: tuple[Told, Read, Pooled], written: Any
) -> tuple[Pools, RowState]:
    """The rows with these chunks in the cache, and their settings."""
    rows, chunk, first = prompts.rows_b, prompts.chunk, said[0]

    def put(leaf: Array, values: Array) -> Array:
        return leaf.at[rows].set(values)

    state = state._replace(
        lengths_r=put(state.lengths_r, chunk.lengths_b + chunk.counts_b),
        next_r=put(state.next_r, first.tokens_b),
        left_r=put(state.left_r, jnp.where(first.status_b == TOKEN, prompts.left_b - 1, 0)),
        settings=jax.tree.map(put, state.settings, prompts.settings),
        seen=counted(state.seen, rows, first),
        bound_r=put(state.bound_r, prompts.bound_b),
        drafting=noted_one(state.drafting, rows, chunk.lengths_b + chunk.counts_b, first),
    )
    return (written if form.keep is None else form.keep(pools, written, chunk)), state


def side_by_side(chunk: Chunk, packed_c: Int[Array, "c"]) -> Chunk:
    """A chunk's tokens, each as a row of its own: those of a sequence see each other through its pages, as all of them
    are written first. So this is for forms that write in place."""
    b, t = chunk.tokens_bt.shape
    real_c, row_c = packed_c < b * t, jnp.minimum(packed_c // t, b - 1)
    lengths_c = chunk.lengths_b[row_c] + packed_c % t
    return Chunk(
        tokens_bt=jnp.append(chunk.tokens_bt.reshape(-1), 0)[packed_c][:, None],
        table_bp=jnp.where(real_c[:, None], chunk.table_bp[row_c], -1),
        lengths_b=jnp.where(real_c, lengths_c, 0),
        counts_b=real_c.astype(jnp.int32),
        documents_b=chunk.documents_b[row_c],
        adapters_b=None if chunk.adapters_b is None else chunk.adapters_b[row_c],
    )


def unpacked(x_c: Array, packed_c: Int[Array, "c"], grid: tuple[int, ...]) -> Array:
    """What was computed side by side, in its places of the grid [b, t]; zeros in the others."""
    empty = jnp.zeros((grid[0] * grid[1], *x_c.shape[1:]), x_c.dtype)
    return empty.at[packed_c].set(x_c, mode="drop").reshape(*grid, *x_c.shape[1:])


def again(chosen: Chosen, known_b: Int[Array, "b"] | None) -> Chosen:
    """What was chosen, or what is known already where there is something."""
    if known_b is None:
        return chosen
    return chosen._replace(tokens_b=jnp.where(known_b >= 0, known_b, chosen.tokens_b))


def told(
    logits_bv: Float[Array, "b v"], chosen: Chosen, active_b: Bool[Array, "b"], ends_be: Int[Array, "b e"]
) -> Told:
    """The chosen tokens of active rows, and whether they end them. Logits that are no finite numbers end their row."""
    ended_b = jnp.any(chosen.tokens_b[:, None] == ends_be, axis=-1)
    status_b = jnp.where(ended_b, ENDED, TOKEN)
    status_b = jnp.where(jnp.isfinite(jnp.sum(logits_bv, axis=-1)), status_b, NOT_FINITE)
    status_b = jnp.where(active_b, status_b, NOTHING).astype(jnp.int32)
    return Told(chosen.tokens_b, status_b, *chosen[1:])


def noted_one(
    drafting: Drafting | None, rows_b: Int[Array, "b"], at_b: Int[Array, "b"], said: Told
) -> Drafting | None:
    """What rows have said, with one token more."""
    return noted(drafting, rows_b, at_b, said.tokens_b[:, None], (said.status_b == TOKEN)[:, None])


def counted(seen: Seen, rows_b: Int[Array, "b"], said: Told) -> Seen:
    """What rows have had, with the tokens that they said."""
    added_b = (said.status_b == TOKEN).astype(jnp.int32)
    return seen._replace(counts_bv=seen.counts_bv.at[rows_b, said.tokens_b].add(added_b))


def prompt_logprobs(
    form: Form, weights, x_btd: Float[Array, "b t d"], following_bt: Int[Array, "b t"]
) -> Read:
    """Log-probabilities of the tokens that follow; zeros, and no time, where nobody asks."""
    b, t = following_bt.shape
    most, block = MOST_LOGPROBS, min(LOGPROB_BLOCK, t)
    sums = NATIVE if form.by_row else PLAIN

    def of_block(both: tuple[Array, Array]) -> Read:
        x_bcd, following_bc = both
        logits_bcv = form.logits(weights, x_bcd)
        rows_nv = logits_bcv.reshape(-1, logits_bcv.shape[-1])
        lse_bc = sums.exponentials(rows_nv)[2].reshape(following_bc.shape)
        own = jnp.take_along_axis(logits_bcv, jnp.maximum(following_bc, 0)[..., None], -1)[..., 0] - lse_bc
        values, ids = jax.lax.top_k(logits_bcv, min(most, logits_bcv.shape[-1]))
        pad = ((0, 0), (0, 0), (0, most - values.shape[-1]))
        return Read(own, jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(values - lse_bc[..., None], pad))

    def blocks(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -t % block), *((0, 0),) * (x.ndim - 2)))
        return jnp.swapaxes(padded.reshape(b, -1, block, *x.shape[2:]), 0, 1)

    def whole(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(b, -1, *x.shape[3:])[:, :t]

    def asked(x_btd: Array, following_bt: Array) -> Read:
        return Read(*map(whole, jax.lax.map(of_block, (blocks(x_btd), blocks(following_bt)))))

    def nobody(x_btd: Array, following_bt: Array) -> Read:
        return Read(
            jnp.zeros((b, t), jnp.float32),
            jnp.zeros((b, t, most), jnp.int32),
            jnp.zeros((b, t, most), jnp.float32),
        )

    return jax.lax.cond(jnp.any(following_bt >= 0), asked, nobody, x_btd, following_bt)


def seat(state: RowState, row: Array, prompt_v: Bool[Array, "v"], counts_v: Int[Array, "v"]) -> RowState:
    """A row with what it has had before it starts, for those with penalties."""
    seen = Seen(state.seen.prompt_bv.at[row].set(prompt_v), state.seen.counts_bv.at[row].set(counts_v))
    return state._replace(seen=seen)


def allow(
    allowed_rw: UInt32[Array, "r w"], rows_m: Int[Array, "m"], words_mw: UInt32[Array, "m w"]
) -> UInt32[Array, "r w"]:
    """What all rows may say, with that of some of them new."""
    return allowed_rw.at[rows_m].set(words_mw)


def words_for(vocab_size: int) -> int:
    """Words of 32 bits for one bit a token."""
    return -(-vocab_size // 32)
