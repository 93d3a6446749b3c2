"""Arrays to and from disk through Orbax; everything that touches Orbax is here.

Orbax is imported inside the functions: it takes a second, and `--help` needs only the configuration.
Its types are therefore `Any` in the annotations.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.checkpoint.record import ArraySpec, Record


def writer(before_commit: Callable[[], None], timeout_s: int) -> Any:
    """Orbax's asynchronous writer. `before_commit` runs in its thread, once, when all files but the rename are done."""
    import orbax.checkpoint as ocp

    _quiet_orbax()
    # The folder is made before anything waits for it: made in the background, a failure to make it leaves threads that
    # wait for it, and a process that cannot exit, until the timeout.
    options = ocp.options.AsyncOptions(
        timeout_secs=timeout_s,
        post_finalization_callback=before_commit,
        create_directories_asynchronously=False,
    )
    return ocp.AsyncCheckpointer(_handler(), async_options=options)


def save(checkpointer: Any, folder: Path, arrays: Mapping[str, Any]) -> None:
    """Start writing; returns when the arrays may be donated or overwritten.

    Orbax copies from an accelerator, and copies numpy arrays, before it returns. On the CPU it holds the buffers of
    JAX arrays without a copy: a donation of a held buffer then copies instead of reusing it, so what is written does
    not change under the writer.
    """
    import orbax.checkpoint as ocp

    # Orbax refuses arrays without elements; the record has their shape and that is all of them.
    written = {name: leaf for name, leaf in arrays.items() if leaf.size}
    checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(written))


def storable(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays that Orbax writes for a flat state, and the names that are random keys with their generator.

    Raises TypeError for a leaf that is no array, ValueError for one that was donated.
    """
    arrays, keys = {}, {}
    for name, leaf in flat.items():
        if isinstance(leaf, jax.Array):
            if leaf.is_deleted():
                raise ValueError(
                    f"{name} was donated to a compiled step and is gone; save what the step returned"
                )
            if _is_key(leaf.dtype):
                keys[name] = str(jax.random.key_impl(leaf))
                leaf = jax.random.key_data(leaf)
            if jax.process_count() > 1 and leaf.is_fully_addressable:
                # An array that each process holds for itself: the first process writes its own.
                leaf = np.asarray(leaf)
        elif isinstance(leaf, np.ndarray | np.generic):
            leaf = np.asarray(leaf)
        else:
            raise TypeError(f"{name} is {type(leaf).__name__}, not an array; plain values belong in the meta")
        arrays[name] = leaf
    if not any(leaf.size for leaf in arrays.values()):
        raise ValueError("a state without a single number in it cannot be saved")
    return arrays, keys


def spec_of(leaf: Any) -> ArraySpec:
    """Shape and dtype as stored, of an array or a ShapeDtypeStruct; of a random key those of its data."""
    if _is_key(leaf.dtype):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return ArraySpec(tuple(leaf.shape), str(np.dtype(leaf.dtype)))


def read(folder: Path, wanted: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Read the named arrays: with the sharding and dtype of the leaf given for each, or as numpy where it is None.

    A leaf without a sharding comes back on the default device.
    """
    import orbax.checkpoint as ocp

    _quiet_orbax()
    found: dict[str, Any] = {
        name: np.zeros(record.arrays[name].shape, jnp.dtype(record.arrays[name].dtype))
        for name in wanted
        if 0 in record.arrays[name].shape
    }
    arguments = {name: _restore_args(leaf) for name, leaf in wanted.items() if name not in found}
    item = {name: jax.ShapeDtypeStruct((), jnp.int32) for name in arguments}
    with ocp.Checkpointer(_handler()) as checkpointer:
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        found |= checkpointer.restore(folder.absolute(), args=arguments) if item else {}
    return {name: _placed(found[name], leaf, record.keys.get(name)) for name, leaf in wanted.items()}


def _handler() -> Any:
    import orbax.checkpoint as ocp

    # Weights hardly compress (8 % for float32) and compressing takes the cores that train.
    return ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)


def _restore_args(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    sharding = getattr(leaf, "sharding", None)
    if sharding is None or _is_key(leaf.dtype):
        dtype = None if leaf is None or _is_key(leaf.dtype) else leaf.dtype
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    return ocp.ArrayRestoreArgs(
        restore_type=jax.Array, sharding=sharding, global_shape=tuple(leaf.shape), dtype=leaf.dtype
    )


def _placed(value: Any, leaf: Any, generator: str | None) -> Any:
    if leaf is None or isinstance(leaf, np.ndarray):
        return value
    if _is_key(leaf.dtype):
        value = jax.random.wrap_key_data(jnp.array(value), impl=generator)
        return value if leaf.sharding is None else jax.device_put(value, leaf.sharding)
    if leaf.sharding is None:
        return jnp.array(value, leaf.dtype)
    return value if isinstance(value, jax.Array) else jax.device_put(value.astype(leaf.dtype), leaf.sharding)


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


class _OrbaxSilence(logging.Filter):
    """Drops Orbax's progress lines and its copies of errors that are raised here with a message."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname


def _quiet_orbax() -> None:
    logger = logging.getLogger("absl")
    if not any(isinstance(present, _OrbaxSilence) for present in logger.filters):
        logger.addFilter(_OrbaxSilence())
