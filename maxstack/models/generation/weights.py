"""Weights as decoding reads them: in the compute type, and on a CPU unstacked and laid out by output."""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native
from maxstack.models.generation.matrix import ByOutput, Panels, matrix, native
from maxstack.models.layers import Embedding, Linear, RMSNorm, Weight, soft_cap
from maxstack.models.moe import MoE
from maxstack.models.packed import PackedLinear, PackedMatrix, PackedPanels
from maxstack.models.transformer import Transformer

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


class RowsLinear(nnx.Module):
    """A Linear for products with rows of tokens."""

    def __init__(self, linear: Linear | PackedLinear, dtype: jnp.dtype):
        if isinstance(linear, PackedLinear):
            self.inputs, self.outputs = linear.inputs, linear.outputs
            self.w = PackedPanels(linear.w.weight)
        else:
            w, contract = np.asarray(linear.w[...]), linear.contract
            self.inputs, self.outputs = w.shape[:contract], w.shape[contract:]
            self.w = matrix(w.reshape(math.prod(self.inputs), -1).T, dtype)
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


def unstack(model: Transformer) -> Unstacked:
    """The model's layers one by one, their products' weights laid out by output."""
    dtype = jnp.dtype(model.config.dtype)
    replace = for_rows(dtype)

    def one(which: tuple[Any, int]) -> Any:
        layer, repeat = which
        # By way of numpy, which takes a layer from a stack without compiling anything, and lays it out in any thread.
        own = jax.tree.map(lambda leaf: np.asarray(leaf)[repeat], layer)
        return jax.tree.map(jnp.asarray, cast_products(own, dtype, replace))

    layers = [
        (layer, repeat)
        for config, stack in zip(model.config.stacks, model.stacks, strict=True)
        for repeat in range(config.repeats)
        for layer in cast(Any, stack).layers
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        blocks = list(pool.map(one, layers))
    outer = with_parts(model, lambda part: part)
    head, outer.stacks, outer.head = outer.head, nnx.List([]), None
    outer = cast_products(outer, dtype, replace)
    if isinstance(head, PackedMatrix):
        return Unstacked(tuple(blocks), outer, PackedPanels(head.weight) if native() else head)
    table = model.embedding.table[...] if head is None else np.asarray(head[...]).T
    return Unstacked(tuple(blocks), outer, matrix(table, dtype))


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
