"""Which tiles of rows belong to which groups: numbers made on the device from the sizes of the groups.

Where rows can be fetched by the tile only (TPU), they are cut into tiles of equal size, whatever the groups; a tile in
which a group ends and the next one begins is visited once for each of them. Where they can be fetched from any row on
(Hopper), each group has tiles of its own, of which the last is a shorter one. How many visits there are is data; how
many there can be is static: a tile is visited once, and once more for each border.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visits(NamedTuple):
    """Visits in the order of rows, then `count` and beyond with no rows."""

    group_v: Int[Array, "v"]
    """Of rows of no group: the last group that has any, whose matrix is there already."""
    tile_v: Int[Array, "v"]
    first_v: Int[Array, "v"]
    """First row of the group within the tile."""
    end_v: Int[Array, "v"]
    """Row of the tile behind the group's last one."""
    real_v: Bool[Array, "v"]
    """Whether the rows belong to a group."""
    opens_v: Bool[Array, "v"]
    """Whether it is the first of its group."""
    closes_v: Bool[Array, "v"]
    """Whether it is the last of its group."""
    count: Int[Array, ""]


def of_rows(group_sizes_e: Int[Array, "e"], rows: int, tile: int) -> Visits:
    """Every row of every tile once, rows of no group too; no visit to groups without rows."""
    end_e = jnp.minimum(jnp.cumsum(group_sizes_e.astype(jnp.int32)), rows)
    tiles = -(-rows // tile)
    return _visits(jnp.append(end_e, rows), tiles, tile, groups=len(end_e), least=0)


def of_groups(group_sizes_e: Int[Array, "e"], rows: int, tile: int) -> Visits:
    """Every group, once where it has no rows; no visit to rows of no group."""
    end_e = jnp.minimum(jnp.cumsum(group_sizes_e.astype(jnp.int32)), rows)
    return _visits(end_e, -(-rows // tile), tile, groups=len(end_e), least=1)


class Spans(NamedTuple):
    """Tiles that begin where groups do, or a few rows before, then some without rows."""

    group_v: Int[Array, "v"]
    start_v: Int[Array, "v"]
    """First row of the tile, a multiple of EIGHT."""
    first_v: Int[Array, "v"]
    """First row of the group within the tile."""
    end_v: Int[Array, "v"]
    """Row of the tile behind the group's last one."""
    real_v: Bool[Array, "v"]
    """Whether the rows belong to a group."""


EIGHT = 8
"""Rows of a tile in shared memory as TMA fills it: from such a row on it can begin."""


def own_tiles(group_sizes_e: Int[Array, "e"], rows: int, tile: int) -> Spans:
    """Every row once, rows of no group too."""
    end_g = jnp.append(jnp.minimum(jnp.cumsum(group_sizes_e.astype(jnp.int32)), rows), rows)
    start_g = jnp.concatenate([jnp.zeros_like(end_g[:1]), end_g[:-1]])
    first_g = start_g // EIGHT * EIGHT
    many_g = jnp.where(end_g > start_g, (end_g - first_g + tile - 1) // tile, 0)
    behind_g = jnp.cumsum(many_g)
    # Each group with rows begins up to seven rows late, and has fewer than `tile` rows in its last tile.
    v = jnp.arange((rows + min(len(end_g), rows) * (EIGHT - 1 + tile - 1)) // tile)
    g = jnp.minimum(jnp.sum(v[:, None] >= behind_g[None], 1), len(end_g) - 1)
    start_v = jnp.where(v < behind_g[-1], first_g[g] + (v - (behind_g - many_g)[g]) * tile, 0)
    inside = [jnp.where(v < behind_g[-1], jnp.clip(at[g] - start_v, 0, tile), 0) for at in (start_g, end_g)]
    group_v = jnp.minimum(g, len(end_g) - 2)
    return Spans(*(a.astype(jnp.int32) for a in (group_v, start_v, *inside)), real_v=g < len(end_g) - 1)


def _visits(end_g: jax.Array, tiles: int, tile: int, *, groups: int, least: int) -> Visits:
    """`end_g` of the groups, and of what is treated as one more."""
    start_g = jnp.concatenate([jnp.zeros_like(end_g[:1]), end_g[:-1]])
    tile_g = jnp.minimum(start_g // tile, tiles - 1)
    many_g = jnp.where(end_g > start_g, (end_g - 1) // tile - tile_g + 1, least)
    behind_g = jnp.cumsum(many_g)
    v = jnp.arange(tiles + len(end_g) - 1)
    g = jnp.minimum(jnp.sum(v[:, None] >= behind_g[None], 1), len(end_g) - 1)
    nth = v - (behind_g - many_g)[g]
    count = behind_g[-1]
    tile_v = jnp.where(v < count, tile_g[g] + nth, tiles - 1)
    inside = [jnp.where(v < count, jnp.clip(at[g] - tile_v * tile, 0, tile), 0) for at in (start_g, end_g)]
    last = jnp.max(jnp.where(many_g[:groups] > 0, jnp.arange(groups), 0))
    return Visits(
        group_v=jnp.minimum(g, last).astype(jnp.int32),
        tile_v=tile_v.astype(jnp.int32),
        first_v=inside[0].astype(jnp.int32),
        end_v=inside[1].astype(jnp.int32),
        real_v=(g < groups) & (v < count),
        opens_v=(nth == 0) & (v < count),
        closes_v=nth == many_g[g] - 1,
        count=count,
    )
