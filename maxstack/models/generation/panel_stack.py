"""Panels of all layers in one array, so that a loop over the layers reads each where it lies.

A scan cuts the layer's part out of what it goes over, and on a CPU that copies every weight at every step. What is here
is held back from the cutting: C++ gets the whole array, and the number of the layer. So does the TPU's kernel of packed
matrices.
"""

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from maxstack.kernels import cpu_native
from maxstack.models.generation.matrix import in_panels, new_panels, shortened
from maxstack.models.layers import Weight
from maxstack.models.packed import PackedMatrix


class PanelStack(nnx.Module):
    """A matrix [i, o] of each of several layers, as `Panels` has one."""

    def __init__(self, w_loi: np.ndarray, threads: Executor):
        self.outputs = w_loi.shape[1]
        numbers = list(threads.map(shortened, w_loi))
        short = all(each.dtype == ml_dtypes.bfloat16 for each in numbers)
        panels = new_panels(w_loi.shape, numbers[0].dtype if short else w_loi.dtype)
        list(threads.map(in_panels, numbers if short else w_loi, panels))
        self.w = Weight(jax.device_put(panels), axes=("whole",) * 3)


class OfLayer(NamedTuple):
    """The matrix of one layer, inside of a loop over them."""

    stack: PanelStack
    layer: Int[Array, ""]

    def __call__(self, x_ti: Float[Array, "t i"], dtype: jnp.dtype | None = None) -> Float[Array, "t o"]:
        y = cpu_native.panel_product_at(x_ti.astype(jnp.float32), self.stack.w[...], self.layer)
        return y[:, : self.stack.outputs].astype(dtype or x_ti.dtype)


def held_back(layers: Any) -> tuple[list[Any], Callable[[list[Any], Int[Array, ""]], Any]]:
    """The arrays that a scan over stacked layers may cut, and a function from what it has cut of them, and the number
    of the layer, to the layer."""
    parts, treedef = jax.tree.flatten(
        layers, is_leaf=lambda part: isinstance(part, PanelStack) or in_few_bits(part)
    )

    def layer(cut: list[Any], number: Int[Array, ""]) -> Any:
        arrays = iter(cut)

        def own(part: Any) -> Any:
            if isinstance(part, PanelStack):
                return OfLayer(part, number)
            return part.of_layer(number, next(arrays)) if in_few_bits(part) else next(arrays)

        return jax.tree.unflatten(treedef, [own(part) for part in parts])

    def may_be_cut(part: Any) -> Any:
        return part.scale if in_few_bits(part) else part

    return [may_be_cut(part) for part in parts if not isinstance(part, PanelStack)], layer


def in_few_bits(part: Any) -> bool:
    """Whether it is a stack of packed matrices, of which the TPU's kernel finds its layer; scales, which XLA would
    fetch whole, are cut."""
    return isinstance(part, PackedMatrix) and part.values[...].ndim == 3
