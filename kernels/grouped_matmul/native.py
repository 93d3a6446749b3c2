"""Few rows of packed weights on a CPU, in C++: each byte of the matrix of a group with rows is read once."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight
from maxstack.kernels.sharded import varying, varying_over


def declined(x_td: Array, w: Array | QuantizedWeight, group_sizes_e: Array) -> str | None:
    """Why the C++ part cannot serve a call; None: it can."""
    if not isinstance(w, QuantizedWeight):
        return "it reads weights of 8 or 4 bits"
    if w.values.dtype == jnp.int4:
        return "it reads two int4 of a byte: store the weight in bytes"
    if w.zero is not None:
        return "it reads no zero points"
    rows, most = x_td.shape[0], cpu_native.MOST_ROWS * len(group_sizes_e)
    if rows > most:
        return f"{rows} rows in {len(group_sizes_e)} groups; it serves up to {most}"
    return cpu_native.problem()


def rows(
    x_td: Float[Array, "t d"], w: QuantizedWeight, group_sizes_e: Int[Array, "e"]
) -> Float[Array, "t f"]:
    """Each row times the matrix of its group; rows of no group give 0."""
    x_td, dtype = x_td.astype(jnp.float32), x_td.dtype
    sizes_e = group_sizes_e.astype(jnp.int32)
    if w.bits == 8:
        y_tf = cpu_native.grouped_int8_product(x_td, w.values, w.scale, sizes_e)
    else:
        y_tf = cpu_native.grouped_int4_product(x_td, w.values, w.scale, sizes_e, group=w.group)
    # What calls out of XLA does not say over which axes its result varies.
    return varying_over(varying(x_td), y_tf.astype(dtype))
