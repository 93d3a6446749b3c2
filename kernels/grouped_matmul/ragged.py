"""Grouped products by XLA's own ragged dot, which TPUs run as one kernel: as many multiplications as rows need."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul.quantized import whole
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""[t, d], [t, f] -> [e, d, f]: one product a group, contracted over the rows of the group."""


def rows(
    x_td: Float[Array, "t d"], w: Array | QuantizedWeight, group_sizes_e: Int[Array, "e"], transposed: bool = False
) -> Float[Array, "t f"]:  # fmt: skip
    """Each row times the matrix of its group (`w` is [e, f, d] if either `transposed` or quantized); rows of no group
    give 0. Of quantized weights all matrices are made in full."""
    if isinstance(w, QuantizedWeight):
        w, transposed = whole(w, x_td.dtype), not transposed
    w_edf = jnp.swapaxes(w, 1, 2) if transposed else w
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    y_tf = jax.lax.ragged_dot(x_td, w_edf, group_sizes_e, preferred_element_type=wide)
    # What ragged_dot leaves in rows of no group is not documented.
    inside_t1 = jnp.arange(x_td.shape[0])[:, None] < jnp.sum(group_sizes_e)
    return jnp.where(inside_t1, y_tf, 0).astype(x_td.dtype)


def matrices(
    x_td: Float[Array, "t d"], dy_tf: Float[Array, "t f"], group_sizes_e: Int[Array, "e"]
) -> Float[Array, "e d f"]:
    """xᵀ·dy over the rows of each group, summed in float32 or wider; 0 for a group without rows."""
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    dw_edf = jax.lax.ragged_dot_general(x_td, dy_tf, group_sizes_e, BY_GROUP, preferred_element_type=wide)
    return dw_edf.astype(x_td.dtype)
