"""How the arrays of one attention call lie on a mesh: rows over some axes, heads over others."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from maxstack.kernels import Unsupported
from maxstack.kernels.attention.masks import Coordinates
from maxstack.kernels.sharded import DimAxes, dim_axes, explicit_mesh, spec


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh axes of rows and heads, the same for queries, keys, values and the output."""

    mesh: AbstractMesh
    batch: DimAxes
    head: DimAxes

    @property
    def heads(self) -> jax.P:
        return spec(self.batch, (), self.head, ())

    @property
    def lse(self) -> jax.P:
        return spec(self.batch, (), self.head)

    @property
    def sinks(self) -> jax.P:
        return spec(self.head)

    def coordinates(self, at: Coordinates) -> Coordinates:
        """Where each coordinate lies: specs in the places of the arrays."""
        return Coordinates._make([None if c is None else spec(self.batch, ()) for c in at])

    def run(self, local, in_specs, out_specs):
        # check_vma is off: the types of a loop's carry would otherwise need every axis named by hand.
        return jax.shard_map(local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def lay_out(q, k, v, sinks, at: Coordinates):
    """(layout or None, k, v, sinks, at) with everything moved to where the queries lie.

    Fewer kv heads than the axes of heads count are repeated until each device has one. Raises Unsupported for a
    cut sequence or head size, and for heads that cannot be dealt out.
    """
    mesh = explicit_mesh(q, k, v)
    if mesh is None:
        return None, k, v, sinks, at
    for name, array in (("queries", q), ("keys", k), ("values", v)):
        _, sequence, _, size = dim_axes(array)
        if sequence:
            raise Unsupported(
                f"attention: the sequence of the {name} is cut over {sequence}; each query must find all its keys on "
                "its own device, so set these mesh axes to 1 or reshard first"
            )
        if size:
            raise Unsupported(
                f"attention: the head size of the {name} is cut over {size}; cut the heads instead"
            )
    batch, _, head, _ = dim_axes(q)
    layout = Layout(mesh=mesh, batch=batch, head=head)
    ways = 1
    for axis in head:
        ways *= mesh.shape[axis]
    if k.shape[2] % ways:
        if ways % k.shape[2]:
            raise Unsupported(
                f"attention: {k.shape[2]} kv heads cannot be dealt to {ways} devices of axes {head}"
            )
        k, v = (
            jnp.repeat(jax.reshard(a, spec(batch, (), (), ())), ways // k.shape[2], axis=2) for a in (k, v)
        )
    k, v = jax.reshard(k, layout.heads), jax.reshard(v, layout.heads)
    sinks = None if sinks is None else jax.reshard(sinks, layout.sinks)
    at = Coordinates(*(None if c is None else jax.reshard(c, spec(batch, ())) for c in at))
    return layout, k, v, sinks, at
