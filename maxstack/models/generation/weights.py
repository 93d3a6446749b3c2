"""Weights as decoding reads them: in the compute type, and on a CPU unstacked and laid out by output."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native
from maxstack.models.layers import Embedding, Linear, Weight, soft_cap
from maxstack.models.moe import MoE
from maxstack.models.packed import PackedMatrix
from maxstack.models.remat import platform
from maxstack.models.transformer import Transformer

# XLA:CPU multiplies few rows of bfloat16 on a slow path.
FEWEST_BF16_ROWS = 8
# Up to this many tokens the weights are the left operand: XLA:CPU packs the left one in smaller parts.
FEW_ROWS = 32


class Unstacked(NamedTuple):
    """A model with its layers one by one: a scan over stacked layers copies each layer's weights on a CPU."""

    blocks: tuple[Any, ...]
    outer: Transformer
    """The model without its stacks and output projection."""
    head: Weight | PackedMatrix
    """The output projection [v, d] by output: the token table itself where it is tied."""

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """As `Transformer.logits`, of few tokens."""
        config, x_td, wide = self.outer.config, x.reshape(-1, x.shape[-1]), jnp.dtype(jnp.float32)
        if isinstance(self.head, PackedMatrix):
            y = self.head(x_td, wide)
        else:
            y = rows_product(x_td, self.head[...].astype(x.dtype), wide)
        y = y.reshape(*x.shape[:2], -1)
        return soft_cap(y if config.logit_scale == 1.0 else y * config.logit_scale, config.logit_softcap)


class RowsLinear(nnx.Module):
    """A Linear for products with few tokens: w^T, flat, each output's weights in one run of memory."""

    def __init__(self, linear: Linear, dtype: jnp.dtype):
        w, contract = linear.w[...], linear.contract
        self.inputs, self.outputs = w.shape[:contract], w.shape[contract:]
        flat = w.astype(dtype).reshape(-1, w[(0,) * contract].size)
        self.w_oi = Weight(np.ascontiguousarray(flat.T), axes=("whole", "whole"))
        self.b = linear.b

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = rows_product(x.reshape(-1, self.w_oi[...].shape[1]), self.w_oi[...].astype(x.dtype))
        y = y.reshape(*x.shape[:2], *self.outputs)
        return y if self.b is None else (y + self.b[...]).astype(y.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """As `Linear.matrix`."""
        return self.w_oi[...].T.reshape(*self.inputs, *self.outputs).astype(dtype)


def rows_product(
    x_ti: Float[Array, "t i"], w_oi: Float[Array, "o i"], dtype: jnp.dtype | None = None
) -> Float[Array, "t o"]:
    """`x w^T`, summed in float32, in x's type or another."""
    tokens, wide = x_ti.shape[0], jnp.promote_types(x_ti.dtype, jnp.float32)
    if x_ti.dtype == jnp.float32 and 1 < tokens <= cpu_native.MOST_ROWS and native():
        return cpu_native.rows_product(x_ti, w_oi)
    if x_ti.dtype == jnp.bfloat16 and tokens < FEWEST_BF16_ROWS:
        x_ti = jnp.pad(x_ti, ((0, FEWEST_BF16_ROWS - tokens), (0, 0)))
    contracted = (((1,), (1,)), ((), ()))
    if x_ti.shape[0] <= FEW_ROWS:
        y = jax.lax.dot_general(w_oi, x_ti, contracted, preferred_element_type=wide).T
    else:
        y = jax.lax.dot_general(x_ti, w_oi, contracted, preferred_element_type=wide)
    return y[:tokens].astype(dtype or x_ti.dtype)


def native() -> bool:
    """Whether what is compiled here may call C++."""
    return platform() == "cpu" and cpu_native.available()


# The weights of products that modules of these types hold themselves.
PRODUCTS: dict[type, tuple[str, ...]] = {
    Linear: ("w",), Embedding: ("table",), MoE: ("gate", "up", "down"), Transformer: ("head",),
}  # fmt: skip


def cast_products(module: Any, dtype: jnp.dtype, linear: Callable[[Linear], Any] | None = None) -> Any:
    """A copy of a module with the weights of its products in the compute type, as a product would cast them.

    `linear` takes the place of every Linear instead.
    """
    if type(module) is Linear and linear is not None:
        return linear(module)
    if not isinstance(module, nnx.Module):
        return module
    copy = with_parts(module, lambda part: cast_products(part, dtype, linear))
    for name in PRODUCTS.get(type(module), ()):
        old = getattr(copy, name)
        if isinstance(old, nnx.Variable):
            setattr(copy, name, Weight(old[...].astype(dtype), axes=old.get_metadata()["axes"]))
    return copy


def unstack(model: Transformer) -> Unstacked:
    """The model's layers one by one, their products' weights laid out by output."""
    dtype, blocks = jnp.dtype(model.config.dtype), []
    for config, stack in zip(model.config.stacks, model.stacks, strict=True):
        for repeat in range(config.repeats):
            for layer in cast(Any, stack).layers:
                # By way of numpy, which takes a layer from a stack without compiling anything.
                one = jax.tree.map(lambda leaf, i=repeat: np.asarray(leaf)[i], layer)
                by_output = cast_products(one, dtype, lambda linear: RowsLinear(linear, dtype))
                blocks.append(jax.tree.map(jnp.asarray, by_output))
    outer = with_parts(model, lambda part: part)
    head, outer.stacks, outer.head = outer.head, nnx.List([]), None
    outer = cast_products(outer, dtype)
    if head is None:
        return Unstacked(tuple(blocks), outer, outer.embedding.table)
    if isinstance(head, PackedMatrix):
        return Unstacked(tuple(blocks), outer, head)
    by_vocab = np.ascontiguousarray(np.asarray(head[...]).astype(dtype).T)
    return Unstacked(tuple(blocks), outer, Weight(jnp.asarray(by_vocab), axes=("vocab", "embed")))


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
