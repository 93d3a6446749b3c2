"""A process that saves or restores, as test_processes.py starts it: JOB DIRECTORY [PORT PROCESS COUNT]."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    job, directory, *place = sys.argv[1:]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    import jax

    if place:
        port, process, count = map(int, place)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
    JOBS[job](Path(directory))


def global_state(step: int) -> dict[str, object]:
    """The same numbers on any number of processes, spread over all their devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    values = np.random.default_rng(step).standard_normal((16, 8)).astype(np.float32)

    def spread(array: np.ndarray, *spec: str | None) -> jax.Array:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {
        "params": {
            "w": spread(values, "fsdp"),
            "v": spread(values.T, None, "fsdp"),
            "norm": spread(values[0]),
        },
        "local": jnp.int32(step),
        "key": jax.random.key(step),
    }


def save(directory: Path) -> None:
    from maxstack.checkpoint import CheckpointConfig, Checkpoints

    with Checkpoints(directory, CheckpointConfig(keep_last=2)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, global_state(step), {"position": step})
        checkpoints.wait()
        # The first process deletes step 1; the others may still see it.
        assert set(checkpoints.steps()) >= {2, 3}


def restore(directory: Path) -> None:
    import jax
    import numpy as np

    from maxstack.checkpoint import Checkpoints, read_arrays

    expected = global_state(3)

    def abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        spread = not leaf.is_fully_addressable or jax.process_count() == 1
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if spread else None)

    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest_good() == 3
        state, meta, account = checkpoints.restore(target=jax.tree.map(abstract, expected))
    assert meta == {"position": 3}
    assert account.verified == "hash"
    assert jax.random.key_data(state.pop("key")).tolist() == jax.random.key_data(expected.pop("key")).tolist()
    for found, right in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert found.sharding == right.sharding
        for mine, other in zip(found.addressable_shards, right.addressable_shards, strict=True):
            np.testing.assert_array_equal(mine.data, other.data)
    named = read_arrays(directory)
    values = np.random.default_rng(3).standard_normal((16, 8)).astype(np.float32)
    np.testing.assert_array_equal(named["params"]["v"], values.T)


def restore_whole_and_refuse_others(directory: Path) -> None:
    """In every process; none waits for the others forever."""
    from maxstack.checkpoint import CheckpointError, Checkpoints

    def refused(use: Callable[[], object]) -> None:
        found: CheckpointError | None = None
        try:
            use()
        except CheckpointError as error:
            found = error
        assert found is not None
        assert (found.step, found.good_step) == (3, 2)
        assert "step 2 is intact" in str(found)

    restore(directory / "whole")
    with Checkpoints(directory / "damaged") as checkpoints:
        refused(checkpoints.restore)
        assert checkpoints.latest_good() == 2
    with Checkpoints(directory / "newer") as checkpoints:
        refused(checkpoints.latest_good)
        refused(checkpoints.restore)


def save_until_killed(directory: Path) -> None:
    """Saves on and on, saying which step was handed over; the arrays are the step's number."""
    import jax.numpy as jnp

    from maxstack.checkpoint import CheckpointConfig, Checkpoints

    with Checkpoints(directory, CheckpointConfig(keep_last=2)) as checkpoints:
        start = checkpoints.latest_good() or 0
        for step in range(start + 1, 10_000):
            state = {f"w{number}": jnp.full((50_000,), step * 10 + number) for number in range(8)}
            checkpoints.save(step, state, {"position": step})
            print(step, flush=True)


def stop_while_writing(directory: Path) -> None:
    """Saves step 1, then hangs in the middle of writing step 2."""
    import jax.numpy as jnp
    import tensorstore

    from maxstack.checkpoint import Checkpoints

    def hang(*args: object, **kwargs: object) -> object:
        print("writing\n", end="", flush=True)
        time.sleep(600)
        return None

    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"w": jnp.full((1000,), 1)}, {"position": 1}, block=True)
        setattr(tensorstore, "open", hang)  # noqa: B010 (its type is not that of the original)
        checkpoints.save(2, {"w": jnp.full((1000,), 2)}, {"position": 2}, block=True)


def stop_before_rename(directory: Path) -> None:
    """Saves step 1, then hangs when all of step 2 is written but not committed."""
    import jax.numpy as jnp

    from maxstack.checkpoint import Checkpoints, manifest

    with Checkpoints(directory) as checkpoints:
        checkpoints.save(1, {"w": jnp.full((1000,), 1)}, {"position": 1}, block=True)
        write = manifest.write_manifest

        def hang(folder: Path) -> None:
            write(folder)
            print("writing", flush=True)
            time.sleep(600)

        manifest.write_manifest = hang
        checkpoints.save(2, {"w": jnp.full((1000,), 2)}, {"position": 2}, block=True)


JOBS = {
    job.__name__: job
    for job in (
        save,
        restore_whole_and_refuse_others,
        save_until_killed,
        stop_while_writing,
        stop_before_rename,
    )
}

if __name__ == "__main__":
    main()
