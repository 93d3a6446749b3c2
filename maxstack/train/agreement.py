"""One answer for all processes to "stop?", without anyone waiting for the devices.

Each process casts a vote with the batch of a step, the step adds the votes up, and the sum comes back with the metrics,
which all processes read at the same step. A program of its own for this would run beside the step, and where it meets
the step's collectives in another order on another process, both wait for ever.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxstack import sharding

VOTES = "stop_votes"


def with_votes(step: Callable[..., tuple[Any, dict[str, jax.Array]]]) -> Callable:
    """`step` of (state, (batch, votes)), whose metrics tell how many devices' processes want to stop."""

    def voting(state: Any, ballot: tuple[Any, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        batch, votes = ballot
        state, metrics = step(state, batch)
        return state, metrics | {VOTES: jnp.sum(votes)}

    return voting


class Ballots:
    """The votes of a mesh's processes, one number a device."""

    def __init__(self, mesh: Mesh):
        self._shape = (mesh.size,)
        self._where = NamedSharding(mesh, sharding.present(mesh, PartitionSpec(mesh.axis_names)))
        mine = sum(device.process_index == jax.process_index() for device in mesh.devices.flat)
        self._cast = {yes: self._array(np.full(mine, yes, np.int32)) for yes in (False, True)}

    def _array(self, mine: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(self._where, mine, self._shape)

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """The votes as a shape with its sharding."""
        return jax.ShapeDtypeStruct(self._shape, jnp.int32, sharding=self._where)

    def vote(self, yes: bool) -> jax.Array:
        """This process's part of the votes of a step."""
        return self._cast[yes]


def told_by_the_first(flags: Sequence[bool]) -> tuple[bool, ...]:
    """The flags of the first process, in all of them. Only between steps, when nothing else is under way."""
    if jax.process_count() > 1:
        flags = (
            np.asarray(multihost_utils.broadcast_one_to_all(np.array(flags, np.int32))).astype(bool).tolist()
        )
    return tuple(flags)
