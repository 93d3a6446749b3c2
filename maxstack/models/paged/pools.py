"""The pools of a model: for each layer of a pattern one, with the pages of all its repeats one after another.

Page `p` of repeat `i` is page `i * pages + p` of the pool. So a layer takes its pages by shifting the table, and
nothing has to be cut out of a stack of pools, which would copy a layer's pages at every step.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from maxstack.config import UserError
from maxstack.kernels import cpu_native
from maxstack.kernels.paged_attention import KVCache, LatentCache, PageType
from maxstack.models.transformer import TransformerConfig

Pool = KVCache | LatentCache
Pools = tuple[tuple[Pool, ...], ...]
"""By stack, by layer of its pattern."""


def init_pools(config: TransformerConfig, pages: int, page: int, dtype: PageType) -> Pools:
    """Empty pages for every layer. Raises UserError for layers that keep no keys and values in pages."""
    return tuple(
        tuple(init_pages_of(block.attention)(stack.repeats * pages, page, dtype) for block in stack.pattern)
        for stack in config.stacks
    )


def untouched_pools(config: TransformerConfig, pages: int, page: int, dtype: PageType) -> Pools:
    """As `init_pools`, on a CPU with C++, with anything in the pages: nobody reads a place that was not written. A
    start does not fill gigabytes with zeros, and the pages that are never used take no memory."""
    shapes, treedef = jax.tree.flatten(jax.eval_shape(lambda: init_pools(config, pages, page, dtype)))
    return jax.tree.unflatten(treedef, cpu_native.untouched(shapes))


def init_pages_of(attention: Any) -> Any:
    """How an attention's config makes its pool."""
    if (make := getattr(attention, "init_pages", None)) is None:
        raise UserError(
            f"{type(attention).__name__} has no init_pages: its layers cannot be served from pages; use the "
            "Generator (maxstack generate), or give the config that method (docs/extend.md)"
        )
    return make


def page_bytes(config: TransformerConfig, page: int, dtype: PageType) -> int:
    """Bytes of one page in all layers together."""
    pools = jax.eval_shape(lambda: init_pools(config, 1, page, dtype))
    return sum(
        leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize) // 8
        for leaf in jax.tree.leaves(pools)
    )


def of_repeat(
    table_bp: Int[Array, "b p"], repeat: Int[Array, ""] | int, repeats: int, pool: Pool
) -> Int[Array, "b p"]:
    """The table of one repeat of a layer: its pages in the pool, -1 for what is no page."""
    pages = jax.tree.leaves(pool)[0].shape[0] // repeats
    inside = (table_bp >= 0) & (table_bp < pages)
    return jnp.where(inside, table_bp + repeat * pages, -1)
