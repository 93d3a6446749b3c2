"""States for the checkpoint tests: small, with every kind of leaf, and equal only if every bit is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from maxstack.checkpoint import flatten, named

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_params(seed: int = 0) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "blocks.0.attention.wq": jax.random.normal(keys[0], (2, 16, 8)),
        "embedding": jax.random.normal(keys[1], (32, 16)),
        "norm": jax.random.normal(keys[2], (16,)).astype(jnp.bfloat16),
    }


def make_state(seed: int = 0) -> dict[str, Any]:
    params = make_params(seed)
    return {
        "params": params,
        "opt_state": named(OPTIMIZER.init(params)),
        "ema": jax.tree.map(lambda x: x * 0.5, params),
        "key": jax.random.key(seed + 7),
        "dropout_key": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "step": jnp.int32(seed),
        "counts": np.arange(5, dtype=np.int64),
        "unused": {},
    }


def on_mesh(state: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """The state's abstract target on a mesh of the first devices, each dimension of size 16 or 32 over "fsdp"."""
    count = int(np.prod(list(sizes.values())))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])

    def abstract(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf
        spec = PartitionSpec(*("fsdp" if size in (16, 32) and leaf.ndim > 1 else None for size in leaf.shape))
        if list(spec).count("fsdp") > 1:
            spec = PartitionSpec("fsdp", "tensor" if "tensor" in sizes else None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(abstract, state)


def placed(state: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    def place(leaf: Any, like: Any) -> Any:
        return leaf if isinstance(leaf, np.ndarray) else jax.device_put(leaf, like.sharding)

    return jax.tree.map(place, state, target)


def shardings(state: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(leaf, "sharding", None) for name, leaf in flatten(state).items()}


def as_bytes(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return str(array.dtype), array.shape, array.tobytes()


def same_bits(left: dict[str, Any], right: dict[str, Any]) -> bool:
    one, other = flatten(left), flatten(right)
    return one.keys() == other.keys() and all(as_bytes(one[name]) == as_bytes(other[name]) for name in one)
