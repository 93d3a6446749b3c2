"""Experts of one layer in the stack of all layers', where kernels read them; see `panel_stack`."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.kernels.quantized_matmul import QuantizedWeight
from maxstack.kernels.sharded import dim_axes


class OfStack(NamedTuple):
    """The matrices of a layer's experts, inside of a loop over layers."""

    stack: Float[Array, "l e d f"] | QuantizedWeight
    layer: Int[Array, ""]

    @property
    def packed(self) -> bool:
        """Whether they are of few bits."""
        return isinstance(self.stack, QuantizedWeight)

    def one(self) -> Float[Array, "e d f"] | QuantizedWeight:
        """The layer's own, cut out."""
        return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, self.layer, keepdims=False), self.stack)

    def times(self, x_rd: Float[Array, "r d"], sizes_e: Int[Array, "e"]) -> Float[Array, "r f"]:
        """Rows, sorted by expert, times their expert's matrix."""
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), self.stack)
        return grouped_matmul(x_rd, flat, sizes_e, first=self.layer * len(sizes_e))


def settled(w: Any, x: Float[Array, "b t d"]) -> Any:
    """`w`, cut out of its stack where products cannot read it there: in another type than that of the tokens `x`, or of
    several devices of which each has a part for the tokens of all."""
    if not isinstance(w, OfStack):
        return w
    cut = {axis for leaf in jax.tree.leaves(w.stack) for axes in dim_axes(leaf) for axis in axes}
    gathered = {axis for axes in dim_axes(x)[:2] for axis in axes if axis in cut}
    alike = isinstance(w.stack, QuantizedWeight) or w.stack.dtype == x.dtype
    return w if alike and not gathered else w.one()
