"""One answer for all processes, without anyone waiting for the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Agreement:
    """Whether any process says yes. The question goes to the devices behind the step that was just dispatched, and its
    answer is read when the next one is asked: by then it is there, as the metrics of a step are."""

    def __init__(self) -> None:
        self._mesh = Mesh(np.asarray(jax.devices()), ("device",))
        self._each = NamedSharding(self._mesh, PartitionSpec("device"))
        self._most = jax.jit(jnp.max, out_shardings=NamedSharding(self._mesh, PartitionSpec()))
        self._asked: jax.Array | None = None

    def any(self, yes: bool) -> bool:
        """Whether a process said yes at the call before; all processes call it equally often."""
        mine = np.full(jax.local_device_count(), yes, np.int32)
        flags = jax.make_array_from_process_local_data(self._each, mine, (jax.device_count(),))
        with jax.set_mesh(self._mesh):  # also where the caller's own mesh is set, as in an evaluation
            before, self._asked = self._asked, self._most(flags)
        self._asked.copy_to_host_async()
        return before is not None and bool(before)
