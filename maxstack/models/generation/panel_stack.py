"""Matrices of all layers in one array, so that a loop over the layers reads each where it lies.

A scan cuts the layer's part out of what it goes over; where a kernel or C++ reads it, that is a copy of every weight at
every step. Such matrices are held back from the cutting: the kernel gets the whole array, and the number of the layer.
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
from maxstack.kernels.dispatch import chip
from maxstack.models.expert_stack import OfStack
from maxstack.models.generation.matrix import in_panels, new_panels, shortened
from maxstack.models.layers import Weight
from maxstack.models.packed import Packed, PackedMatrix


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
    """What a scan over stacked layers may cut, and a function from what it has cut of that, and the number of the
    layer, to the layer."""
    parts, treedef = jax.tree.flatten(layers, is_leaf=stays_whole)

    def layer(cut: list[Any], number: Int[Array, ""]) -> Any:
        whole = [found(part, mine, number) for part, mine in zip(parts, cut, strict=True)]
        return jax.tree.unflatten(treedef, whole)

    return [may_cut(part) for part in parts], layer


def stays_whole(part: Any) -> bool:
    """Whether layers find their own in it: of what a scan has cut, a kernel would read a copy."""
    if isinstance(part, PackedMatrix) and part.values[...].ndim == 3:
        return True
    return isinstance(part, PanelStack) or are_experts(part)


def are_experts(part: Any) -> bool:
    """Whether it is a stack of experts' matrices, for a chip whose kernel finds a layer's in it. What a scan cuts of
    bfloat16 XLA for GPUs copies nowhere."""
    array = part.values if isinstance(part, PackedMatrix) else part
    kinds = {"tpu": Weight | Packed, "gpu": Packed}.get(chip().platform)
    if kinds is None or not isinstance(array, kinds):
        return False
    return array[...].ndim == 4 and array.get_metadata()["axes"][0] == "expert"


def may_cut(part: Any) -> Any:
    """The arrays of a part that a scan may cut."""
    if isinstance(part, PanelStack) or are_experts(part):
        return None
    return part.scale if stays_whole(part) else part


def found(part: Any, mine: Any, layer: Int[Array, ""]) -> Any:
    """A layer's own part, where `mine` is what was cut of it."""
    if isinstance(part, PanelStack):
        return OfLayer(part, layer)
    if are_experts(part):
        return OfStack(part.weight if isinstance(part, PackedMatrix) else part[...], layer)
    return part.of_layer(layer, mine) if stays_whole(part) else mine
