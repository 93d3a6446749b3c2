"""What every backend needs to know of a call: options, page ranges of the splits, and how parts become one result."""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is known when the program is compiled."""

    window: int | None
    """A query sees this many positions, itself included; None is all."""
    softcap: float | None
    """Logits become `softcap · tanh(logits / softcap)`."""
    scale: float
    """Logits are `scale · q·k`."""
    splits: int = 1
    """Parts of each sequence that are computed apart."""
    final: bool = False
    """A part is all of the result: nothing is merged into it, and it may be rounded as the queries are."""


def usable(page_table_bp, pool: int) -> Int[Array, "b p"]:
    """The table with -1 for every entry that is no page of the pool."""
    page_table_bp = jnp.asarray(page_table_bp)
    inside = (page_table_bp >= 0) & (page_table_bp < pool)
    return jnp.where(inside, page_table_bp, -1).astype(jnp.int32)


def page_ranges(
    lengths_b: Int[Array, "b"], t: int, options: Options, page: int, table_pages: int
) -> tuple[Int[Array, "b s"], Int[Array, "b s"]]:
    """First and past-the-last logical page of each split: the pages that any of the `t` queries sees, in even parts."""
    last = -(-jnp.clip(lengths_b, 0, table_pages * page) // page)
    first = jnp.zeros_like(last)
    if options.window is not None:
        first = jnp.clip((lengths_b - t - options.window + 1) // page, 0, last)
    each = -(-(last - first) // options.splits)
    starts = first[:, None] + jnp.arange(options.splits) * each[:, None]
    starts = jnp.minimum(starts, last[:, None])
    ends = jnp.minimum(starts + each[:, None], last[:, None])
    return starts.astype(jnp.int32), ends.astype(jnp.int32)


def merged(
    out_sbtnh: Float[Array, "s b t n h"], lse_sbtn: Float[Array, "s b t n"], sinks_n: Float[Array, "n"] | None
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """One result of the results over disjoint keys, and of sinks: exact but for rounding, for outs are means.

    A part that saw nothing has lse -inf and out 0.
    """
    lse = lse_sbtn[0]
    if lse_sbtn.shape[0] > 1:
        top = finite(jnp.max(lse_sbtn, axis=0))
        lse = top + jnp.log(jnp.sum(jnp.exp(lse_sbtn - top), axis=0))
    if sinks_n is not None:
        lse = jnp.logaddexp(lse, sinks_n.astype(lse.dtype))
    if lse_sbtn.shape[0] == 1 and sinks_n is None:
        return out_sbtnh[0], lse
    weights = jnp.exp(lse_sbtn - finite(lse))
    return jnp.sum(out_sbtnh * weights[..., None], axis=0), lse


def finite(x: Array) -> Array:
    """`x` with 0 for -inf, so that a difference with it is no nan."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def by_kv_head(q_btnh: Float[Array, "b t n h"], k: int) -> Float[Array, "b k m h"]:
    """Query rows beside the kv head they share: `m` is (query, head of the group)."""
    b, t, n, h = q_btnh.shape
    return jnp.moveaxis(q_btnh.reshape(b, t, k, n // k, h), 1, 2).reshape(b, k, t * (n // k), h)


def by_query(x_sbkm: Array, t: int) -> Array:
    """[s, b, t, n, …] of [s, b, k, m, …]."""
    s, b, k, m, *rest = x_sbkm.shape
    x = jnp.moveaxis(x_sbkm.reshape(s, b, k, t, m // t, *rest), 3, 2)
    return x.reshape(s, b, t, k * (m // t), *rest)


class Pieces(NamedTuple):
    """Work for a kernel: `r` pieces, each some queries of one sequence over one range of its pages."""

    q_rkmh: Array
    """Query rows beside their kv head; `m` is (query, head of the group)."""
    sequences_r: Array
    """Which row of the table."""
    ends_r: Array
    """One past the position of the last query."""
    first_r: Array
    """First logical page."""
    last_r: Array
    """One past the last."""


def pieces(
    q_btnh: Float[Array, "b t n h"],
    kv_heads: int,
    lengths_b: Int[Array, "b"],
    options: Options,
    page: int,
    table_pages: int,
    most_rows: int,
    step: int = 1,
) -> tuple[Pieces, int]:
    """A call cut into pieces of at most `most_rows` query rows (at least one query), and the queries of each.

    Queries that do not fill the first piece are padded in front, where they see no more than real ones. With a `step`
    pieces have a multiple of it, as even as that allows.
    """
    b, t, n, _ = q_btnh.shape
    each = max(1, min(t, most_rows // (n // kv_heads)))
    if step > 1:
        most = max(step, most_rows // (n // kv_heads) // step * step)
        each = -(-t // -(-t // most))
        each = -(-each // step) * step
    tiles = -(-t // each)
    q_btnh = jnp.pad(q_btnh, ((0, 0), (tiles * each - t, 0), (0, 0), (0, 0)))
    q_rkmh = by_kv_head(q_btnh.reshape(b * tiles, each, *q_btnh.shape[2:]), kv_heads)
    ends = (lengths_b[:, None] - each * jnp.arange(tiles)[::-1]).reshape(-1)
    first, last = page_ranges(ends, each, options, page, table_pages)

    def split(x):
        return jnp.repeat(x, options.splits, axis=0)

    sequences = jnp.arange(b * tiles, dtype=jnp.int32) // tiles
    ends = ends.astype(jnp.int32)
    return Pieces(q_rkmh, split(sequences), split(ends), first.reshape(-1), last.reshape(-1)), each


def joined(x_rkm: Array, b: int, t: int, each: int, splits: int) -> Array:
    """[s, b, t, n, …] of the results [r, k, m, …] of pieces with `each` queries."""
    k, m, *rest = x_rkm.shape[1:]
    x = jnp.moveaxis(x_rkm.reshape(-1, splits, k, m, *rest), 1, 0)  # s (b tiles) k m
    x = by_query(x, each)  # s (b tiles) each n
    return x.reshape(splits, b, -1, *x.shape[3:])[:, :, -t:]
