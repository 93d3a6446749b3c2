"""What the backends share: the derivative, two more grouped products.

It stands outside of the backends, so that all keep the same three arrays for the backward pass and a gradient nobody
reads is not computed.
"""

from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from maxstack.kernels.dispatch import Later
from maxstack.kernels.grouped_matmul import native, xla
from maxstack.kernels.grouped_matmul.quantized import whole
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

BACKENDS: dict[str, Any] = {
    "mosaic_tpu": Later("maxstack.kernels.grouped_matmul.mosaic_tpu"),
    "mosaic_gpu": Later("maxstack.kernels.grouped_matmul.mosaic_gpu"),
    "cpu_native": native,
    "xla": xla,
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(taken: str, x_td: Array, w_edf: Array | QuantizedWeight, group_sizes_e: Array) -> Array:
    """The product by the backend `taken`, of at least one row."""
    return BACKENDS[taken].rows(x_td, w_edf, group_sizes_e)


def _forward(taken, x_td, w_edf, group_sizes_e):
    return product(taken, x_td, w_edf, group_sizes_e), (x_td, w_edf, group_sizes_e)


def _backward(taken, kept, dy_tf):
    x_td, w, group_sizes_e = kept
    if not isinstance(w, QuantizedWeight):
        dx_td = BACKENDS[taken].rows(dy_tf, w, group_sizes_e, transposed=True)
        return dx_td, BACKENDS[taken].matrices(x_td, dy_tf, group_sizes_e), None
    if taken in ("cpu_native", "xla"):
        return xla.rows(dy_tf, w, group_sizes_e, transposed=True), None, None
    return BACKENDS[taken].rows(dy_tf, whole(w, dy_tf.dtype), group_sizes_e), None, None


product.defvjp(_forward, _backward)
