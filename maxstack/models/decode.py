"""Decoding with a cache: tokens in, logits and a longer cache out. Slot = position; ragged rows carry their lengths."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.models.attention import Context
from maxstack.models.block import Cache
from maxstack.models.rope import RopeTables
from maxstack.models.transformer import Stack, Transformer, TransformerConfig, rope_tables


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
    positions = cache.lengths_b[:, None] + jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)
    lengths = cache.lengths_b + counts
    tables = rope_tables(model.config, positions, lengths[:, None])
    context = Context(positions, None)
    x = model.embedding(tokens_bt, jnp.dtype(model.config.dtype))
    layers = []
    for stack, caches in zip(model.stacks, cache.layers, strict=True):
        x, caches = decode_stack(stack, x, caches, tables, context)
        layers.append(caches)
    last = jnp.take_along_axis(x, (counts - 1)[:, None, None], axis=1)
    logits = model.logits(model.final_norm(last))[:, 0]
    return logits, DecodeCache(tuple(layers), lengths)


def decode_stack(
    stack: Stack, x: Float[Array, "b t d"], caches: tuple[Cache, ...], tables: RopeTables,
    context: Context,
) -> tuple[Float[Array, "b t d"], tuple[Cache, ...]]:  # fmt: skip
    """Scan over repeats. The caches are carried, since a scan would copy them whole as inputs and outputs."""

    def period(carry: tuple, indexed: tuple) -> tuple[tuple, None]:
        x, caches = carry
        index, blocks = indexed
        written = []
        for block, cache in zip(blocks, caches, strict=True):
            layer = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), cache
            )
            x, layer, _ = block(x, tables, context, layer)
            written.append(
                jax.tree.map(
                    lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0), cache, layer
                )
            )
        return (x, tuple(written)), None

    repeats = jax.tree.leaves(stack)[0].shape[0]
    (x, caches), _ = jax.lax.scan(period, (x, caches), (jnp.arange(repeats), stack.layers))
    return x, caches
