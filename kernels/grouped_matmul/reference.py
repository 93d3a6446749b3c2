"""Grouped products as they are written on paper: every row times every matrix, with a mask; float32 inside."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul.quantized import whole
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight


def grouped_matmul(
    x_td: Float[Array, "t d"], w: Float[Array, "e d f"] | QuantizedWeight, group_sizes_e: Int[Array, "e"]
) -> Float[Array, "t f"]:
    """Σ over groups of (row if it is in the group, else 0) · matrix of the group."""
    w_edf = jnp.swapaxes(whole(w, jnp.float32), 1, 2) if isinstance(w, QuantizedWeight) else w
    wide = jnp.promote_types(x_td.dtype, jnp.float32)
    end_e = jnp.cumsum(group_sizes_e)
    row_t1 = jnp.arange(x_td.shape[0])[:, None]
    inside_te = (end_e - group_sizes_e <= row_t1) & (row_t1 < end_e)
    # Choices, not products with the mask: rows of no group, and their cotangents, may hold NaN.
    x_ted = jnp.where(inside_te[..., None], x_td[:, None], 0).astype(wide)
    y_tf = jnp.einsum("ted,edf->tf", x_ted, w_edf.astype(wide))
    return jnp.where(inside_te.any(1)[:, None], y_tf, 0).astype(x_td.dtype)
