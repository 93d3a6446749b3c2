"""The obvious form: the whole matrix in float32, then its product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels.quantized_matmul.weight import QuantizedWeight, dequantize


def quantized_matmul(x_tk: Float[Array, "t k"], w: QuantizedWeight) -> Float[Array, "t n"]:
    """`x w^T` in float32."""
    w_nk = dequantize(w)
    contracted = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x_tk.astype(jnp.float32), w_nk, contracted, precision=jax.lax.Precision.HIGHEST
    )
