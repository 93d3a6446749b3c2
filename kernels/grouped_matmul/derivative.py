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
from maxstack.kernels.grouped_matmul.quantized import part, whole
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight

BACKENDS: dict[str, Any] = {
    "mosaic_tpu": Later("maxstack.kernels.grouped_matmul.mosaic_tpu"),
    "mosaic_gpu": Later("maxstack.kernels.grouped_matmul.mosaic_gpu"),
    "cpu_native": native,
    "xla": xla,
}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(
    taken: str, x_td: Array, w: Array | QuantizedWeight, group_sizes_e: Array, first: Array | None
) -> Array:
    """The product by the backend `taken`, of at least one row. With `first` it reads a stack in place."""
    return BACKENDS[taken].rows(x_td, w, group_sizes_e, **_in_stack(first))


def _in_stack(first: Array | None) -> dict[str, Array]:
    return {} if first is None else {"first": first}


def _forward(taken, *arrays):
    return product(taken, *arrays), arrays


def _backward(taken, kept, dy_tf):
    x_td, w, group_sizes_e, first = kept
    if first is not None and not isinstance(w, QuantizedWeight):  # whose gradient nobody gets
        dx_td = BACKENDS[taken].rows(dy_tf, w, group_sizes_e, transposed=True, first=first)
        return dx_td, None, None, None
    w = w if first is None else part(w, first, len(group_sizes_e))
    if not isinstance(w, QuantizedWeight):
        dx_td = BACKENDS[taken].rows(dy_tf, w, group_sizes_e, transposed=True)
        return dx_td, BACKENDS[taken].matrices(x_td, dy_tf, group_sizes_e), None, None
    if taken in ("cpu_native", "xla"):
        return xla.rows(dy_tf, w, group_sizes_e, transposed=True), None, None, None
    return BACKENDS[taken].rows(dy_tf, whole(w, dy_tf.dtype), group_sizes_e), None, None, None


product.defvjp(_forward, _backward)
