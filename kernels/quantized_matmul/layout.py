"""How x and a weight lie on a mesh with explicit axes: tokens, inputs and outputs, each over axes of its own."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh
from jaxtyping import Array

from maxstack.kernels.quantized_matmul.weight import QuantizedWeight
from maxstack.kernels.sharded import DimAxes, dim_axes, explicit_mesh, spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh axes of each dimension of a product."""

    mesh: AbstractMesh
    lead: tuple[DimAxes, ...]
    """Of the leading dimensions of x and of the result."""
    inputs: DimAxes
    """Of the inputs: each device has a part of every sum."""
    outputs: DimAxes

    @property
    def x(self) -> jax.P:
        return spec(*self.lead, self.inputs)

    @property
    def y(self) -> jax.P:
        return spec(*self.lead, self.outputs)

    def weight(self, w: QuantizedWeight) -> QuantizedWeight:
        """Specs in the places of arrays. One scale for all inputs is on every device that has some of them."""
        front = () if w.layer is None else ((),)
        groups = spec(() if one_group(w) else self.inputs, self.outputs)
        return dataclasses.replace(
            w, values=spec(*front, self.outputs, self.inputs), scale=groups,
            zero=None if w.zero is None else groups, layer=None if w.layer is None else spec(),
        )  # fmt: skip

    def held(self, w: QuantizedWeight) -> QuantizedWeight:
        """Inside `jax.shard_map`: a device's arrays with the number of inputs that they stand for."""
        inputs = w.inputs // ways(self.mesh, self.inputs)
        return dataclasses.replace(w, inputs=inputs, group=inputs if one_group(w) else w.group)


def lay_out(x: Array, w: QuantizedWeight) -> tuple[Layout | None, Array, QuantizedWeight]:
    """(layout, x, w), moved where it asks for: None without a mesh of explicit axes.

    x and the result stay where the tokens are. Along axes that cut these the weight is gathered, in few bits, and so
    are inputs that are not cut into whole groups.
    """
    mesh = explicit_mesh(x, *jax.tree.leaves(w))
    if mesh is None or mesh.size == 1:
        return None, x, w
    lead = dim_axes(x)[:-1]
    taken = {axis for axes in lead for axis in axes}
    outputs, inputs = (tuple(a for a in axes if a not in taken) for axes in dim_axes(w.values)[-2:])
    if w.inputs % (ways(mesh, inputs) * (1 if one_group(w) else w.group)):
        inputs = ()
    layout = Layout(mesh=mesh, lead=lead, inputs=inputs, outputs=outputs)
    return layout, jax.reshard(x, layout.x), jax.tree.map(jax.reshard, w, layout.weight(w))


def one_group(w: QuantizedWeight) -> bool:
    """Whether all inputs of an output share a scale, whatever their number."""
    return w.bits == 8 and w.group == w.inputs


def ways(mesh: AbstractMesh, axes: DimAxes) -> int:
    """Devices along mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)
