"""Matrices as products on a CPU read them: in panels for C++ where that is there, else by output for XLA."""

import math
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from maxstack.kernels import cpu_native
from maxstack.models.files.source import aligned
from maxstack.models.layers import Weight
from maxstack.models.remat import platform

# XLA:CPU multiplies few rows of bfloat16 on a slow path.
FEWEST_BF16_ROWS = 8
# Up to this many tokens the weights are the left operand: XLA:CPU packs the left one in smaller parts.
FEW_ROWS = 32


class Panels(nnx.Module):
    """A matrix [i, o] in panels of outputs. Numbers that are all of bfloat16, as those of most published models are,
    lie as such: half the bytes, and the same products."""

    def __init__(self, w_oi: np.ndarray):
        self.outputs = w_oi.shape[0]
        numbers = shortened(w_oi)
        panels = new_panels(w_oi.shape, numbers.dtype)
        in_panels(numbers, panels)
        # Not jnp.asarray, which copies what lies as jax wants it.
        self.w = Weight(jax.device_put(panels), axes=("whole", "whole", "whole"))

    def __call__(self, x_ti: Float[Array, "t i"], dtype: jnp.dtype | None = None) -> Float[Array, "t o"]:
        y = cpu_native.panel_product(x_ti.astype(jnp.float32), self.w[...])[:, : self.outputs]
        return y.astype(dtype or x_ti.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "i o"]:
        """The matrix as it was."""
        panels = jnp.swapaxes(self.w[...], 0, 1)
        return panels.reshape(panels.shape[0], -1)[:, : self.outputs].astype(dtype)


def new_panels(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory for matrices [.., o, i] in panels [.., p, i, 16]; jax takes it as it is."""
    *before, outputs, inputs = shape
    shape = (*before, -(-outputs // cpu_native.PANEL), inputs, cpu_native.PANEL)
    return aligned(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


def in_panels(w_oi: np.ndarray, panels: np.ndarray) -> None:
    """Lay a matrix out in panels [p, i, 16], with zeros behind the last output."""
    size, (outputs, inputs) = cpu_native.PANEL, w_oi.shape
    whole = outputs // size
    panels[:whole] = w_oi[: whole * size].reshape(whole, size, inputs).swapaxes(1, 2)
    if rest := outputs - whole * size:
        panels[whole, :, :rest], panels[whole, :, rest:] = w_oi[whole * size :].T, 0


def shortened(w_oi: np.ndarray) -> np.ndarray:
    """float32 numbers as bfloat16 where that changes none of them."""
    if w_oi.dtype == ml_dtypes.bfloat16:
        return w_oi
    w = w_oi if w_oi.flags.c_contiguous else np.ascontiguousarray(w_oi.T)
    # A few rows tell most of those apart that lose something.
    if sys.byteorder != "little" or any(np.any(rows.view(np.uint16)[:, ::2]) for rows in (w[:4], w)):
        return w_oi
    high = w.view(ml_dtypes.bfloat16)[:, 1::2]
    return high if w_oi.flags.c_contiguous else high.T


class ByOutput(nnx.Module):
    """A matrix [i, o] transposed: each output's weights in one run of memory."""

    def __init__(self, w_oi: Array | np.ndarray, dtype: jnp.dtype):
        self.w_oi = Weight(jnp.asarray(w_oi, dtype), axes=("whole", "whole"))

    def __call__(self, x_ti: Float[Array, "t i"], dtype: jnp.dtype | None = None) -> Float[Array, "t o"]:
        return rows_product(x_ti, self.w_oi[...].astype(x_ti.dtype), dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "i o"]:
        """The matrix as it was."""
        return self.w_oi[...].T.astype(dtype)


def matrix(w_oi: np.ndarray | Array, dtype: jnp.dtype) -> Panels | ByOutput:
    """The form that is fastest here, for activations of `dtype`."""
    if dtype == jnp.float32 and native():
        w = np.asarray(w_oi)
        return Panels(w if w.dtype == ml_dtypes.bfloat16 else np.asarray(w, np.float32))
    return ByOutput(w_oi, dtype)


def rows_product(
    x_ti: Float[Array, "t i"], w_oi: Float[Array, "o i"], dtype: jnp.dtype | None = None
) -> Float[Array, "t o"]:
    """`x w^T` by XLA, summed in float32, in x's type or another."""
    tokens, wide = x_ti.shape[0], jnp.promote_types(x_ti.dtype, jnp.float32)
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
