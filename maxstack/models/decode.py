"""Decoding with a cache: tokens in, logits and a longer cache out. Slot = position; ragged rows carry their lengths."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.models.attention import Context
from maxstack.models.block import BlockConfig, Cache
from maxstack.models.cached import slot_axes, write
from maxstack.models.rope import RopeTables
from maxstack.models.transformer import Stack, StackConfig, Transformer, TransformerConfig, rope_tables


class DecodeCache(NamedTuple):
    """The caches of all layers (by stack, by layer of the pattern, stacked over repeats) and each row's length."""

    layers: tuple[tuple[Cache, ...], ...]
    lengths_b: Int[Array, "b"]


def init_cache(config: TransformerConfig, batch: int, length: int) -> DecodeCache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute type."""

    def stacked(repeats: int, cache: Cache) -> Cache:
        return jax.tree.map(lambda leaf: jnp.zeros((repeats, *leaf.shape), leaf.dtype), cache)

    layers = tuple(
        tuple(
            stacked(stack.repeats, block.attention.init_cache(batch, length, jnp.dtype(config.dtype)))
            for block in stack.pattern
        )
        for stack in config.stacks
    )
    return DecodeCache(layers, jnp.zeros((batch,), jnp.int32))


def decode(
    model: Transformer,
    tokens_bt: Int[Array, "b t"],
    cache: DecodeCache,
    counts_b: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b v"], DecodeCache]:
    """Float32 logits after each row's last token, and the cache with the row's tokens in it.

    `counts_b` says how many of a row's tokens are real (all by default); the padding after them is written but never
    seen, and overwritten by the next call.
    """
    counts = jnp.full(tokens_bt.shape[:1], tokens_bt.shape[1], jnp.int32) if counts_b is None else counts_b
    x, cache = advance(model, tokens_bt, cache, counts)
    last = jnp.take_along_axis(x, (counts - 1)[:, None, None], axis=1)
    return model.logits(model.final_norm(last))[:, 0], cache


def advance(
    model: Transformer, tokens_bt: Int[Array, "b t"], cache: DecodeCache, counts_b: Int[Array, "b"],
    documents_b: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b t d"], DecodeCache]:  # fmt: skip
    """The residual stream after the last layer, and the longer cache; see `decode`.

    `documents_b` is the length that dynamic rotary scaling goes by: the row's new one by default, the whole prompt's
    when these tokens are a part of it.
    """
    lengths = cache.lengths_b + counts_b
    documents = lengths if documents_b is None else documents_b
    x, tables, context = enter(model, tokens_bt, cache.lengths_b, documents[:, None])
    layers = []
    for config, stack, caches in zip(model.config.stacks, model.stacks, cache.layers, strict=True):
        x, caches = decode_stack(config, stack, x, caches, tables, context)
        layers.append(caches)
    return x, DecodeCache(tuple(layers), lengths)


def enter(
    model: Transformer, tokens_bt: Int[Array, "b t"], lengths_b: Int[Array, "b"],
    documents_bt: Int[Array, "b #t"], native: bool = False,
) -> tuple[Float[Array, "b t d"], RopeTables, Context]:  # fmt: skip
    """What the layers read of tokens that follow `lengths_b` others, in documents of so many."""
    positions = lengths_b[:, None] + jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)
    tables = rope_tables(model.config, positions, documents_bt)
    return model.embed(tokens_bt, positions), tables, Context(positions, None, native=native)


def returns_rows(block: BlockConfig) -> bool:
    """Whether a layer returns the new tokens' rows of its cache, as ours do, or the cache with them in."""
    return getattr(block.attention, "returns_rows", False)


def decode_stack(
    config: StackConfig, stack: Stack, x: Float[Array, "b t d"], caches: tuple[Cache, ...], tables: RopeTables,
    context: Context,
) -> tuple[Float[Array, "b t d"], tuple[Cache, ...]]:  # fmt: skip
    """Scan over repeats. The caches are carried, since a scan would copy them whole as inputs and outputs."""

    def period(carry: tuple, indexed: tuple) -> tuple[tuple, None]:
        x, caches = carry
        index, blocks = indexed
        written = []
        for block_config, block, cache in zip(config.pattern, blocks, caches, strict=True):
            layer = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), cache
            )
            x, new, _ = block(x, tables, context, layer)
            written.append(put(block_config, cache, new, index, context))
        return (x, tuple(written)), None

    (x, caches), _ = jax.lax.scan(period, (x, caches), (jnp.arange(config.repeats), stack.layers))
    return x, caches


def put(config: BlockConfig, cache: Cache, new: Any, index: Array, context: Context) -> Cache:
    """The caches of all repeats with what one layer returned in its place."""
    if returns_rows(config):
        axes = slot_axes(config.attention.init_cache)
        at = context.positions_bt
        return jax.tree.map(lambda leaf, rows, axis: write(leaf, rows, at, axis, index), cache, new, axes)
    return jax.tree.map(
        lambda leaf, whole: jax.lax.dynamic_update_index_in_dim(leaf, whole, index, 0), cache, new
    )
