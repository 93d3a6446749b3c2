"""Layers with a weight in few bits, as `packing` makes them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from maxstack import sharding
from maxstack.kernels.quantized_matmul import (
    PanelWeight,
    QuantizedWeight,
    dequantize,
    from_panels,
    in_panels,
    panel_matmul,
    quantized_matmul,
)
from maxstack.models.layers import Buffer, Linear, operand

ARRAYS = ("values", "scale")


class Packed(Buffer):
    """An array of a packed weight: saved, not trained."""


class Layer(nnx.Variable):
    """A number of a layer."""


class PackedMatrix(nnx.Module):
    """A matrix [N outputs, K inputs] in few bits. Stacked copies have further axes in front.

    `axes` are the logical axes, outputs and inputs last: of several that make one together, the slowest, which alone
    may be cut over devices.
    """

    def __init__(self, w: QuantizedWeight, axes: tuple[str, ...] = ("whole", "whole")):
        # No zero points: rounding to nearest loads without them, and calibrated schemes have their own modules.
        *front, outputs, inputs = axes
        self.values = Packed(w.values, axes=axes)
        self.scale = Packed(w.scale, axes=(*front, "whole" if w.group == w.inputs else inputs, outputs))
        self.inputs, self.group = w.inputs, w.group
        self.layer: Layer | None = nnx.data(None)

    @property
    def weight(self) -> QuantizedWeight:
        """The weight as kernels take it."""
        values, scale = self.values[...], self.scale[...]
        layer = None if self.layer is None else self.layer[...]
        return QuantizedWeight(
            values=values, scale=scale, zero=None, inputs=self.inputs, group=self.group, layer=layer
        )

    def of_layer(self, layer: Array, scale: Packed) -> "PackedMatrix":
        """Of a stack of matrices [layers, …] the one of a layer, with its scales; its values stay in their stack."""
        leaves, treedef = jax.tree.flatten(self)
        copy = jax.tree.unflatten(treedef, leaves)
        copy.layer, copy.scale = nnx.data(Layer(layer)), scale
        return copy

    def __call__(self, x: Float[Array, "... k"], dtype: jnp.dtype | None = None) -> Float[Array, "... n"]:
        return quantized_matmul(x, self.weight, dtype=dtype)

    def whole(self, dtype: jnp.dtype) -> Float[Array, "n k"]:
        """The matrix in full precision; on a mesh every device gets all of it, gathered in few bits."""
        return dequantize(jax.tree.map(sharding.whole, self.weight.one()), dtype)


class PackedLinear(nnx.Module):
    """A Linear with its weight in few bits."""

    def __init__(self, linear: Linear, w: QuantizedWeight):
        own = linear.w[...].shape[linear.w[...].ndim - len(linear.axes) :]
        self.inputs, self.outputs = own[: linear.contract], own[linear.contract :]
        self.axes = linear.axes[linear.contract :]
        self.w, self.b = PackedMatrix(w, (self.axes[0], linear.axes[0])), linear.b

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = checkpoint_name(self.w(x.reshape(*x.shape[:2], -1)), "product")
        cut = sharding.activation_spec("batch", "sequence", *self.axes)
        y = jax.lax.reshape(y, (*x.shape[:2], *self.outputs), out_sharding=cut)
        return y if self.b is None else (y + operand(self.b, jnp.dtype(jnp.float32))).astype(y.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """As `Linear.matrix`."""
        return self.w.whole(dtype).T.reshape(*self.inputs, *self.outputs)


class PackedPanels(nnx.Module):
    """A matrix [K, N], or several, in few bits, in panels of outputs as C++ reads them on a CPU."""

    def __init__(self, w_nk: QuantizedWeight):
        w = in_panels(w_nk)
        self.values = Packed(jnp.asarray(w.values), axes=("whole",) * w.values.ndim)
        self.scale = Packed(jnp.asarray(w.scale), axes=("whole",) * w.scale.ndim)
        self.outputs, self.inputs, self.group = w.outputs, w.inputs, w.group

    @property
    def weight(self) -> PanelWeight:
        """The weight as the product takes it."""
        return PanelWeight(
            values=self.values[...], scale=self.scale[...], zero=None, outputs=self.outputs,
            inputs=self.inputs, group=self.group,
        )  # fmt: skip

    def __call__(self, x_tk: Float[Array, "t k"], dtype: jnp.dtype | None = None) -> Float[Array, "t n"]:
        return panel_matmul(x_tk, self.weight).astype(dtype or x_tk.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "k n"]:
        """The matrix in full precision."""
        return from_panels(self.weight).T.astype(dtype)
