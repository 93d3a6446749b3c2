"""How a model runs here, chosen once: layers as a scan or written out, pools written in place or by another program."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from maxstack.kernels import cpu_native
from maxstack.models.generation.weights import cast_products, unstack
from maxstack.models.paged import forward
from maxstack.models.remat import platform
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve.programs import Form


def form_for(model: Transformer, on: str | None = None) -> tuple[Form, list[Array]]:
    """The form for a platform ("cpu", "cuda", "tpu"; by default the one at hand), and the weights as it takes them.

    On a CPU those are a copy, laid out anew: let go of the model if memory is short.
    """
    if (on or platform()) == "cpu":
        leaves, treedef = jax.tree.flatten(unstack(model))
        return written_out(model.config, treedef, in_place=writes_in_place(model.config)), leaves
    leaves, treedef = jax.tree.flatten(cast_products(model, jnp.dtype(model.config.dtype)))
    return scanned(treedef), leaves


def scanned(treedef: Any) -> Form:
    """For accelerators: a scan over stacked layers, the pools carried and written in place."""

    def advance(leaves, pools, chunk):
        return forward.advance(jax.tree.unflatten(treedef, leaves), pools, chunk)

    def logits(leaves, x):
        model = jax.tree.unflatten(treedef, leaves)
        return model.logits(model.final_norm(x))

    def hidden(leaves, x):
        return jax.tree.unflatten(treedef, leaves).final_norm(x)

    return Form(advance, logits, hidden, None)


def written_out(config: TransformerConfig, treedef: Any, *, in_place: bool) -> Form:
    """For CPUs."""

    def advance(leaves, pools, chunk):
        return forward.read(config, jax.tree.unflatten(treedef, leaves), pools, chunk, writes=in_place)

    def logits(leaves, x):
        model = jax.tree.unflatten(treedef, leaves)
        return model.logits(model.outer.final_norm(x))

    def hidden(leaves, x):
        return jax.tree.unflatten(treedef, leaves).outer.final_norm(x)

    return Form(advance, logits, hidden, None if in_place else forward.keep)


def writes_in_place(config: TransformerConfig) -> bool:
    """Whether what is written out may write the pools: XLA:CPU copies them, C++ does not."""
    return hasattr(cpu_native, "write_rows") and cpu_native.available()
