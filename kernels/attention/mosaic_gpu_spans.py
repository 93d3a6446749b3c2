"""Which keys a block of queries can see, for the Hopper kernels: bounds of loops, and ids for the mask of a tile.

A *span* is four numbers: blocks `[first, last)` are visited, and of these `[whole, whole_end)` need no mask, for every
pair in them is visible. They come from the extremes of positions and segments of each block, so they hold for any ids
whatever; for causal rows and windows no block is visited in vain, for packed documents hardly one. Inside of a tile
the mask is asked element by element, by the ids themselves: nothing is assumed of their order.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from maxstack.kernels.attention.masks import Coordinates, Options

FIRST, WHOLE, WHOLE_END, LAST = range(4)


class Extremes(NamedTuple):
    """Least and most of a coordinate in each block, [b or 1, blocks]."""

    least: Int[Array, "b c"]
    most: Int[Array, "b c"]


def extremes(ids: Int[Array, "b x"] | None, size: int, block: int) -> Extremes:
    """Of `ids`, or of the indices where ids are None; the last block repeats its last id."""
    padded = -(-size // block) * block
    ids = jnp.arange(size, dtype=jnp.int32)[None] if ids is None else ids
    grouped = jnp.pad(ids, ((0, 0), (0, padded - size)), mode="edge").reshape(ids.shape[0], -1, block)
    return Extremes(grouped.min(-1), grouped.max(-1))


class Pairs(NamedTuple):
    """Of each pair of blocks, [b or 1, query blocks, key blocks]."""

    some: Bool[Array, "b q s"]
    """Some pair may be visible; False is certain."""
    every: Bool[Array, "b q s"]
    """Every pair is visible."""

    def transposed(self) -> "Pairs":
        return Pairs(*(jnp.swapaxes(pairs, 1, 2) for pairs in self))


def pairs(at: Coordinates, options: Options, t: int, s: int, q_block: int, kv_block: int) -> Pairs:
    """What blocks of `q_block` queries see of blocks of `kv_block` keys."""
    q, kv = extremes(at.q_positions, t, q_block), extremes(at.kv_positions, s, kv_block)
    q, kv = Extremes(*(x[:, :, None] for x in q)), Extremes(*(x[:, None, :] for x in kv))
    some = jnp.ones((1, q.least.shape[1], kv.least.shape[2]), bool)
    # A last block that is not full of keys needs its mask.
    every = some & (jnp.arange(1, kv.least.shape[2] + 1) * kv_block <= s)
    if options.causal:
        some, every = some & (kv.least <= q.most), every & (kv.most <= q.least)
    if options.window is not None:
        some &= q.least - kv.most < options.window
        every &= q.most - kv.least < options.window
    if at.q_segments is not None:
        q, kv = extremes(at.q_segments, t, q_block), extremes(at.kv_segments, s, kv_block)
        q, kv = Extremes(*(x[:, :, None] for x in q)), Extremes(*(x[:, None, :] for x in kv))
        some &= (kv.least <= q.most) & (kv.most >= q.least) & (kv.most > 0)
        every &= (kv.least == kv.most) & (q.least == q.most) & (q.least == kv.least) & (kv.least > 0)
    return Pairs(some, every)


def spans(seen: Pairs, together: int) -> Int[Array, "b c w 4"]:
    """Spans of the rows of `seen`, `together` rows at a time.

    Entry `[:, c, w]` is the span of row `c·together + w`; entry `[:, c, together]` holds in FIRST and LAST the blocks
    that any of them visits. Rows that fill up the last group visit nothing.
    """
    count = seen.some.shape[2]
    some, every = (_filled(x, together) for x in seen)
    index = jnp.arange(count)
    first = jnp.where(some, index, count).min(-1)
    last = jnp.where(some, index + 1, 0).max(-1)
    first = jnp.minimum(first, last)
    whole = jnp.where(every, index, count).min(-1)
    whole_end = jnp.where(~every & (index >= whole[..., None]), index, count).min(-1)
    own = jnp.stack([first, whole, whole_end, last], -1).reshape(first.shape[0], -1, together, 4)
    seeing = own[..., LAST] > own[..., FIRST]
    union_last = jnp.max(own[..., LAST], -1)
    union_first = jnp.minimum(jnp.where(seeing, own[..., FIRST], count).min(-1), union_last)
    union = jnp.stack([union_first, union_first, union_first, union_last], -1)[:, :, None]
    # A member that visits nothing stands at the front of what the others visit.
    own = jnp.where(seeing[..., None], own, union_first[..., None, None])
    return jnp.concatenate([own, union], 2).astype(jnp.int32)


def _filled(rows: Bool[Array, "b c s"], together: int):
    missing = -rows.shape[1] % together
    return jnp.pad(rows, ((0, 0), (0, missing), (0, 0)))


class Ids(NamedTuple):
    """What the kernels load beside the blocks to mask elements, [b, count, padded length] or None: positions, then
    segments, of those that are given. Ids that fill up the last block are 0: a segment 0 sees nothing."""

    q: Int[Array, "b i t"] | None
    kv: Int[Array, "b i s"] | None


def ids(at: Coordinates, q_block: int, kv_block: int) -> Ids:
    """Ids of both sides, filled up to whole blocks."""
    return Ids(
        _stacked((at.q_positions, at.q_segments), q_block),
        _stacked((at.kv_positions, at.kv_segments), kv_block),
    )


def with_indices(at: Coordinates, t: int, s: int) -> Coordinates:
    """`at` with the indices as positions, where none are given."""
    if at.q_positions is not None:
        return at
    b = 1 if at.q_segments is None else at.q_segments.shape[0]
    q, kv = (jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (b, size)) for size in (t, s))
    return at._replace(q_positions=q, kv_positions=kv)


@dataclass(frozen=True)
class Inputs:
    """What a kernel gets: arrays by name, those of this module with them."""

    of: dict[str, Array | None]
    """The kernel's own, and `span`, `q_ids`, `kv_ids`."""
    count: int
    """Ids of a position: of none, one or both of positions and segments."""
    given: tuple[bool, bool]
    """Whether there are positions, and segments."""

    def span_row(self, row):
        """Where the spans of a row of the batch are; one serves all where nothing of it differs."""
        return row if _rows(self.of["span"]) > 1 else 0

    def id_row(self, row):
        """Where the ids of a row of the batch are."""
        return row if _rows(self.of["q_ids"]) > 1 else 0


def inputs(
    arrays: dict[str, Array], span: Int[Array, "b c w 4"], at: Coordinates, q_block: int, kv_block: int
) -> Inputs:
    """Of a kernel whose blocks have so many queries and keys."""
    both = ids(at, q_block, kv_block)
    count = 0 if both.q is None else both.q.shape[1]
    of = arrays | {"span": span, "q_ids": both.q, "kv_ids": both.kv}
    return Inputs(of, count, (at.q_positions is not None, at.q_segments is not None))


def _rows(x: Array | None) -> int:
    return 0 if x is None else x.shape[0]


def _stacked(given, block: int):
    given = [x.astype(jnp.int32) for x in given if x is not None]
    if not given:
        return None
    return jnp.pad(jnp.stack(given, 1), ((0, 0), (0, 0), (0, -given[0].shape[1] % block)))
