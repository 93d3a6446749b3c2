"""Weights as decoding reads them: in the compute type, and on a CPU unstacked and laid out by output."""

import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native
from maxstack.kernels.dispatch import chip
from maxstack.models.attention import AttentionConfig
from maxstack.models.compiling import TILES, format_for
from maxstack.models.feed_forward import FeedForwardConfig
from maxstack.models.generation.matrix import ByOutput, Panels, matrix, native, shortened
from maxstack.models.generation.panel_stack import PanelStack
from maxstack.models.layers import Embedding, Linear, RMSNorm, Weight, soft_cap
from maxstack.models.moe import MoE
from maxstack.models.packed import Packed, PackedLinear, PackedMatrix, PackedPanels
from maxstack.models.transformer import Transformer
from maxstack.models.tree import named_variables

log = logging.getLogger(__name__)

Replacements = Mapping[type, Callable[[Any], Any]]


class Unstacked(NamedTuple):
    """A model with its layers one by one: a scan over stacked layers copies each layer's weights on a CPU."""

    blocks: tuple[Any, ...]
    outer: Transformer
    """The model without its stacks and output projection."""
    head: Panels | ByOutput | PackedPanels | PackedMatrix
    """The output projection [d, v]."""

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """As `Transformer.logits`, of few tokens."""
        config, x_td, wide = self.outer.config, x.reshape(-1, x.shape[-1]), jnp.dtype(jnp.float32)
        y = self.head(x_td, wide).reshape(*x.shape[:2], -1)
        return soft_cap(y if config.logit_scale == 1.0 else y * config.logit_scale, config.logit_softcap)


class Looped(NamedTuple):
    """A model with its layers in stacks for a loop that cuts none of their matrices out."""

    model: Transformer
    """Without its output projection."""
    head: Panels | PackedMatrix | PackedPanels

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """As `Transformer.logits`, of few tokens."""
        return Unstacked((), self.model, self.head).logits(x)


class RowsLinear(nnx.Module):
    """A Linear for products with rows of tokens; with `threads`, those of all layers of a stack."""

    def __init__(self, linear: Linear | PackedLinear, dtype: jnp.dtype, threads: Executor | None = None):
        if isinstance(linear, PackedLinear):
            self.inputs, self.outputs = linear.inputs, linear.outputs
            self.w: Any = PackedPanels(linear.w.weight)
        else:
            w, contract = np.asarray(linear.w[...]), linear.contract
            own = w.shape[w.ndim - len(linear.axes) :]
            self.inputs, self.outputs = own[:contract], own[contract:]
            w_io = w.reshape(*w.shape[: w.ndim - len(own)], math.prod(self.inputs), -1)
            if threads is None:
                self.w = matrix(w_io.T, dtype)
            else:
                self.w = PanelStack(w_io.swapaxes(1, 2), threads)
        self.b = linear.b

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = self.w(x.reshape(-1, math.prod(self.inputs)))
        y = y.reshape(*x.shape[:2], *self.outputs)
        return y if self.b is None else (y + self.b[...]).astype(y.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """As `Linear.matrix`."""
        return self.w.matrix(dtype).reshape(*self.inputs, *self.outputs)


class RowsNorm(nnx.Module):
    """A root-mean-square norm whose result for a token does not depend on how many there are: XLA sums one row and
    many in different orders."""

    def __init__(self, norm: RMSNorm):
        self.scale, self.eps, self.offset = norm.scale, norm.eps, norm.offset

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        y = cpu_native.rms_norm(rows, self.scale[...].astype(jnp.float32), eps=self.eps, offset=self.offset)
        return y.reshape(x.shape).astype(x.dtype)


def for_rows(dtype: jnp.dtype) -> Replacements:
    """What modules become on a CPU."""

    def rows(linear: Linear | PackedLinear) -> RowsLinear:
        return RowsLinear(linear, dtype)

    if not native():
        return {Linear: rows}
    experts: Replacements = {PackedMatrix: lambda matrix: PackedPanels(matrix.weight)}
    return {Linear: rows, RMSNorm: RowsNorm, PackedLinear: rows, **experts}


# The weights of products that modules of these types hold themselves.
PRODUCTS: dict[type, tuple[str, ...]] = {
    Linear: ("w",), Embedding: ("table",), MoE: ("gate", "up", "down"), Transformer: ("head",),
}  # fmt: skip


def cast_products(module: Any, dtype: jnp.dtype, replace: Replacements | None = None) -> Any:
    """A copy of a module with the weights of its products in the compute type, as a product would cast them.

    `replace` says what takes the place of modules of a type instead.
    """
    if replace is not None and type(module) in replace:
        return replace[type(module)](module)
    if not isinstance(module, nnx.Module):
        return module
    copy = with_parts(module, lambda part: cast_products(part, dtype, replace))
    for name in PRODUCTS.get(type(module), ()):
        old = getattr(copy, name)
        if isinstance(old, nnx.Variable):
            setattr(copy, name, Weight(old[...].astype(dtype), axes=old.get_metadata()["axes"]))
    return copy


def for_accelerator(model: Transformer, use_up: bool = False) -> Transformer:
    """The model with its products' weights in the compute type, and as the chip multiplies with them."""
    return laid_out(cast_products(model, jnp.dtype(model.config.dtype)), use_up)


def laid_out(module: Any, use_up: bool = False) -> Any:
    """A module of arrays or of their shapes with its matrices in the tiles that the chip multiplies with. With `use_up`
    they take the place of what is given."""
    if chip().name not in TILES or not isinstance(module, nnx.Module):
        return module
    copy: Any = with_parts(module, lambda part: laid_out(part, use_up))
    if type(module) is Linear:
        w = module.w.get_value()
        if (wanted := format_for(w, w.sharding)) is not None:
            copy.w = Weight(moved(w, wanted, use_up), axes=module.w.get_metadata()["axes"])
    return copy


def moved(w: Any, wanted: Any, use_up: bool) -> Any:
    """An array, or the shape of one, in another format; as it is where the device does not take it."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=wanted)
    try:
        return jax.device_put(w, wanted, donate=use_up)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        log.warning("weights stay in the tiles that arrays have, and are copied in each step: %s", error)
        return w


def unstack(model: Transformer) -> Unstacked:
    """The model's layers one by one, their products' weights laid out by output."""
    dtype = jnp.dtype(model.config.dtype)
    replace = for_rows(dtype)

    def one(which: tuple[Any, int]) -> Any:
        layer, repeat = which
        # By way of numpy, which takes a layer from a stack without compiling anything, and lays it out in any thread.
        own = jax.tree.map(lambda leaf: np.asarray(leaf)[repeat], layer)
        return placed(cast_products(own, dtype, replace), dtype)

    layers = [
        (layer, repeat)
        for config, stack in zip(model.config.stacks, model.stacks, strict=True)
        for repeat in range(config.repeats)
        for layer in cast(Any, stack).layers
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = list(pool.map(one, layers))
    return Unstacked(tuple(blocks), *without_stacks(model, replace))


def can_loop(model: Transformer) -> bool:
    """Whether the layers hold no matrices but those that `looped` lays out, and C++ reads them."""
    plain = (AttentionConfig, FeedForwardConfig)
    blocks = [block for stack in model.config.stacks for block in stack.pattern]
    return (
        native()
        and model.config.dtype == "float32"
        and all(type(part) in plain for block in blocks for part in (block.attention, block.feed_forward))
        and not any(isinstance(v, Packed) for v in named_variables(model.stacks).values())
    )


def looped(model: Transformer, use_up: bool = False) -> Looped:
    """The model with its layers in stacks, their products' weights laid out by output: a program is no longer for more
    layers, nor longer in coming. With `use_up` the model's own are deleted one after the other, so that there never
    are two of all."""
    dtype = jnp.dtype(model.config.dtype)
    outer, head = without_stacks(model, for_rows(dtype))
    with ThreadPoolExecutor(os.cpu_count()) as threads:

        def laid_out(linear: Linear) -> RowsLinear:
            rows = RowsLinear(linear, dtype, threads)
            if use_up:
                linear.w[...].delete()
            return rows

        replace = {**for_rows(dtype), Linear: laid_out}
        outer.stacks = nnx.List([with_parts(cast(Any, stack), lambda part: part) for stack in model.stacks])
        for stack in outer.stacks:
            layers = cast(Any, stack).layers
            stack.layers = nnx.List([placed(cast_products(layer, dtype, replace), dtype) for layer in layers])
    return Looped(outer, cast(Any, head))


def without_stacks(model: Transformer, replace: Replacements) -> tuple[Transformer, Any]:
    """What is around the layers, and the output projection."""
    dtype = jnp.dtype(model.config.dtype)
    outer = with_parts(model, lambda part: part)
    head, outer.stacks, outer.head = outer.head, nnx.List([]), None
    outer = jax.tree.map(np.asarray, outer)
    replace = {**replace, Embedding: lambda embedding: with_short_table(embedding, dtype)}
    outer = placed(cast_products(outer, dtype, replace), dtype)
    if isinstance(head, PackedMatrix):
        return outer, PackedPanels(head.weight) if native() else head
    table = np.asarray(model.embedding.table[...]) if head is None else np.asarray(head[...]).T
    return outer, matrix(table, dtype)


def with_short_table(embedding: Embedding, dtype: jnp.dtype) -> Embedding:
    """The token table in the compute type, or in bfloat16 where that changes none of its numbers: rows are cast."""
    copy = with_parts(embedding, lambda part: part)
    table = np.asarray(embedding.table[...])
    table = shortened(table) if dtype == jnp.float32 else table.astype(dtype)
    copy.table = Weight(table, axes=embedding.table.get_metadata()["axes"])
    return copy


LAID_OUT = (Panels, PanelStack, PackedPanels, Embedding, Packed)
"""What has its own types by now."""


def placed(module: Any, dtype: jnp.dtype) -> Any:
    """A module of arrays on the device; scales and offsets of bfloat16 in the compute type."""

    def place(part: Any) -> Any:
        if isinstance(part, LAID_OUT):
            return jax.device_put(part)
        part = np.asarray(part)
        return jax.device_put(part.astype(dtype) if part.dtype == jnp.bfloat16 else part)

    return jax.tree.map(place, module, is_leaf=lambda part: isinstance(part, LAID_OUT))


def with_parts[M](module: M, change: Callable[[Any], Any]) -> M:
    """A copy of a module with `change` applied to each module that it holds, lists of them included."""
    leaves, treedef = jax.tree.flatten(module)
    copy = jax.tree.unflatten(treedef, leaves)
    for name, part in list(vars(copy).items()):
        if isinstance(part, nnx.List):
            setattr(copy, name, nnx.List([change(each) for each in part]))
        elif isinstance(part, nnx.Module):
            setattr(copy, name, change(part))
    return copy
