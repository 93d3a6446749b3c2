"""Arrays as the TPU kernels see them, in blocks; cutting them is one transposition each, which XLA fuses with its
neighbours where it can.

    by queries  [b, kv heads · parts, q blocks, rows, size] or [.., size, rows]
    by keys     [b, kv heads, chunks, chunk, size]          or [.., size, chunk]
    ids         [b or 1, q blocks, ids, rows] and [b or 1, chunks, ids, chunk]; segments before positions
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from maxstack.kernels.attention.masks import Coordinates
from maxstack.kernels.attention.mosaic_tpu_tiling import Scalars, Tiling


def rows_of(x_btnh, tiling: Tiling, *, fill: float = 0.0):
    """By queries, size last; queries beyond the last are `fill`."""
    b, t, n, h = x_btnh.shape
    pad = tiling.q_blocks * tiling.query - t
    x = jnp.pad(x_btnh, ((0, 0), (0, pad), (0, 0), (0, 0)), constant_values=fill)
    x = x.reshape(b, tiling.q_blocks, tiling.query, n // tiling.heads, tiling.heads, h)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, n // tiling.heads, tiling.q_blocks, tiling.rows, h)


def from_rows(x, tiling: Tiling):
    """[b, t, n, h] of what is by queries, size before rows."""
    b, blocks, _, h, _ = x.shape
    x = x.reshape(b, blocks, tiling.q_blocks, h, tiling.heads, tiling.query).transpose(0, 2, 5, 1, 4, 3)
    return x.reshape(b, tiling.q_blocks * tiling.query, blocks * tiling.heads, h)[:, : tiling.t]


def chunks_of(x_bskh, tiling: Tiling, *, keys_last: bool = False):
    """By keys, zeros beyond the last."""
    b, s, k, h = x_bskh.shape
    x = jnp.pad(x_bskh, ((0, 0), (0, tiling.all_chunks * tiling.chunk - s), (0, 0), (0, 0)))
    x = x.reshape(b, tiling.all_chunks, tiling.chunk, k, h)
    return x.transpose((0, 3, 1, 4, 2) if keys_last else (0, 3, 1, 2, 4))


def from_chunks(x, tiling: Tiling):
    """[b, s, k, h] of what is by keys, size last."""
    b, k, _, _, h = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(b, -1, k, h)[:, : tiling.s]


class Ids(NamedTuple):
    """What masks are made of, beside indices."""

    names: tuple[str, ...]
    q: Any
    kv: Any

    def of_q(self, ref) -> dict[str, Any]:
        """[1, rows] by name, of a block inside a kernel."""
        return {name: ref[n : n + 1] for n, name in enumerate(self.names)}

    def of_chunk(self, ref, c) -> dict[str, Any]:
        """[1, chunk] by name, of a chunk of a block inside a kernel."""
        return {name: ref[c, n : n + 1] for n, name in enumerate(self.names)}


def ids_of(at: Coordinates, tiling: Tiling) -> Ids:
    """The ids of a call; arrays are None where there are none."""
    given = {"segment": (at.q_segments, at.kv_segments), "position": (at.q_positions, at.kv_positions)}
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    if not given:
        return Ids((), None, None)
    q = [_cut(q, tiling.q_blocks, tiling.query) for q, _ in given.values()]
    kv = [_cut(kv, tiling.all_chunks, tiling.chunk) for _, kv in given.values()]
    return Ids(tuple(given), jnp.tile(jnp.stack(q, 2), tiling.heads), jnp.stack(kv, 2))


def _cut(ids_bt, blocks: int, block: int):
    ids = jnp.pad(ids_bt.astype(jnp.int32), ((0, 0), (0, blocks * block - ids_bt.shape[1])), mode="edge")
    return ids.reshape(-1, blocks, block)


class Place(NamedTuple):
    """Which blocks a step of the grid works on."""

    b: Any
    head: Any
    """Among the blocks of heads of the queries."""
    kv_head: Any
    i: Any
    """Block of queries."""
    j: Any
    """Block of keys."""


class Specs:
    """Block specs of one kernel; `place(*grid, scalars_ref)` says what a step needs."""

    def __init__(self, scalars: Scalars, place: Callable[..., Place]):
        self.place, self.many_rows, self.chunks = place, scalars.rows > 1, scalars.tiling.chunks

    def q(self, shape) -> pl.BlockSpec:
        """Of an array by queries."""

        def index(*grid):
            p = self.place(*grid)
            return p.b, p.head, p.i, 0, 0

        return pl.BlockSpec((None, None, None, *shape[3:]), index)

    def kv(self, shape) -> pl.BlockSpec:
        """Of an array by keys."""

        def index(*grid):
            p = self.place(*grid)
            return p.b, p.kv_head, p.j, 0, 0

        return pl.BlockSpec((None, None, self.chunks, *shape[3:]), index)

    def ids(self, ids: Ids) -> list[pl.BlockSpec | None]:
        """Of the ids of queries and of keys."""
        if not ids.names:
            return [None, None]

        def of_q(*grid):
            p = self.place(*grid)
            return p.b if self.many_rows else 0, p.i, 0, 0

        def of_kv(*grid):
            p = self.place(*grid)
            return p.b if self.many_rows else 0, p.j, 0, 0

        return [
            pl.BlockSpec((None, None, *ids.q.shape[2:]), of_q),
            pl.BlockSpec((None, self.chunks, *ids.kv.shape[2:]), of_kv),
        ]
