"""Layers with a weight in few bits, as `packing` makes them."""

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from maxstack.kernels.quantized_matmul import QuantizedWeight, dequantize, quantized_matmul
from maxstack.models.layers import Buffer, Linear

ARRAYS = ("values", "scale")


class Packed(Buffer):
    """An array of a packed weight: saved, not trained."""


class PackedMatrix(nnx.Module):
    """A matrix [N outputs, K inputs] in few bits, or one for each index of the axes `front`. Stacked copies have
    further axes before those."""

    def __init__(self, w: QuantizedWeight, front: tuple[str, ...] = ()):
        # No zero points: rounding to nearest loads without them, and calibrated schemes have their own modules.
        axes = (*front, "whole", "whole")
        self.values, self.scale = (Packed(getattr(w, name), axes=axes) for name in ARRAYS)
        self.inputs, self.group = w.inputs, w.group

    @property
    def weight(self) -> QuantizedWeight:
        """The weight as kernels take it."""
        values, scale = self.values[...], self.scale[...]
        return QuantizedWeight(values=values, scale=scale, zero=None, inputs=self.inputs, group=self.group)

    def __call__(self, x: Float[Array, "... k"], dtype: jnp.dtype | None = None) -> Float[Array, "... n"]:
        return quantized_matmul(x, self.weight, dtype=dtype)

    def whole(self, dtype: jnp.dtype) -> Float[Array, "n k"]:
        """The matrix in full precision."""
        return dequantize(self.weight, dtype)


class PackedLinear(nnx.Module):
    """A Linear with its weight in few bits."""

    def __init__(self, linear: Linear, w: QuantizedWeight):
        own = linear.w[...].shape[linear.w[...].ndim - len(linear.axes) :]
        self.inputs, self.outputs = own[: linear.contract], own[linear.contract :]
        self.w, self.b = PackedMatrix(w), linear.b

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = checkpoint_name(self.w(x.reshape(*x.shape[:2], -1)), "product").reshape(
            *x.shape[:2], *self.outputs
        )
        return y if self.b is None else (y + self.b[...].astype(jnp.float32)).astype(y.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """As `Linear.matrix`."""
        return self.w.whole(dtype).T.reshape(*self.inputs, *self.outputs)
