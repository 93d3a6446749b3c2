"""The programs for CPUs: layers written out, the cache read by one program and written by another.

XLA:CPU copies a cache that one program reads and writes, and the weights of a layer that a scan takes from a stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from maxstack.models.block import BlockConfig
from maxstack.models.cached import slot_axes, write
from maxstack.models.decode import enter, returns_rows
from maxstack.models.generation.matrix import native
from maxstack.models.generation.params import RowSettings
from maxstack.models.generation.sampling import Chosen, choose
from maxstack.models.generation.state import Programs, State, after, padded
from maxstack.models.generation.weights import Unstacked
from maxstack.models.transformer import TransformerConfig

# Up to this many rows their writes are listed one by one; more are a scatter, which XLA:CPU runs as a loop.
FEW_ROWS = 16


@functools.lru_cache(maxsize=8)
def unstacked_programs(config: TransformerConfig, treedef: Any) -> Programs:
    """The programs for models with this config and tree."""
    kinds = [block for stack in config.stacks for _ in range(stack.repeats) for block in stack.pattern]
    dtype, all_return_rows = jnp.dtype(config.dtype), all(returns_rows(kind) for kind in kinds)

    def model_of(leaves: list[Array]) -> Unstacked:
        return jax.tree.unflatten(treedef, leaves)

    @jax.jit
    def look(leaves, caches, tokens_bt, lengths_b, documents_b):
        return run(model_of(leaves), tokens_bt, caches, lengths_b, documents_b)[1]

    @functools.partial(jax.jit, donate_argnums=0)
    def keep(state: State, news, counts_b) -> State:
        caches = written(kinds, state.caches, news, state.lengths_b)
        return state._replace(caches=caches, lengths_b=state.lengths_b + counts_b)

    def read(leaves, state: State, tokens_bt, counts_b, documents_b, first) -> State:
        # The first chunk has nothing to look back at.
        caches = empty(tokens_bt.shape[0], 0) if first and all_return_rows else state.caches
        return keep(state, look(leaves, caches, tokens_bt, state.lengths_b, documents_b), counts_b)

    @jax.jit
    def pick(leaves, state: State, settings: RowSettings) -> tuple[Chosen, Any]:
        model, lengths = model_of(leaves), state.lengths_b + 1
        x, news = run(model, state.next_b[:, None], state.caches, state.lengths_b, lengths)
        return choose(model.logits(model.outer.final_norm(x))[:, 0], settings, state.seen, lengths), news

    @functools.partial(jax.jit, donate_argnums=0)
    def accept(state: State, news, chosen_b) -> State:
        return after(state, written(kinds, state.caches, news, state.lengths_b), chosen_b)

    def step(leaves, state: State, settings: RowSettings) -> tuple[Chosen, State]:
        chosen, news = pick(leaves, state, settings)
        return chosen, accept(state, news, chosen.tokens_b)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def empty(rows: int, slots: int):
        return tuple(kind.attention.init_cache(rows, slots, dtype) for kind in kinds)

    @functools.partial(jax.jit, static_argnums=1)
    def grow(caches, slots: int):
        pairs = zip(kinds, caches, strict=True)
        return tuple(padded(cache, slots, slot_axes(kind.attention.init_cache)) for kind, cache in pairs)

    compiled = {"look": look, "keep": keep, "pick": pick, "accept": accept}
    return Programs(empty, grow, read, step, compiled)


def run(
    model: Unstacked, tokens_bt: Int[Array, "b t"], caches: Any, lengths_b: Int[Array, "b"],
    documents_b: Int[Array, "b"],
) -> tuple[Array, Any]:  # fmt: skip
    """The residual stream after the last layer, and what each layer returns for its cache."""
    x, tables, context = enter(model.outer, tokens_bt, lengths_b, documents_b[:, None], native())
    names = tuple(tables)

    # Traced once for all layers of a kind; XLA puts it in line again.
    @jax.jit
    def layer(block, x, angles, positions_bt, cache):
        own = context._replace(positions_bt=positions_bt)
        x, new, _ = block(x, dict(zip(names, angles, strict=True)), own, cache)
        return x, new

    news = []
    for block, cache in zip(model.blocks, caches, strict=True):
        x, new = layer(block, x, tuple(tables.values()), context.positions_bt, cache)
        news.append(new)
    return x, tuple(news)


def written(kinds: list[BlockConfig], caches: Any, news: Any, lengths_b: Int[Array, "b"]) -> Any:
    """Every layer's cache with what the layer returned."""
    return tuple(put(*each, lengths_b) for each in zip(kinds, caches, news, strict=True))


def put(kind: BlockConfig, cache: Any, new: Any, lengths_b: Int[Array, "b"]) -> Any:
    """A layer's cache with the new rows in it, in place where it is donated; or the layer's own whole new one."""
    if not returns_rows(kind):
        return new
    axes = slot_axes(kind.attention.init_cache)
    return jax.tree.map(lambda leaf, rows, axis: put_rows(leaf, rows, lengths_b, axis), cache, new, axes)


def put_rows(leaf: Array, rows: Array, lengths_b: Int[Array, "b"], axis: int) -> Array:
    """Each row's new slots behind its length. There must be room: what would not fit lands on older ones."""
    if leaf.shape[0] > FEW_ROWS:
        return write(leaf, rows, lengths_b[:, None] + jnp.arange(rows.shape[axis]), axis)
    for row in range(leaf.shape[0]):
        start = [row if i == 0 else lengths_b[row] if i == axis else 0 for i in range(leaf.ndim)]
        leaf = jax.lax.dynamic_update_slice(leaf, rows[row : row + 1].astype(leaf.dtype), start)
    return leaf
