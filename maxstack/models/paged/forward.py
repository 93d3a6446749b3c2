"""The layers over a chunk of new tokens and a cache in pages: as a scan over stacked weights, or written out.

The scan carries the pools and writes them in place. On a CPU a scan would copy each layer's weights, so there the
layers are written out; and where only XLA could write the pools, and would copy them, `read` leaves them alone and
`keep`, another program, writes what the layers left.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.paged_attention import KVCache, append_kv, append_latent
from maxstack.models.attention import Context
from maxstack.models.decode import enter
from maxstack.models.generation.panel_stack import held_back
from maxstack.models.generation.weights import Unstacked
from maxstack.models.paged.layer import Paged
from maxstack.models.paged.pools import Pools, of_repeat
from maxstack.models.rope import RopeTables
from maxstack.models.transformer import Stack, StackConfig, Transformer, TransformerConfig

Rows = tuple[tuple[tuple[Any, ...], ...], ...]
"""What layers leave to be written: by stack, by repeat, by layer of the pattern."""


class Chunk(NamedTuple):
    """New tokens of some sequences, and where those stand."""

    tokens_bt: Int[Array, "b t"]
    table_bp: Int[Array, "b p"]
    """Pages of each sequence, -1 for none."""
    lengths_b: Int[Array, "b"]
    """Tokens that are in the cache."""
    counts_b: Int[Array, "b"]
    """New tokens that are real."""
    documents_b: Int[Array, "b"]
    """Length of each sequence's prompt: the least that rotary scaling by length goes by."""
    adapters_b: Int[Array, "b"] | None = None
    """Each sequence's adapter, from 1; 0 is none. None where the server has no room for any."""


def enter_chunk(
    model: Transformer, chunk: Chunk
) -> tuple[Float[Array, "b t d"], RopeTables, Context]:  # fmt: skip
    """What the layers read. A token counts as part of its prompt, or, behind it, of all up to itself: so it has one
    rotation, whatever chunk it comes in, and also when it is read again."""
    steps = jnp.arange(1, chunk.tokens_bt.shape[1] + 1, dtype=jnp.int32)
    documents_bt = jnp.maximum(chunk.documents_b[:, None], chunk.lengths_b[:, None] + steps)
    return enter(model, chunk.tokens_bt, chunk.lengths_b, documents_bt)


def advance(model: Transformer, pools: Pools, chunk: Chunk) -> tuple[Float[Array, "b t d"], Pools]:
    """The residual stream after the last layer, and the pools with the chunk in them: written in place if donated."""
    x, tables, context = enter_chunk(model, chunk)
    written = []
    for config, stack, of_stack in zip(model.config.stacks, model.stacks, pools, strict=True):
        x, of_stack = advance_stack(config, stack, x, of_stack, chunk, tables, context)
        written.append(of_stack)
    return x, tuple(written)


def advance_stack(
    config: StackConfig, stack: Stack, x: Float[Array, "b t d"], pools: tuple, chunk: Chunk, tables: RopeTables,
    context: Context,
) -> tuple[Float[Array, "b t d"], tuple]:  # fmt: skip
    """`advance` through one stack."""

    arrays, layers_of = held_back(stack.layers)

    def period(carry: tuple, indexed: tuple) -> tuple[tuple, None]:
        x, pools = carry
        repeat, cut = indexed
        written = []
        for block, pool in zip(layers_of(cut, repeat), pools, strict=True):
            x, pool, _ = block(x, tables, context, paged(chunk, pool, repeat, config.repeats, writes=True))
            written.append(pool)
        return (x, tuple(written)), None

    (x, pools), _ = jax.lax.scan(period, (x, pools), (jnp.arange(config.repeats, dtype=jnp.int32), arrays))
    return x, pools


def paged(chunk: Chunk, pool: Any, repeat: Array | int, repeats: int, *, writes: bool) -> Paged:
    """What one layer gets as its cache."""
    table_bp = of_repeat(chunk.table_bp, repeat, repeats, pool)
    return Paged(pool, table_bp, chunk.lengths_b, chunk.counts_b, writes)


def read(
    config: TransformerConfig, model: Unstacked, pools: Pools, chunk: Chunk, *, writes: bool
) -> tuple[Float[Array, "b t d"], Pools | Rows]:
    """The residual stream after the last layer, and the pools with the chunk in them, or the rows for `keep`."""
    x, tables, context = enter_chunk(model.outer, chunk)
    names = tuple(tables)

    # Traced once for all layers of a kind; XLA puts it in line again.
    @jax.jit
    def layer(block, x, angles, positions_bt, cache):
        own = context._replace(positions_bt=positions_bt)
        x, new, _ = block(x, dict(zip(names, angles, strict=True)), own, cache)
        return x, new

    blocks, found = iter(model.blocks), []
    for stack, of_stack in zip(config.stacks, pools, strict=True):
        pools_now, rows = list(of_stack), []
        for repeat in range(stack.repeats):
            news = []
            for pool in pools_now:
                cache = paged(chunk, pool, repeat, stack.repeats, writes=writes)
                x, new = layer(next(blocks), x, tuple(tables.values()), context.positions_bt, cache)
                news.append(new)
            pools_now = news if writes else pools_now
            rows.append(tuple(news))
        found.append(tuple(pools_now if writes else rows))
    return x, tuple(found)


def keep(pools: Pools, rows: Rows, chunk: Chunk) -> Pools:
    """The pools with what `read` left; donate them."""
    return tuple(
        tuple(
            keep_layer(pool, [of_repeat[j] for of_repeat in of_repeats], chunk)
            for j, pool in enumerate(of_stack)
        )
        for of_stack, of_repeats in zip(pools, rows, strict=True)
    )


def keep_layer(pool: Any, rows: list[Any], chunk: Chunk) -> Any:
    """All repeats of a layer written at once, as if each were more sequences."""
    repeats = len(rows)
    table_lbp = jnp.stack([of_repeat(chunk.table_bp, repeat, repeats, pool) for repeat in range(repeats)])
    table_bp = table_lbp.reshape(-1, table_lbp.shape[-1])
    lengths_b, counts_b = (jnp.tile(x, repeats) for x in (chunk.lengths_b, chunk.counts_b))
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    if isinstance(pool, KVCache):
        k, v = joined
        return append_kv(pool, k, v, table_bp, lengths_b, counts_b)
    return append_latent(pool, joined, table_bp, lengths_b, counts_b)
