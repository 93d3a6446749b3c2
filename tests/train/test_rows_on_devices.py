"""The rows that reach the devices are those of the pure function of (seed, step, global batch), whatever the devices.

What is hashed is what lies in the devices' own memory when a step begins, not what the loader gave.
"""

import dataclasses

import jax
import numpy as np
import pytest

from maxstack.data.batch import Batch
from maxstack.data.batches import row_hashes
from maxstack.sharding import MeshConfig
from maxstack.train import loop, session
from maxstack.train.session import Session
from tests.train.runs import tiny_run

STEPS = 5
MESHES = {
    1: MeshConfig(),
    2: MeshConfig(data=2, fsdp=1),
    4: MeshConfig(data=2, fsdp=2),
    8: MeshConfig(data=2, fsdp=2, tensor=2),
}


def landed(array: jax.Array) -> np.ndarray:
    """The global array put together from the devices' shards; copies of a shard must agree."""
    whole = np.full(array.shape, -9, array.dtype)
    for shard in array.addressable_shards:
        part, given = whole[shard.index], np.asarray(shard.data)
        assert (part == -9).all() or np.array_equal(part, given)
        whole[shard.index] = given
    return whole


def hashes(batch: Batch) -> list[str]:
    """Row hashes in the order of the global batch: row i is in micro-batch i mod n."""
    parts = [landed(part) for part in batch]
    return row_hashes(Batch(*(part.swapaxes(0, 1).reshape(-1, part.shape[-1]) for part in parts)))


@pytest.mark.parametrize("devices", MESHES)
def test_devices_hold_the_rows_of_the_pure_function_also_resumed(tmp_path, monkeypatch, devices):
    seen: dict[int, list[str]] = {}
    expected: dict[int, list[str]] = {}

    def watched(self, batch):
        seen[self.step] = hashes(batch)
        expected[self.step] = self.loader.row_hashes(self.step)
        self.step += 1

    # What a step would do with the rows is nothing to this test, and compiling it for each mesh takes longest.
    monkeypatch.setattr(session, "compiled", lambda *_: None)
    monkeypatch.setattr(Session, "advance", watched)
    run = tiny_run(tmp_path, steps=3, mesh=MESHES[devices], batch_rows=8, micro_batches=2)
    loop.train(run, jax.devices()[:devices])
    # Resumed at an odd step on the same devices.
    loop.train(dataclasses.replace(run, steps=STEPS), jax.devices()[:devices])
    assert sorted(seen) == list(range(STEPS))
    assert seen == expected
    assert len({row for rows in seen.values() for row in rows}) == STEPS * 8
    assert seen[STEPS - 1] == FIRST.setdefault("last", seen[STEPS - 1])


FIRST: dict[str, list[str]] = {}
"""The last step's hashes on the first number of devices, which those of the others must equal."""
