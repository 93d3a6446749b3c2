"""Names of arrays: "params/blocks.0.attention.wq", "opt_state/0/mu/embedding".

A state is a nested dict of strings; a name is its path joined with "/". Optimizer states are nests of tuples and
namedtuples, whose shape belongs to the code that made them: `named` writes them as nested dicts, `like` goes back.
"""

from collections.abc import Mapping
from typing import Any

import jax

SEPARATOR = "/"


def named(tree: Any) -> dict[str, Any]:
    """Any pytree as a nested dict: fields by name, tuple entries by index, `None` and empty nodes left out.

    Raises ValueError for a key that has "/" in it and for two keys with the same name (0 and "0").
    """
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *folders, last = _parts(path)
        node = result
        for part in folders:
            node = node.setdefault(part, {})
        if last in node:
            raise ValueError(f"two leaves of the tree have the name {SEPARATOR.join([*folders, last])!r}")
        node[last] = leaf
    return result


def like(structure: Any, names: Mapping[str, Any]) -> Any:
    """The inverse of `named`: a tree of the structure's kind with the leaves found under its names.

    Raises ValueError that lists the names the structure has and `names` lacks, and the other way round.
    """
    found = flatten(names)
    paths, treedef = jax.tree_util.tree_flatten_with_path(structure)
    wanted = [SEPARATOR.join(_parts(path)) for path, _ in paths]
    missing = sorted(set(wanted) - set(found))
    unexpected = sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"the names do not fit the structure: missing {missing}, unexpected {unexpected}")
    return jax.tree.unflatten(treedef, [found[name] for name in wanted])


def flatten(state: Mapping[Any, Any]) -> dict[str, Any]:
    """A nested dict as one dict of full names. Raises TypeError or ValueError for a key that is no plain name."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise TypeError(
                f"a state has strings for keys, not {key!r}; `named(tree)` makes one of any pytree"
            )
        if not key or SEPARATOR in key:
            raise ValueError(f"the key {key!r} must be a name without {SEPARATOR!r}")
        if isinstance(value, Mapping):
            result |= {f"{key}{SEPARATOR}{name}": leaf for name, leaf in flatten(value).items()}
        elif value is not None:
            result[key] = value
    return result


def unflatten(names: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; empty dicts do not come back."""
    result: dict[str, Any] = {}
    for name, leaf in names.items():
        *folders, last = name.split(SEPARATOR)
        node = result
        for part in folders:
            node = node.setdefault(part, {})
        node[last] = leaf
    return result


def _parts(path: tuple[Any, ...]) -> list[str]:
    parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path] or ["value"]
    for part in parts:
        if SEPARATOR in part or not part:
            raise ValueError(f"the key {part!r} must be a name without {SEPARATOR!r}")
    return parts
