"""Logical axes of an optimizer's state, so that one rules table shards it like the weights."""

from collections.abc import Mapping
from typing import Any

import jax

from maxstack.optim.adafactor import moment_dims
from maxstack.optim.layout import Axes


def state_axes(opt_state: Any, params: Mapping[str, Any], axes: Mapping[str, Axes]) -> Any:
    """A tree like `opt_state` (arrays or shapes) with a tuple of axis names for each leaf; () for scalars.

    Zip it with the state: `jax.tree.map(lambda leaf, ax: …, opt_state, state_axes(…))`; the names are tuples, so they
    are no leaves by themselves. Raises ValueError for a leaf that belongs to no weight.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(opt_state)
    return jax.tree.unflatten(treedef, [_leaf_axes(path, leaf.shape, params, axes) for path, leaf in found])


def _leaf_axes(
    path: tuple[Any, ...], shape: tuple[int, ...], params: Mapping[str, Any], axes: Mapping[str, Axes]
) -> Axes:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    param = next((name for name in reversed(names) if name in params), None)
    if param is None:
        if shape == ():
            return ()
        raise ValueError(
            f"optimizer state {jax.tree_util.keystr(path)} of shape {shape} belongs to no weight"
        )
    own, kept = axes[param], moment_dims(axes[param])
    if kept is not None and ("row" in names or "col" in names):
        own = tuple(own[i] for i in kept["col" in names])
    elif shape != tuple(params[param].shape):
        raise ValueError(
            f"optimizer state {jax.tree_util.keystr(path)} has shape {shape}, its weight {tuple(params[param].shape)}"
        )
    return own
