"""How one call is cut for the TPU kernels, and which blocks of keys a block of queries sees at all.

Queries come in blocks of `query` positions times `heads` query heads of one kv head: the rows of a tile. Keys come in
blocks of `chunks` chunks: a block is what is fetched at a time, a chunk what is multiplied at a time. Whether a block
sees another is judged by least and most of positions and segments: numbers, which the kernels hold in scalar memory.
"""

import functools
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.kernels.attention.masks import Coordinates, Options

LANES = 128
"""Numbers side by side in a vector register; sizes of rows and chunks are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of one call; counts of positions unless said otherwise."""

    t: int
    s: int
    query: int
    """Query positions of a block."""
    heads: int
    """Query heads of a block; they share its keys."""
    parts: int
    """Blocks that the query heads of one kv head are divided among."""
    chunk: int
    chunks: int
    """Chunks of a block of keys."""

    @property
    def rows(self) -> int:
        return self.query * self.heads

    @property
    def key(self) -> int:
        return self.chunk * self.chunks

    @property
    def q_blocks(self) -> int:
        return -(-self.t // self.query)

    @property
    def kv_blocks(self) -> int:
        return -(-self.s // self.key)

    @property
    def all_chunks(self) -> int:
        return self.kv_blocks * self.chunks

    @property
    def padded_keys(self) -> bool:
        return self.s < self.all_chunks * self.chunk


def tile(t: int, s: int, g: int, *, rows: int, key: int, chunk: int) -> Tiling:
    """Cut `t` queries of `g` heads a kv head and `s` keys into about these sizes; short calls get smaller blocks."""
    heads = max(d for d in range(1, g + 1) if g % d == 0 and (d == 1 or d * LANES <= rows))
    unit = max(LANES // int(np.gcd(heads, LANES)), 8)  # rows stay a multiple of LANES
    most = max(rows // heads // LANES, 1) * LANES
    chunk = min(chunk, -(-s // LANES) * LANES)
    return Tiling(
        t=t,
        s=s,
        query=min(most, -(-t // unit) * unit),
        heads=heads,
        parts=g // heads,
        chunk=chunk,
        chunks=min(max(key // chunk, 1), -(-s // chunk)),
    )


class Extremes(NamedTuple):
    """Least and most of the positions and segments of a block: arrays, or scalars inside a kernel."""

    position_least: Any
    position_most: Any
    segment_least: Any = None
    segment_most: Any = None


def some_see(options: Options, q: Extremes, kv: Extremes) -> Any:
    """False where no query of a block sees any key of another."""
    parts: list[Any] = [True]
    if options.causal:
        parts.append(kv.position_least <= q.position_most)
    if options.window is not None:
        parts.append(q.position_least - kv.position_most < options.window)
    if q.segment_least is not None:
        parts += [kv.segment_least <= q.segment_most, kv.segment_most >= q.segment_least, kv.segment_most > 0]
    return functools.reduce(operator.and_, parts)


def all_see(options: Options, q: Extremes, kv: Extremes) -> Any:
    """True only where every query of a block sees every key of another: no mask is needed."""
    parts: list[Any] = [True]
    if options.causal:
        parts.append(kv.position_most <= q.position_least)
    if options.window is not None:
        parts.append(q.position_most - kv.position_least < options.window)
    if q.segment_least is not None:
        one = (q.segment_least == q.segment_most) & (kv.segment_least == kv.segment_most)
        parts += [one, q.segment_least == kv.segment_least, kv.segment_least > 0]
    return functools.reduce(operator.and_, parts)


def scalar_count(tiling: Tiling, rows: int) -> int:
    """At most this many numbers a kernel holds in scalar memory, of `rows` batch rows."""
    return rows * (6 * tiling.q_blocks + 4 * tiling.all_chunks + 2 * tiling.kv_blocks)


def needed(at: Coordinates, options: Options) -> Coordinates:
    """Without positions that no option looks at."""
    return (
        at
        if options.causal or options.window is not None
        else at._replace(q_positions=None, kv_positions=None)
    )


class Scalars:
    """Numbers of a call in one flat int32 array, which kernels hold in scalar memory; the places are static.

    `own` is the side whose blocks a kernel's grid walks ("query" or "key"); the blocks of the other side that such a
    block sees are `[first, first + count)`, and `width` is the largest count (traced where only the run time knows).
    """

    def __init__(self, options: Options, tiling: Tiling, at: Coordinates, own: str):
        self.options, self.tiling, self.own = options, tiling, own
        q = _block_extremes(at.q_positions, at.q_segments, tiling.t, tiling.query, tiling.q_blocks)
        kv = _block_extremes(at.kv_positions, at.kv_segments, tiling.s, tiling.chunk, tiling.all_chunks)
        first, count = _ranges(options, tiling, q, kv, own)
        self.rows, self.own_blocks = first.shape
        if isinstance(count, jax.Array):  # a guess; only costs are made of it
            self.seen_blocks = tiling.q_blocks * tiling.kv_blocks / (2 if options.causal else 1)
        else:
            self.seen_blocks = float(count.sum())
        self.width = jnp.maximum(count.max(), 1) if isinstance(count, jax.Array) else max(int(count.max()), 1)
        fields = {"first": first, "count": count}
        for side, extremes, given in (("q", q, at.q_positions), ("kv", kv, at.kv_positions)):
            held = {"position": given is not None, "segment": at.q_segments is not None}
            fields |= {
                f"{side}.{name}": value
                for name, value in extremes._asdict().items()
                if value is not None and held[name.partition("_")[0]]
            }
        self._places: dict[str, tuple[int, int]] = {}
        flat, place = [], 0
        for name, value in fields.items():
            value = jnp.broadcast_to(jnp.asarray(value, jnp.int32), (self.rows, value.shape[1]))
            self._places[name] = (place, value.shape[1])
            flat.append(value.reshape(-1))
            place += value.size
        self.array = jnp.concatenate(flat)

    def cost(self, heads: int, per_logit: int, fixed: Iterable, fetched: Iterable) -> dict[str, int]:
        """FLOPs, exponentials and bytes of a kernel, for XLA's schedule: `heads` counts batch rows times query heads,
        `per_logit` the multiply-adds of a logit; `fixed` arrays move once, blocks of `fetched` ones for each pair of
        blocks that see each other."""
        tiling = self.tiling
        logits = heads * tiling.query * tiling.key * self.seen_blocks
        passes = self.seen_blocks / (tiling.kv_blocks if self.own == "query" else tiling.q_blocks)
        passes *= tiling.parts if self.own == "query" else 1
        once, again = (
            sum(a.size * jnp.dtype(a.dtype).itemsize for a in arrays) for arrays in (fixed, fetched)
        )
        return {
            "flops": int(2 * logits * per_logit),
            "transcendentals": int(logits),
            "bytes_accessed": int(once + passes * again),
        }

    def read(self, ref, name: str, row, block):
        """A number of the array, of a batch row's block."""
        place, blocks = self._places[name]
        return ref[place + (row * blocks if self.rows > 1 else 0) + block]

    def q(self, ref, row, block) -> Extremes:
        """Of a block of queries."""
        return self._extremes(ref, "q", row, block, self.tiling.query)

    def kv(self, ref, row, chunk) -> Extremes:
        """Of a chunk of keys."""
        return self._extremes(ref, "kv", row, chunk, self.tiling.chunk)

    def _extremes(self, ref, side: str, row, block, size: int) -> Extremes:
        def read(name: str):
            place = f"{side}.{name}"
            return self.read(ref, place, row, block) if place in self._places else None

        least, most = read("position_least"), read("position_most")
        if least is None:
            least, most = block * size, block * size + size - 1
        return Extremes(least, most, read("segment_least"), read("segment_most"))

    def needs_mask(self, ref, row, i, chunk):
        """Whether the chunk has a key that some query of block i does not see; False where that is never so."""
        full = all_see(self.options, self.q(ref, row, i), self.kv(ref, row, chunk))
        if self.tiling.padded_keys:
            full = full & ((chunk + 1) * self.tiling.chunk <= self.tiling.s)
        return False if full is True else jnp.logical_not(full)

    def has_work(self, ref, row, i, chunk):
        """Whether some query of block i may see a key of the chunk."""
        real = chunk * self.tiling.chunk < self.tiling.s
        return real & some_see(self.options, self.q(ref, row, i), self.kv(ref, row, chunk))


def _block_extremes(positions, segments, size: int, block: int, blocks: int) -> Extremes:
    """[b or 1, blocks] each; padding repeats the last. numpy where nothing is given, so that ranges are static."""
    least, most = _least_and_most(np.arange(size)[None] if positions is None else positions, block, blocks)
    if segments is None:
        return Extremes(least, most)
    return Extremes(least, most, *_least_and_most(segments, block, blocks))


def _least_and_most(coordinate, block: int, blocks: int):
    lib = np if isinstance(coordinate, np.ndarray) else jnp
    padded = lib.pad(coordinate, ((0, 0), (0, blocks * block - coordinate.shape[1])), mode="edge")
    grouped = padded.reshape(padded.shape[0], blocks, block)
    return grouped.min(-1), grouped.max(-1)


def _ranges(options: Options, tiling: Tiling, q: Extremes, kv: Extremes, own: str):
    """First other block that each own block sees, and how many from there to the last it sees: [b or 1, own blocks]."""
    q = Extremes(*(None if a is None else a[:, :, None] for a in q))
    kv = Extremes(*(None if a is None else a[:, None, :] for a in kv))
    real = np.arange(tiling.all_chunks) * tiling.chunk < tiling.s
    see = np.ones((1, tiling.q_blocks, 1), bool) & real & some_see(options, q, kv)
    see = see.reshape(see.shape[0], tiling.q_blocks, tiling.kv_blocks, tiling.chunks).any(-1)
    if own == "key":
        see = see.swapaxes(1, 2)
    first = see.argmax(-1)
    return first, (see.shape[-1] - see[:, :, ::-1].argmax(-1) - first) * see.any(-1)
