"""Few rows on a CPU, in C++: each byte of the weight is read once and used for all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight


def declined(tokens: int, w: QuantizedWeight) -> str | None:
    """Why the C++ part cannot serve a call; None: it can."""
    if w.values.dtype == jnp.int4:
        return "it reads two int4 of a byte: store the weight in bytes"
    if tokens > cpu_native.MOST_ROWS:
        return f"{tokens} tokens; it serves up to {cpu_native.MOST_ROWS}"
    return cpu_native.problem()


def quantized_matmul(x_tk: Float[Array, "t k"], w: QuantizedWeight) -> Float[Array, "t n"]:
    """`x w^T` in float32."""
    x_tk = x_tk.astype(jnp.float32)
    if w.bits == 8:
        return cpu_native.int8_product(x_tk, w.values, w.scale)
    return cpu_native.int4_product(x_tk, w.values, w.scale, w.zero, group=w.group)
