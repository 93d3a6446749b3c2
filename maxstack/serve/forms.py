"""How a model runs here, chosen once: layers as a scan or written out, pools written in place or by another program."""

from typing import Any

import jax

from maxstack import sharding
from maxstack.kernels import cpu_native
from maxstack.models.adapters import AdapterSlots
from maxstack.models.generation.weights import Looped, Unstacked, can_loop, for_accelerator, looped, unstack
from maxstack.models.paged import forward
from maxstack.models.remat import platform
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve import rooms
from maxstack.serve.programs import Form, Weights


def form_for(
    model: Transformer, on: str | None = None, slots: AdapterSlots | None = None, use_up: bool = False
) -> tuple[Form, Weights]:
    """The form for a platform ("cpu", "cuda", "tpu"; by default the one at hand), and the weights as it takes them.

    On a CPU those are a copy, laid out anew: with `use_up` the model's own are deleted meanwhile, as far as can be.
    With `slots` there is room for adapters beside them. A model that lies on a mesh stays there.
    """
    mesh = sharding.mesh_of(model)
    if (on or platform()) == "cpu" and mesh is None:
        if writes_in_place(model.config) and can_loop(model):
            laid_out = looped(model, use_up)
            leaves, treedef = jax.tree.flatten(laid_out)
            form = in_a_loop(treedef, slots is not None)
            return form, leaves if slots is None else (leaves, rooms.beside_stacks(laid_out.model, slots))
        unstacked = unstack(model)
        leaves, treedef = jax.tree.flatten(unstacked)
        form = written_out(model.config, treedef, slots is not None, in_place=writes_in_place(model.config))
        return form, leaves if slots is None else (leaves, rooms.beside_layers(unstacked, slots))
    with sharding.on_mesh(mesh):
        leaves, treedef = jax.tree.flatten(for_accelerator(model, use_up))
    form = scanned(treedef, slots is not None)
    return form, leaves if slots is None else (leaves, rooms.beside_stacks(model, slots))


def scanned(treedef: Any, adapted: bool = False) -> Form:
    """For accelerators: a scan over stacked layers, the pools carried and written in place."""

    def model_of(weights: Weights) -> Transformer:
        return jax.tree.unflatten(treedef, weights[0] if adapted else weights)

    def advance(weights, pools, chunk):
        model = model_of(weights)
        if adapted:
            model = rooms.into_stacks(model, weights[1], chunk.adapters_b)
        return forward.advance(model, pools, chunk)

    def logits(weights, x):
        model = model_of(weights)
        return sharding.whole(model.logits(model.final_norm(x)))

    def hidden(weights, x):
        return model_of(weights).final_norm(x)

    return Form(advance, logits, hidden, None)


def in_a_loop(treedef: Any, adapted: bool = False) -> Form:
    """For CPUs with C++, where all the layers' matrices are read where they lie: as `scanned`."""

    def model_of(weights: Weights) -> Looped:
        return jax.tree.unflatten(treedef, weights[0] if adapted else weights)

    def advance(weights, pools, chunk):
        model = model_of(weights).model
        if adapted:
            model = rooms.into_stacks(model, weights[1], chunk.adapters_b)
        return forward.advance(model, pools, chunk)

    def logits(weights, x):
        looped = model_of(weights)
        return looped.logits(looped.model.final_norm(x))

    def hidden(weights, x):
        return model_of(weights).model.final_norm(x)

    return Form(advance, logits, hidden, None, by_row=True)


def written_out(config: TransformerConfig, treedef: Any, adapted: bool = False, *, in_place: bool) -> Form:
    """For CPUs."""

    def model_of(weights: Weights) -> Unstacked:
        return jax.tree.unflatten(treedef, weights[0] if adapted else weights)

    def advance(weights, pools, chunk):
        model = model_of(weights)
        if adapted:
            model = rooms.into_layers(model, weights[1], chunk.adapters_b)
        return forward.read(config, model, pools, chunk, writes=in_place)

    def logits(weights, x):
        model = model_of(weights)
        return model.logits(model.outer.final_norm(x))

    def hidden(weights, x):
        return model_of(weights).outer.final_norm(x)

    keep = None if in_place else forward.keep
    return Form(advance, logits, hidden, keep, stacked=False, by_row=in_place)


def writes_in_place(config: TransformerConfig) -> bool:
    """Whether what is written out may write the pools: XLA:CPU copies them, C++ does not."""
    return hasattr(cpu_native, "write_rows") and cpu_native.available()
