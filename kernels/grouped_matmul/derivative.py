"""What the backends share: the derivative, two more grouped products.

It stands outside of the backends, so that all keep the same three arrays for the backward pass and a gradient nobody
reads is not computed.
"""

from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array

from maxstack.kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, native, xla
from maxstack.kernels.grouped_matmul.quantized import whole
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

ROWS: dict[str, Callable[..., Array]] = {
    "mosaic_tpu": mosaic_tpu.rows,
    "mosaic_gpu": mosaic_gpu.rows,
    "cpu_native": native.rows,
    "xla": xla.rows,
}
MATRICES = {"mosaic_tpu": mosaic_tpu.matrices, "mosaic_gpu": mosaic_gpu.matrices, "xla": xla.matrices}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(taken: str, x_td: Array, w_edf: Array | QuantizedWeight, group_sizes_e: Array) -> Array:
    """The product by the backend `taken`, of at least one row."""
    return ROWS[taken](x_td, w_edf, group_sizes_e)


def _forward(taken, x_td, w_edf, group_sizes_e):
    return product(taken, x_td, w_edf, group_sizes_e), (x_td, w_edf, group_sizes_e)


def _backward(taken, kept, dy_tf):
    x_td, w, group_sizes_e = kept
    if not isinstance(w, QuantizedWeight):
        dx_td = ROWS[taken](dy_tf, w, group_sizes_e, transposed=True)
        return dx_td, MATRICES[taken](x_td, dy_tf, group_sizes_e), None
    if taken in ("cpu_native", "xla"):
        return xla.rows(dy_tf, w, group_sizes_e, transposed=True), None, None
    return ROWS[taken](dy_tf, whole(w, dy_tf.dtype), group_sizes_e), None, None


product.defvjp(_forward, _backward)
