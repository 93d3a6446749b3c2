"""From logits to one token a row, for any mixture of settings in one compiled program.

Nothing is sorted: a filter that keeps the likeliest tokens is a threshold on the logit, found by bisection over the 32
bits of a float (each bit decided by one pass over the vocabulary). What no row asks for is skipped at run time. A draw
takes one uniform number, a function of the row's seed and position alone, and inverts the distribution.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from maxstack.kernels import cpu_native
from maxstack.models.generation.params import MOST_LOGPROBS, RowSettings

SMALLEST_TEMPERATURE = 1e-6
LEAST = -1e30
"""Above -inf, and below it still when divided by the smallest temperature."""
# Tokens that a draw sums at a time; the square root of a vocabulary or so.
DRAW_BLOCK = 256


class Sums(NamedTuple):
    """How rows are summed."""

    last: Callable[[Array], Array]
    """Over the last axis."""
    exponentials: Callable[[Array], tuple[Array, Array, Array]]
    """e^(x - its row's largest) of [b, v], the sums of its rows, the log-sum-exp of the rows of x."""


def plain_exponentials(x_bv: Float[Array, "b v"]) -> tuple[Array, Array, Array]:
    """As `Sums.exponentials`, by XLA."""
    most_b = jnp.max(x_bv, -1)
    e_bv = jnp.exp(x_bv - most_b[:, None])
    total_b = jnp.sum(e_bv, -1)
    return e_bv, total_b, most_b + jnp.log(total_b)


PLAIN = Sums(lambda x: jnp.sum(x, -1), plain_exponentials)
NATIVE = Sums(cpu_native.row_sums, cpu_native.row_exponentials)
"""A row's results do not depend on how many there are."""


class Seen(NamedTuple):
    """What a row has had so far."""

    prompt_bv: Bool[Array, "b v"]
    counts_bv: Int[Array, "b v"]
    """Of each token in the output."""

    def of(self, rows: Int[Array, "c"]) -> "Seen":
        """What some of the rows have had."""
        return Seen(self.prompt_bv[rows], self.counts_bv[rows])


class Allowed(NamedTuple):
    """Which tokens rows may say, for those that are bound."""

    bound_b: Bool[Array, "b"]
    words_rw: UInt32[Array, "r w"]
    """One bit a token, of all rows that there are; read only if some row is bound."""


class Chosen(NamedTuple):
    """A token a row. Log-probabilities are the model's own, before any setting; 0 where no row asked for them."""

    tokens_b: Int[Array, "b"]
    logprobs_b: Float[Array, "b"]
    top_ids_bm: Int[Array, "b m"]
    top_logprobs_bm: Float[Array, "b m"]


def choose(
    logits_bv: Float[Array, "b v"], settings: RowSettings, seen: Seen, positions_b: Int[Array, "b"],
    rows_b: Int[Array, "b"] | None = None, allowed: Allowed | None = None, by_row: bool = False,
) -> Chosen:  # fmt: skip
    """One token a row; `positions_b` are the tokens' places in their rows. `rows_b` says which rows of `seen` and
    `allowed` these are, where they have others too; they are looked up only if some row needs them. With `by_row`,
    on a CPU with C++, what is summed over a row does not depend, to the last bit, on how many rows there are."""
    s = settings
    penalties = (s.repetition_penalty != 1) | (s.presence_penalty != 0) | (s.frequency_penalty != 0)
    x = when(jnp.any(s.bias != 0), lambda x: biased(x, s), logits_bv)
    x = when(jnp.any(penalties), lambda x: penalised(x, s, seen if rows_b is None else seen.of(rows_b)), x)
    early_b = positions_b < s.earliest
    x = when(jnp.any(early_b), lambda x: unending(x, s, early_b), x)
    if allowed is not None:
        words = allowed.words_rw if rows_b is None else allowed.words_rw[rows_b]
        x = when(jnp.any(allowed.bound_b), lambda x: restricted(x, allowed.bound_b, words), x)
    likeliest = jnp.argmax(x, -1).astype(jnp.int32)
    sums = NATIVE if by_row else PLAIN
    tokens = jax.lax.cond(
        jnp.any(s.temperature > 0),
        lambda x: jnp.where(
            s.temperature > 0, draw(filtered(x, s, sums), jnp.asarray(s.seed), positions_b, sums), likeliest
        ),
        lambda x: likeliest,
        x,
    )
    return report(logits_bv, tokens, jnp.asarray(s.logprobs), sums)


def when(condition: Array, change: Callable[[Array], Array], x: Array) -> Array:
    """`change(x)` where the condition holds, x itself otherwise, decided at run time."""
    return jax.lax.cond(condition, change, lambda x: x, x)


def biased(logits_bv: Float[Array, "b v"], settings: RowSettings) -> Float[Array, "b v"]:
    """Logits with each row's biases added."""
    rows = jnp.arange(logits_bv.shape[0])[:, None]
    return logits_bv.at[rows, settings.bias_ids].add(settings.bias, mode="drop")


def unending(
    logits_bv: Float[Array, "b v"], settings: RowSettings, early_b: Bool[Array, "b"]
) -> Float[Array, "b v"]:
    """-inf for the tokens that end a row, where it is too early for them."""
    rows = jnp.arange(logits_bv.shape[0])[:, None]
    ids = jnp.where(early_b[:, None], settings.ends, logits_bv.shape[1])
    return logits_bv.at[rows, ids].set(-jnp.inf, mode="drop")


def restricted(
    logits_bv: Float[Array, "b v"], bound_b: Bool[Array, "b"], words_bw: UInt32[Array, "b w"]
) -> Float[Array, "b v"]:
    """-inf for the tokens that bound rows may not say. One that they may say keeps a chance, whatever its bias is."""
    bits = words_bw[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(len(bits), -1)[:, : logits_bv.shape[1]] == 1
    x = jnp.where(allowed, jnp.maximum(logits_bv, LEAST), -jnp.inf)
    return jnp.where(bound_b[:, None], x, logits_bv)


def penalised(logits_bv: Float[Array, "b v"], settings: RowSettings, seen: Seen) -> Float[Array, "b v"]:
    """Repetition (Keskar et al. 2019, arXiv:1909.05858, section 4.1) over prompt and output; frequency and presence,
    as OpenAI's interface defines them, over the output."""
    repetition = settings.repetition_penalty[:, None]
    punished = jnp.where(logits_bv > 0, logits_bv / repetition, logits_bv * repetition)
    x = jnp.where(seen.prompt_bv | (seen.counts_bv > 0), punished, logits_bv)
    x = x - settings.frequency_penalty[:, None] * seen.counts_bv
    return x - settings.presence_penalty[:, None] * (seen.counts_bv > 0)


def filtered(
    logits_bv: Float[Array, "b v"], settings: RowSettings, sums: Sums = PLAIN
) -> Float[Array, "b v"]:
    """Logits over temperature, -inf for tokens that top_k, top_p or min_p leave out."""
    x = logits_bv / jnp.maximum(settings.temperature, SMALLEST_TEMPERATURE)[:, None]
    top_k, top_p, min_p = (jnp.asarray(part) for part in (settings.top_k, settings.top_p, settings.min_p))
    x = when(jnp.any(top_k > 0), lambda x: keep_top_k(x, top_k), x)
    x = when(jnp.any(top_p < 1), lambda x: keep_top_p(x, top_p, sums), x)
    least = jnp.max(x, -1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(x >= least, x, -jnp.inf)


def keep_top_k(x_bv: Float[Array, "b v"], top_k_b: Int[Array, "b"]) -> Float[Array, "b v"]:
    """-inf for all but the k largest of each row; 0 keeps all."""
    keys = sortable(x_bv)
    limits = jnp.minimum(top_k_b, x_bv.shape[-1])
    floor = threshold(lambda inside: jnp.sum(inside, -1) >= limits, keys)
    return jnp.where((keys >= floor[:, None]) | (top_k_b == 0)[:, None], x_bv, -jnp.inf)


def keep_top_p(
    x_bv: Float[Array, "b v"], top_p_b: Float[Array, "b"], sums: Sums = PLAIN
) -> Float[Array, "b v"]:
    """-inf for all but each row's fewest likeliest tokens whose probability reaches top_p (arXiv:1904.09751)."""
    e_bv, total_b, _ = sums.exponentials(x_bv)
    keys, p_bv = sortable(x_bv), e_bv / total_b[:, None]
    floor = threshold(lambda inside: sums.last(jnp.where(inside, p_bv, 0)) >= top_p_b, keys)
    return jnp.where((keys >= floor[:, None]) | (top_p_b == 1)[:, None], x_bv, -jnp.inf)


def sortable(x: Float[Array, "b v"]) -> UInt32[Array, "b v"]:
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def threshold(
    enough: Callable[[Bool[Array, "b v"]], Bool[Array, "b"]], keys_bv: UInt32[Array, "b v"]
) -> UInt32[Array, "b"]:
    """The largest key whose row's keys from it on are still `enough`; 0 where no key is."""

    def decide(i: Array, floor: Array) -> Array:
        candidate = floor | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(keys_bv >= candidate[:, None]), candidate, floor)

    return jax.lax.fori_loop(0, 32, decide, jnp.zeros(keys_bv.shape[:1], jnp.uint32))


def draw(
    x_bv: Float[Array, "b v"], seeds_b: UInt32[Array, "b"], positions_b: Int[Array, "b"],
    sums: Sums = PLAIN,
) -> Int[Array, "b"]:  # fmt: skip
    """A token of each row by its probability: the first at which the running sum passes a uniform share of the whole.

    The sum runs over blocks, then inside the block it ends in.
    """
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds_b, positions_b)
    uniform_b = jax.vmap(jax.random.uniform)(keys)
    b, v = x_bv.shape
    p = jnp.pad(sums.exponentials(x_bv)[0], ((0, 0), (0, -v % DRAW_BLOCK))).reshape(b, -1, DRAW_BLOCK)
    upto = jnp.cumsum(sums.last(p), -1)
    target = uniform_b * upto[:, -1]
    block = first_past(upto, target)
    before = jnp.where(block > 0, jnp.take_along_axis(upto, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0)
    inside = jnp.take_along_axis(p, block[:, None, None], 1)[:, 0]
    return block * DRAW_BLOCK + first_past(jnp.cumsum(inside, -1), target - before)


def first_past(upto_bm: Float[Array, "b m"], target_b: Float[Array, "b"]) -> Int[Array, "b"]:
    """The first place whose running sum is above the target, or, when rounding lets none, the last that adds to it."""
    found = jnp.sum(upto_bm <= target_b[:, None], -1)
    last = jnp.argmax(upto_bm == upto_bm[:, -1:], -1)
    return jnp.minimum(found, last).astype(jnp.int32)


def report(
    logits_bv: Float[Array, "b v"], tokens_b: Int[Array, "b"], logprobs_b: Int[Array, "b"],
    sums: Sums = PLAIN,
) -> Chosen:  # fmt: skip
    """The tokens with what rows want to know of their probabilities."""
    b, v = logits_bv.shape
    most = min(MOST_LOGPROBS, v)

    def chosen(x: Array) -> tuple[Array, Array]:
        _, _, lse = sums.exponentials(x)
        return jnp.take_along_axis(x, tokens_b[:, None], 1)[:, 0] - lse, lse

    def top(x: Array, lse: Array) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(x, most)
        return ids.astype(jnp.int32), values - lse[:, None]

    none = jnp.zeros((b, most), jnp.int32), jnp.zeros((b, most), jnp.float32)
    zeros = jnp.zeros((b,), jnp.float32)
    own, lse = jax.lax.cond(jnp.any(logprobs_b >= 0), chosen, lambda x: (zeros, zeros), logits_bv)
    ids, values = jax.lax.cond(jnp.any(logprobs_b > 0), top, lambda x, lse: none, logits_bv, lse)
    return Chosen(tokens_b, own, ids, values)
