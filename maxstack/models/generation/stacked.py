"""The programs for accelerators: a scan over stacked layers; the state is donated and written in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from maxstack.models.cached import slot_axes
from maxstack.models.compiling import reading_weights
from maxstack.models.decode import DecodeCache, advance, init_cache
from maxstack.models.generation.params import RowSettings
from maxstack.models.generation.sampling import Chosen, choose
from maxstack.models.generation.state import Programs, State, after, padded
from maxstack.models.transformer import Transformer, TransformerConfig


@functools.lru_cache(maxsize=8)
def stacked_programs(config: TransformerConfig, treedef: Any) -> Programs:
    """The programs for models with this config and tree."""

    def model_of(leaves: list[Array]) -> Transformer:
        return jax.tree.unflatten(treedef, leaves)

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=reading_weights())
    def read(leaves, state: State, tokens_bt, counts_b, documents_b, first) -> State:
        cache = DecodeCache(state.caches, state.lengths_b)
        _, cache = advance(model_of(leaves), tokens_bt, cache, counts_b, documents_b)
        return state._replace(caches=cache.layers, lengths_b=cache.lengths_b)

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=reading_weights())
    def step(leaves, state: State, settings: RowSettings) -> tuple[Chosen, State]:
        model, ones = model_of(leaves), jnp.ones_like(state.lengths_b)
        x, cache = advance(model, state.next_b[:, None], DecodeCache(state.caches, state.lengths_b), ones)
        chosen = choose(model.logits(model.final_norm(x))[:, 0], settings, state.seen, cache.lengths_b)
        return chosen, after(state, cache.layers, chosen.tokens_b)

    @functools.partial(jax.jit, static_argnums=1)
    def grow(caches, slots: int):
        return tuple(
            tuple(
                padded(cache, slots, slot_axes(block.attention.init_cache), 1)
                for block, cache in zip(stack.pattern, of_stack, strict=True)
            )
            for stack, of_stack in zip(config.stacks, caches, strict=True)
        )

    return Programs(
        lambda rows, slots: init_cache(config, rows, slots).layers,
        grow,
        read,
        step,
        {"read": read, "step": step},
    )
