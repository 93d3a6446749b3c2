"""Weights of 8 or 4 bits, one matrix [outputs, inputs] a group."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels.quantized_matmul.weight import QuantizedWeight, dequantize


def whole(w: QuantizedWeight, dtype: jnp.dtype | type) -> Float[Array, "e n k"]:
    """All matrices in a type."""
    return jax.vmap(partial(dequantize, dtype=dtype))(w)


def part(w: Array | QuantizedWeight, first: Array, groups: int) -> Array | QuantizedWeight:
    """The matrices of some groups, cut out of a stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, groups), w)


def of_group(w: QuantizedWeight, group: Array) -> QuantizedWeight:
    """One group's matrix, as it is kept."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, group, keepdims=False), w)
