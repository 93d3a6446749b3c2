"""A model as a flat dict of named arrays, and back: what the optimizer, the checkpoint and exports work on."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from maxstack.config import UserError
from maxstack.models.layers import Buffer

# By name: arrays of a model, ShapeDtypeStructs of an abstract one.
Leaves = dict[str, Any]


def named_variables(model: nnx.Module | nnx.Variable) -> dict[str, nnx.Variable]:
    """Every variable under its dotted name ("stacks.0.layers.0.attention.q.w"), in the order of the tree.

    Raises TypeError for a bare array: it has no logical axes.
    """
    found, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
    for path, leaf in found:
        if not isinstance(leaf, nnx.Variable):
            raise TypeError(
                f"{dotted(path)} is a bare {type(leaf).__name__}: make it with layers.weight, layers.constant or Buffer"
            )
    return {dotted(path): variable for path, variable in found}


def dotted(path: tuple[Any, ...]) -> str:
    """A key path as a dotted name."""
    return ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path)


def leaves(model: nnx.Module) -> Leaves:
    """Every array of the model by name."""
    return {name: variable.get_raw_value() for name, variable in named_variables(model).items()}


def axes(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Logical axes of every array; what stacking put in front is "layers"."""
    result = {}
    for name, variable in named_variables(model).items():
        own = variable.get_metadata()["axes"]
        result[name] = ("layers",) * (variable.get_raw_value().ndim - len(own)) + own
    return result


def buffer_names(model: nnx.Module) -> frozenset[str]:
    """Names of the arrays that gradients do not train."""
    return frozenset(
        name for name, variable in named_variables(model).items() if isinstance(variable, Buffer)
    )


def abstract[M: nnx.Module](build: Callable[[], M]) -> M:
    """The model that `build` would make, with shapes for arrays: nothing is computed."""
    return jax.eval_shape(build)


@functools.lru_cache(maxsize=8)
def abstract_model(config: Any) -> Any:
    """The abstract model of a config, made once: it takes a tenth of a second, and loading asks for it thrice."""
    return abstract(lambda: config.build(jax.random.key(0)))


def rebuild[M: nnx.Module](model: M, arrays: Mapping[str, Any]) -> M:
    """A copy of `model` (which may be abstract) holding `arrays`.

    Raises UserError naming what is missing, extra, or of another shape than in `model`.
    """
    variables = named_variables(model)
    missing, extra = variables.keys() - arrays.keys(), arrays.keys() - variables.keys()
    if missing or extra:
        raise UserError(
            f"weights do not match the model: missing {sorted(missing)[:5]}, unexpected {sorted(extra)[:5]} "
            f"({len(missing)} missing and {len(extra)} unexpected in all)"
        )
    for name, variable in variables.items():
        wanted, given = variable.get_raw_value().shape, arrays[name].shape
        if wanted != given:
            raise UserError(f"{name} has shape {given}, the model wants {wanted}")
    treedef = jax.tree.structure(model)
    return jax.tree.unflatten(treedef, [arrays[name] for name in variables])


def part(model: nnx.Module, path: str) -> Any:
    """The module, weight or setting under a dotted name such as "stacks.0.layers.0.attention"."""
    found: Any = model
    for step in path.split("."):
        if isinstance(found, nnx.List) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        elif isinstance(found, nnx.Module) and step in vars(found):
            found = getattr(found, step)
        else:
            has = range(len(found)) if isinstance(found, nnx.List) else sorted(public(found))
            raise UserError(f"no {path!r} in the model: {type(found).__name__} has {list(has)}, no {step!r}")
    return found


def public(module: Any) -> list[str]:
    """Names of a module's parts and settings."""
    return [name for name in getattr(module, "__dict__", {}) if not name.startswith("_")]


def replace[M: nnx.Module](model: M, changes: Mapping[str, Any]) -> M:
    """A copy of `model` with the parts under some dotted names changed; unchanged arrays are shared.

    `{"stacks.0.layers.0.attention": new}` changes the attention of all layers at that place of the pattern: they are
    one module whose weights have a leading axis, and so must the new one's. Raises UserError for an unknown name and a
    new part without that axis, TypeError for a bare array (give a Weight, or change values with `rebuild`).
    """
    leaves_, treedef = jax.tree.flatten(model)
    copy = jax.tree.unflatten(treedef, leaves_)
    for path, new in changes.items():
        check_stacking(path, part(copy, path), new)
        if isinstance(new, jax.Array):
            raise TypeError(f"{path}: a bare array is no leaf of a model; give a Weight, or use tree.rebuild")
        above, _, last = path.rpartition(".")
        parent = part(copy, above) if above else copy
        if isinstance(parent, nnx.List):
            parent[int(last)] = new
        else:
            setattr(parent, last, new)
    return copy


def check_stacking(path: str, old: Any, new: Any) -> None:
    """Raise UserError when the arrays of a new part are not stacked over layers as the old part's are."""
    if not (isinstance(old, nnx.Module | nnx.Variable) and isinstance(new, nnx.Module | nnx.Variable)):
        return
    before, after = stacking(old), stacking(new)
    if before and after and before != after:
        raise UserError(
            f"{path}: its arrays have leading axes {sorted(before)} over layers, the new ones {sorted(after)}: build "
            "the new part with jax.vmap over as many keys"
        )


def stacking(module: nnx.Module | nnx.Variable) -> set[tuple[int, ...]]:
    """The sizes of the axes that stacking put in front of a part's arrays."""
    variables = named_variables(module).values()
    shapes = [(v.get_raw_value().shape, len(v.get_metadata()["axes"])) for v in variables]
    return {shape[: len(shape) - own] for shape, own in shapes}
